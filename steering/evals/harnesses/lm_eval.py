"""A model and a plan as a model of EleutherAI's lm-eval harness: what it asks is answered steered, and accounted for.

    from lm_eval.evaluator import simple_evaluate

    model = PersonatlasLM(model, chat, [cap])           # [] is the model as it is
    simple_evaluate(model=model, tasks=["arc_easy"], apply_chat_template=True)
    model.counts.share                                   # of the tokens times layers that were read, how many were changed

A log-likelihood is ln p(continuation | context), the sum over the continuation's tokens, in fp32. The context is read in the
plan's prompt phase, the continuation in its answer phase; of a text that is scored from its beginning (rolling) all but the
token put before it is answer. What was asked once is not asked again: `Kept` holds it, in a file if it is given one.

lm-eval's tasks in several arms of one model, and what the arms differ by.

    content = run_tasks(model, chat, {"baseline": [], "assistant": [cap]}, ["ifeval"], data={"ifeval": Path("ifeval.jsonl")},
                        folder=Path("runs/evals"), limit=100)
    content["tasks"]["ifeval"]["metrics"]["prompt_level_strict_acc"]["arms"]["assistant"]["change"]

The first arm is the one that others are compared with (`lm_eval_compare` says how). Every sample is kept with its answer and
scores in each arm, and a task's `account` says how many prompts were cut and how many tokens times layers were changed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from personatlas.persona.artifacts import write_json
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.stages import CPU_CHUNK, GPU_CHUNK
from personatlas.persona.progress import progress
from personatlas.persona.rollout import seed_of
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampling, batch_end, pad
from personatlas.steering.evals.harnesses.lm_eval_compare import Outcome, compare_arms, outcome_of
from personatlas.steering.evals.harnesses.lm_eval_sentences import checkers_ready, instructions_affected
from personatlas.steering.evals.harnesses.lm_eval_tasks import LENGTHS, load_tasks, require_lm_eval
from personatlas.steering.hooks.steering import Steering, steer
from personatlas.steering.loss_cost import CPU_TOKENS, GPU_TOKENS

MAX_NEW_TOKENS = 256  # of a task that names no length, as in lm-eval
# settings of a generation that change nothing at these values; others would be ignored, and are refused
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "repetition_penalty": (1, 1.0), "top_k": (0, None), "num_return_sequences": (1,), "min_p": (0, None),
    "use_cache": (True, False),
}  # fmt: skip


class Kept:
    """Rows by key, appended to a JSONL file if there is one."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rows = {row["key"]: row for row in read_lines(path)} if path is not None else {}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self._rows[key]

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep rows, all of them or none."""
        if self.path is not None:
            append_lines(self.path, rows, sync=False)
        self._rows |= {row["key"]: row for row in rows}


@dataclass
class Counts:
    """What a model was asked since it was made: distinct `requests`, how many of them had been answered before (`reused`) or
    were cut on the left to fit (`cut`), and tokens times layers `seen` and `fired`, those of reused answers included."""

    requests: int = 0
    reused: int = 0
    cut: int = 0
    seen: int = 0
    fired: int = 0

    @property
    def share(self) -> float | None:
        """Fired among seen; None for a plan that did nothing."""
        return self.fired / self.seen if self.seen else None


@dataclass(frozen=True)
class Reading:
    """A text to score from token `start` on; in the plan's answer phase from token `answer_from` on."""

    ids: tuple[int, ...]
    start: int
    answer_from: int


class PersonatlasLM(TemplateLM):
    """A model under one plan. `as_chat` says that contexts come through `apply_chat_template`, so that nothing is put before
    them and the template's own marks end an answer; without it both are as in lm-eval's own models. `label` heads the
    progress on stderr; none is shown without one."""

    backend = "causal"

    def __init__(
        self,
        model: Model,
        chat: ChatFormat,
        plan: Interventions = (),
        *,
        as_chat: bool = False,
        kept: Kept | None = None,
        label: str = "",
    ) -> None:
        super().__init__()
        self.model, self.chat, self.plan, self.tokenizer = model, chat, tuple(plan), model.tokenizer
        self.as_chat, self.kept, self.label = as_chat, kept or Kept(), label
        self.counts = Counts()
        self.arm = {
            "plan": interventions_digest(self.plan),
            "model": model.fingerprint,
            "dtype": str(model.dtype),
        }
        config = model.hf.generation_config
        eos = None if config is None else config.eos_token_id
        own = {eos} if isinstance(eos, int) else set(eos or ())
        self._end_ids = chat.end_ids if as_chat else frozenset(own | {self.eot_token_id})

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once."""
        config = self.model.hf.config.get_text_config(decoder=True)
        longest = getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length
        return int(min(longest, 1 << 20))

    @property
    def tokenizer_name(self) -> str:
        """For lm-eval's own caches."""
        return self.model.id.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as text. Without `add_generation_prompt` its last message, of the assistant, is one to go on with."""
        plain = [{"role": one["role"], "content": one["content"]} for one in chat_history]
        if add_generation_prompt or plain[-1]["role"] != "assistant":
            return self.chat.render(plain, generation=add_generation_prompt)
        return self.chat.render(plain[:-1], generation=True) + plain[-1]["content"]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; unless told otherwise with the tokenizer's own beginning, but in a chat or where it stands there already."""
        if add_special_tokens is None and (
            self.as_chat or string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ):
            add_special_tokens = False
        how = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **how)["input_ids"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """ln p of each continuation after its context, and whether greedy decoding would write it."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        readings = []
        for (_context, continuation), before, after in requests:
            if not after:
                raise UserError(
                    f"the continuation {continuation!r} has no token of its own after its context"
                )
            if len(after) > self.max_length:
                raise UserError(f"a continuation of {len(after)} tokens is longer than the {self.max_length} that {self.model.id} reads")  # fmt: skip
            over = max(0, len(before) + len(after) - self.max_length - 1)
            self.counts.cut += over > 0
            start = len(before) - over
            readings.append(Reading((*before[over:], *after), start, start))
        return self._scored(readings)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """ln p of each whole text, in windows where it is longer than the model reads."""
        readings, owners = [], []
        for owner, request in enumerate(requests):
            (text,) = request.args
            is_marked = text.startswith(self.tokenizer.decode(self.prefix_token_id))
            ids = list(
                self.tokenizer(text, verbose=False, **({"add_special_tokens": False} if is_marked else {}))[
                    "input_ids"
                ]
            )
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            for number, (before, after) in enumerate(map(make_disjoint_window, windows)):
                readings.append(Reading((*before, *after), len(before), int(number == 0)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._scored(readings), strict=True):
            totals[owner] += value
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Each context's continuation up to its stop strings; greedy unless the task asks for sampling."""
        asked: dict[tuple[Sampling, tuple[str, ...]], dict[str, Prompt]] = {}
        keys: list[str] = []
        met: dict[str, int] = {}
        for request in requests:
            context, given = request.args
            sampling, stops = sampling_of(given)
            ids = self._fitting(context, sampling.max_new_tokens)
            key = self._key("write", ids, repr(sampling), stops, sorted(self._end_ids))
            met[key] = met.get(key, -1) + 1
            if sampling.temperature and met[key]:  # the same context again: other random numbers
                key = self._key(key, met[key])
            keys.append(key)
            asked.setdefault((sampling, stops), {})[key] = Prompt(ids, seed_of(key, 0))
        self._count_reused(keys)
        for (sampling, stops), prompts in asked.items():
            self._write(sampling, stops, prompts)
        self._count(keys)
        return [self.kept[key]["text"] for key in keys]

    def _fitting(self, context: str, new: int) -> tuple[int, ...]:
        """A context's ids, cut on the left to leave room for `new` tokens."""
        room = self.max_length - new
        if room < 1:
            raise UserError(
                f"{new} new tokens leave no room for a prompt in the {self.max_length} that {self.model.id} reads: give fewer with --max-new-tokens"
            )
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.counts.cut += len(ids) > room
        return tuple(ids[-room:])

    def _write(self, sampling: Sampling, stops: tuple[str, ...], prompts: Mapping[str, Prompt]) -> None:
        """Answer what is not kept, in chunks that are kept whole."""
        left = sorted(
            (key for key in prompts if key not in self.kept), key=lambda key: -len(prompts[key].ids)
        )
        if not left:
            return
        chunk = GPU_CHUNK if self.model.device.type == "cuda" else CPU_CHUNK
        longest = max(len(prompts[key].ids) for key in left)
        sampler = fastest_sampler(self.model, self._end_ids | self._stop_ids(stops), sampling, longest)
        with progress(self.label, len(prompts), done=len(prompts) - len(left), quiet=not self.label) as advance, self._steered() as held:  # fmt: skip
            for first in range(0, len(left), chunk):
                keys = left[first : first + chunk]
                found: list[Answer | None] = [None] * len(keys)
                for answer in sampler.answers([prompts[key] for key in keys], held):
                    found[answer.index] = answer
                    advance(1, len(answer.ids))
                account = _accounts(held, len(keys))
                self.kept.add(
                    [
                        self._row(key, one, text=self._text(answer, stops), stopped=answer.stopped)
                        for key, answer, one in zip(keys, found, account, strict=True)
                        if answer is not None
                    ]
                )

    def _text(self, answer: Answer, stops: Sequence[str]) -> str:
        text = self.tokenizer.decode(list(answer.ids), skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0] if stop else text
        return text

    def _stop_ids(self, stops: Sequence[str]) -> set[int]:
        """Stop strings that are one token: they end an answer at once, others when it is cut."""
        ids = [self.tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in stops if stop]
        return {own[0] for own in ids if len(own) == 1}

    @torch.no_grad()
    def _scored(self, readings: Sequence[Reading]) -> list[tuple[float, bool]]:
        """Sum of ln p and greediness of each reading. Those that differ in their last token alone share a forward."""
        keys = [self._key("read", one.ids, one.start, one.answer_from) for one in readings]
        groups: dict[tuple[Any, ...], dict[str, Reading]] = {}
        for key, one in zip(keys, readings, strict=True):
            if key not in self.kept:
                groups.setdefault((one.ids[:-1], one.start, one.answer_from), {})[key] = one
        self._count_reused(keys)
        order = sorted(groups, key=lambda group: -len(group[0]))
        lengths, first = [len(group[0]) for group in order], 0
        tokens = GPU_TOKENS if self.model.device.type == "cuda" else CPU_TOKENS
        with progress(self.label, len(order), quiet=not self.label) as advance, self._steered() as held:
            while first < len(order):
                stop = batch_end(lengths, first, tokens)
                self.kept.add(self._read([groups[group] for group in order[first:stop]], held))
                advance(stop - first)
                first = stop
        self._count(keys)
        return [(self.kept[key]["value"], self.kept[key]["greedy"]) for key in keys]

    def _read(self, part: Sequence[Mapping[str, Reading]], held: Steering | None) -> list[dict[str, Any]]:
        """One padded forward over the groups of `part`."""
        rows = [next(iter(group.values())) for group in part]
        ids = pad([row.ids[:-1] for row in rows], self.model.device)
        if held is not None:
            held.begin(torch.zeros(len(rows), dtype=torch.long))
            lengths = torch.tensor([len(row.ids) - 1 for row in rows])
            held.describe(lengths, torch.tensor([row.answer_from for row in rows]), opening=True)
        first = min(row.start for row in rows) - 1
        logits = self.model.hf(input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first).logits
        values, met = [], []
        for place, (row, group) in enumerate(zip(rows, part, strict=True)):
            # (B, T - first, V) -> (n, V): before each scored token
            own = logits[place, row.start - 1 - first : len(row.ids) - 1 - first].float().log_softmax(-1)
            targets = torch.tensor(
                [one.ids[one.start :] for one in group.values()], device=own.device
            )  # (G, n)
            values.append(own.gather(1, targets.T).double().sum(0))
            met.append((own.argmax(-1) == targets).all(1))
        # the forward's account goes to the first of those that share it
        accounts = [one for group, own in zip(part, _accounts(held, len(rows)), strict=True) for one in [own, *[(0, 0)] * (len(group) - 1)]]  # fmt: skip
        keys = [key for group in part for key in group]
        answers = zip(keys, accounts, torch.cat(values).tolist(), torch.cat(met).tolist(), strict=True)
        return [
            self._row(key, account, value=value, greedy=greedy) for key, account, value, greedy in answers
        ]

    def _steered(self) -> Any:
        return steer(self.model, self.plan) if self.plan else nullcontext()

    def _row(self, key: str, account: tuple[int, int], **content: Any) -> dict[str, Any]:
        return {"key": key, **self.arm, **content, "seen": account[0], "fired": account[1]}

    def _key(self, *content: Any) -> str:
        return hashlib.sha256(json.dumps([self.arm, *content]).encode()).hexdigest()[:32]

    def _count_reused(self, keys: Iterable[str]) -> None:
        self.counts.reused += sum(key in self.kept for key in set(keys))

    def _count(self, keys: Iterable[str]) -> None:
        for key in set(keys):
            self.counts.requests += 1
            self.counts.seen += self.kept[key]["seen"]
            self.counts.fired += self.kept[key]["fired"]


def sampling_of(given: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
    """How a task wants its answers: lengths, temperature and stop strings, with lm-eval's own defaults.

    Raises `UserError` for settings that would be ignored.
    """
    left = dict(given)
    lengths = [value for name in LENGTHS if (value := left.pop(name, None)) is not None]
    until, is_sampled = left.pop("until", None) or (), left.pop("do_sample", None)
    temperature, top_p = float(left.pop("temperature", None) or 0.0), float(left.pop("top_p", None) or 1.0)
    for name, value in left.items():
        if value not in NEUTRAL.get(name, ()):
            raise UserError(f"generation setting {name}: {value!r} is not supported here: a task may set until, do_sample, temperature, top_p and {LENGTHS[0]}")  # fmt: skip
    if is_sampled is False:
        temperature = 0.0
    stops = (until,) if isinstance(until, str) else tuple(until)
    return Sampling(int(lengths[0]) if lengths else MAX_NEW_TOKENS, temperature, top_p), stops


def _accounts(held: Steering | None, rows: int) -> list[tuple[int, int]]:
    """Tokens times layers seen and fired, by row."""
    if held is None:
        return [(0, 0)] * rows
    tally = held.tally
    return list(zip(tally.seen.sum(0).tolist(), tally.fired.sum(0).tolist(), strict=True))


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
                raise UserError(f"--{name.replace('_', '-')} {value} is below {least}")
        if not 0 < self.margin < 1:
            raise UserError(
                f"--margin {self.margin} is outside (0, 1): the largest change that counts as none"
            )


def run_tasks(
    model: Model,
    chat: ChatFormat,
    arms: Mapping[str, Interventions],
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
    every answer. Raises `UserError` for what cannot be, before anything is asked where that can be known.
    """
    require_lm_eval()
    asked, data = Asked(limit, as_chat, fewshot, max_new_tokens, margin), data or {}
    if not arms:
        raise UserError("no arm is given: at least the model as it is, {'baseline': []}")
    content, outcomes, notes = dict[str, Any](), dict[str, Any](), list[str]()
    with checkers_ready(tasks) as is_standing_in, _quiet():
        found = load_tasks(tasks, data, tasks_folder)
        for name, task in found.items():
            _settle(task, asked)
            notes += _notes(name, task, data, limit, is_standing_in)
        kept = _kept(folder, log)
        for name, task in found.items():
            results = {
                arm: _run(model, chat, plan, name, task, arm, asked, kept) for arm, plan in arms.items()
            }
            content[name], outcomes[name] = _task_content(task, results), _outcomes(task, results)
            notes += [f"{name}, {arm}: {n} prompts were cut on the left to fit" for arm, one in results.items() if (n := one["counts"]["cut"])]  # fmt: skip
    compare_arms(content, next(iter(arms)), outcomes, margin)
    told = asdict(asked) | {"data": {name: str(path) for name, path in data.items()}}
    whole = _head(model, arms) | {"asked": told, "tasks": content, "notes": notes}
    if folder is not None:
        write_json(folder / "lm_eval.json", whole)
    return whole


def _kept(folder: Path | None, log: Path | None) -> "Kept":
    """The answers of earlier runs."""

    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        log = log or folder / "answers.jsonl"
    return Kept(log)


def _head(model: Model, arms: Mapping[str, Interventions]) -> dict[str, Any]:
    return {
        "kind": "lm_eval",
        "lm_eval": version("lm_eval"),
        "model": model.describe(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "arms": {arm: interventions_digest(plan) for arm, plan in arms.items()},
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


def _notes(
    name: str, task: Any, data: Mapping[str, Path], limit: int | None, is_standing_in: bool
) -> list[str]:
    """What the reader of a task's values must know."""
    notes, docs, shots = [], task.eval_docs, task.get_config("num_fewshot")
    if name in data and shots and task.get_config("fewshot_split"):
        notes.append(
            f"{name}: its {shots} examples come from {data[name]} itself, never the row that is asked"
        )
    if is_standing_in and "instruction_id_list" in docs.features:
        asked = docs["instruction_id_list"][: limit or len(docs)]
        notes.append(f"{name}: nltk's punkt_tab could not be downloaded, so sentences are found by a shorter list of abbreviations; {instructions_affected(asked)} instructions are checked by it")  # fmt: skip
    return notes


def _run(
    decoder: Model, chat: ChatFormat, plan: Interventions, name: str, task: Any, arm: str, asked: Asked, kept: "Kept"
) -> dict[str, Any]:  # fmt: skip
    """One task in one arm: lm-eval's values, its samples, and the account."""
    from lm_eval.evaluator import evaluate

    model = PersonatlasLM(decoder, chat, plan, as_chat=asked.as_chat, kept=kept, label=f"{name}, {arm}")
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
        raise UserError(f"task {name} needs the column {error.args[0]!r}, which its data lack; they have {', '.join(columns)}") from None  # fmt: skip
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


def _outcomes(
    task: Any, results: Mapping[str, dict[str, Any]]
) -> dict[str, dict[str, dict[int, Outcome | None]]]:
    """What is compared: by metric, arm and sample."""
    found: dict[str, dict[str, dict[int, Outcome | None]]] = {}
    for arm, one in results.items():
        for sample in one["samples"]:
            for metric in sample["metrics"]:
                own = found.setdefault(_named(metric, sample["filter"]), {}).setdefault(arm, {})
                own[sample["doc_id"]] = outcome_of(
                    sample[metric], is_whole=task.OUTPUT_TYPE == "loglikelihood_rolling"
                )
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
