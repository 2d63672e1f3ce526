"""lm-eval's tasks in several arms of one model, and what the arms differ by.

    content = run_tasks(subject, chat, {"as it is": [], "assistant": [cap]}, ["ifeval"], data={"ifeval": Path("ifeval.jsonl")},
                        folder=Path("runs/evals"), limit=100)
    content["tasks"]["ifeval"]["metrics"]["prompt_level_strict_acc"]["arms"]["assistant"]["change"]

The first arm is the one that others are compared with (`lm_eval_compare` says how). Every sample is kept with its answer and
scores in each arm, and a task's `account` says how many prompts were cut and how many tokens times layers were changed.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from personaxis.persona.chat import ChatFormat
from personaxis.persona.errors import KnownError
from personaxis.persona.store import write_json
from personaxis.persona.subject import Subject
from personaxis.steering.evals.lm_eval_compare import Outcome, compare_arms, outcome_of
from personaxis.steering.evals.lm_eval_sentences import checkers_ready, instructions_affected
from personaxis.steering.evals.lm_eval_tasks import LENGTHS, load_tasks, require_lm_eval
from personaxis.steering.interventions import plan_digest
from personaxis.steering.steer import Plan

if TYPE_CHECKING:
    from personaxis.steering.evals.lm_eval_model import Kept

MARGIN = 0.02
FEWSHOT_SEED = 1234  # lm-eval's own


@dataclass(frozen=True)
class Asked:
    """How tasks are run."""

    limit: int | None
    as_chat: bool
    fewshot: int | None
    max_new_tokens: int | None
    margin: float

    def __post_init__(self) -> None:
        for name, least in (("limit", 1), ("fewshot", 0), ("max_new_tokens", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise KnownError(f"--{name.replace('_', '-')} {value} is below {least}")
        if not 0 < self.margin < 1:
            raise KnownError(f"--margin {self.margin} is outside (0, 1): the largest change that counts as none")


def run_tasks(
    subject: Subject,
    chat: ChatFormat,
    arms: Mapping[str, Plan],
    tasks: Sequence[str],
    *,
    data: Mapping[str, Path] | None = None,
    folder: Path | None = None,
    limit: int | None = None,
    log: Path | None = None,
    tasks_folder: Path | None = None,
    as_chat: bool = True,
    fewshot: int | None = None,
    max_new_tokens: int | None = None,
    margin: float = MARGIN,
) -> dict[str, Any]:
    """Every task in every arm, as plain data; also in `folder`/lm_eval.json if there is a folder.

    `data` are JSONL files in place of tasks' own data, `limit` the samples a task at most, `log` the file of answers that a later run goes
    on from (`folder`/answers.jsonl unless given), `fewshot` the examples in place of the task's number, and `max_new_tokens` bounds
    every answer. Raises `KnownError` for what cannot be, before anything is asked where that can be known.
    """
    require_lm_eval()
    asked, data = Asked(limit, as_chat, fewshot, max_new_tokens, margin), data or {}
    if not arms:
        raise KnownError("no arm is given: at least the model as it is, {'as it is': []}")
    content, outcomes, notes = dict[str, Any](), dict[str, Any](), list[str]()
    with checkers_ready(tasks) as is_standing_in, _quiet():
        found = load_tasks(tasks, data, tasks_folder)
        for name, task in found.items():
            _settle(task, asked)
            notes += _notes(name, task, data, limit, is_standing_in)
        kept = _kept(folder, log)
        for name, task in found.items():
            results = {arm: _run(subject, chat, plan, name, task, arm, asked, kept) for arm, plan in arms.items()}
            content[name], outcomes[name] = _task_content(task, results), _outcomes(task, results)
            notes += [f"{name}, {arm}: {n} prompts were cut on the left to fit" for arm, one in results.items() if (n := one["counts"]["cut"])]  # fmt: skip
    compare_arms(content, next(iter(arms)), outcomes, margin)
    told = asdict(asked) | {"data": {name: str(path) for name, path in data.items()}}
    whole = _head(subject, arms) | {"asked": told, "tasks": content, "notes": notes}
    if folder is not None:
        write_json(folder / "lm_eval.json", whole)
    return whole


def _kept(folder: Path | None, log: Path | None) -> "Kept":
    """The answers of earlier runs."""
    from personaxis.steering.evals.lm_eval_model import Kept

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log = log or folder / "answers.jsonl"
    return Kept(log)


def _head(subject: Subject, arms: Mapping[str, Plan]) -> dict[str, Any]:
    return {
        "kind": "lm_eval",
        "lm_eval": version("lm_eval"),
        "model": subject.describe(),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "arms": {arm: plan_digest(plan) for arm, plan in arms.items()},
    }


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's own remarks on tasks are not for the user of a verb; errors are."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _settle(task: Any, asked: Asked) -> None:
    """What lm-eval's own entry sets on a task before it is run."""
    own, new = task.get_config("num_fewshot"), asked.max_new_tokens
    if own is None or (asked.fewshot is not None and own != 0):
        task.set_config("num_fewshot", asked.fewshot or 0)
    if new is not None and task.OUTPUT_TYPE == "generate_until":
        given = dict(task.get_config("generation_kwargs") or {})
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        task.set_config("generation_kwargs", given | {LENGTHS[0]: min([new, *lengths])})


def _notes(name: str, task: Any, data: Mapping[str, Path], limit: int | None, is_standing_in: bool) -> list[str]:
    """What the reader of a task's values must know."""
    notes, docs, shots = [], task.eval_docs, task.get_config("num_fewshot")
    if name in data and shots and task.get_config("fewshot_split"):
        notes.append(f"{name}: its {shots} examples come from {data[name]} itself, never the row that is asked")
    if is_standing_in and "instruction_id_list" in docs.features:
        asked = docs["instruction_id_list"][: limit or len(docs)]
        notes.append(f"{name}: nltk's punkt_tab could not be downloaded, so sentences are found by a shorter list of abbreviations; {instructions_affected(asked)} instructions are checked by it")  # fmt: skip
    return notes


def _run(
    subject: Subject, chat: ChatFormat, plan: Plan, name: str, task: Any, arm: str, asked: Asked, kept: "Kept"
) -> dict[str, Any]:  # fmt: skip
    """One task in one arm: lm-eval's values, its samples, and the account."""
    from lm_eval.evaluator import evaluate

    from personaxis.steering.evals.lm_eval_model import PersonaxisLM

    model = PersonaxisLM(subject, chat, plan, as_chat=asked.as_chat, kept=kept, label=f"{name}, {arm}")
    task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every arm sees the same examples
    try:
        found = evaluate(
            model,
            {"tasks": {name: task}, "groups": {}, "group_map": {}},
            limit=asked.limit,
            bootstrap_iters=0,
            apply_chat_template=asked.as_chat,
            fewshot_as_multiturn=asked.as_chat,
        )
    except KeyError as error:
        columns = list(task.eval_docs.features)
        if error.args[0] in columns:
            raise
        raise KnownError(f"task {name} needs the column {error.args[0]!r}, which its data lack; they have {', '.join(columns)}") from None  # fmt: skip
    return {"values": found["results"][name], "samples": found["samples"][name], "counts": asdict(model.counts) | {"share": model.counts.share}}  # fmt: skip


def _task_content(task: Any, results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Values and scores of all arms, and every sample."""
    better = {name: bool(value) for name, value in task.higher_is_better().items()}
    metrics: dict[str, Any] = {}
    samples: dict[int, Any] = {}
    for arm, one in results.items():
        for sample in one["samples"]:
            own = samples.setdefault(sample["doc_id"], {"doc_id": sample["doc_id"], "arms": {}})
            kept = own["arms"].setdefault(arm, {"answer": _answer(sample), "scores": {}})
            for metric in sample["metrics"]:
                kept["scores"][_named(metric, sample["filter"])] = _plain(sample[metric])
        for name, value in one["values"].items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr"):
                told = metrics.setdefault(
                    _named(metric, filtered), {"higher_is_better": better.get(metric), "arms": {}}
                )
                told["arms"][arm] = {"value": _plain(value)}
    return {
        "n": len(samples), "output_type": task.OUTPUT_TYPE, "fewshot": task.get_config("num_fewshot"), "version": task.VERSION,
        "metrics": metrics, "account": {arm: one["counts"] for arm, one in results.items()},
        "samples": [samples[place] for place in sorted(samples)],
    }  # fmt: skip


def _outcomes(task: Any, results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, dict[int, Outcome | None]]]:
    """What is compared: by metric, arm and sample."""
    found: dict[str, dict[str, dict[int, Outcome | None]]] = {}
    for arm, one in results.items():
        for sample in one["samples"]:
            for metric in sample["metrics"]:
                own = found.setdefault(_named(metric, sample["filter"]), {}).setdefault(arm, {})
                own[sample["doc_id"]] = outcome_of(sample[metric], is_whole=task.OUTPUT_TYPE == "loglikelihood_rolling")
    return found


def _named(metric: str, filtered: str) -> str:
    return metric if filtered == "none" else f"{metric},{filtered}"


def _answer(sample: Mapping[str, Any]) -> Any:
    """What the model said: one text, or a log-likelihood for each of several continuations."""
    given = [_plain(one[0]) for one in sample["resps"]]
    return given[0] if len(given) == 1 else [one[0] if isinstance(one, list) else one for one in given]


def _plain(value: Any) -> Any:
    """JSON's own kinds of value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
