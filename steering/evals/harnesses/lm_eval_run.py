"""Tasks of EleutherAI's lm-eval harness in several arms of one model, and what the arms differ by.

    options = LmEvalOptions(data=["ifeval=ifeval.jsonl"], limit=100)
    result = run_lm_eval("smollm2-135m", ["ifeval"], "smollm2-135m", ["cap:assistant"], options=options)
    result.tasks["ifeval"].metrics["prompt_level_strict_acc"].arms["assistant"].change

The first arm is the one that others are compared with (`lm_eval_result` says how). Tasks are loaded by
lm-eval's own TaskManager, without a network where their data are local: a task's YAML is then included by a
temporary one that points it at the rows, so that prompts, filters and metrics stay lm-eval's. Few-shot
examples come from the same rows, never the asked one.

IFEval counts sentences with nltk's Punkt, whose data lm-eval downloads. Where that fails, the same algorithm
runs on a few abbreviations in place of what was learnt from text. Languages are recognised by langdetect,
which draws random numbers: it is seeded, since an arm must not differ by its checker.
"""

import contextlib
import importlib.util
import io
import json
import logging
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from personatlas.persona.artifacts import write_json
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import read_table
from personatlas.persona.interventions import BASELINE, Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.load import Model
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say_if_fewer
from personatlas.persona.records import JsonObject
from personatlas.persona.runs import open_run
from personatlas.steering.evals.harnesses.lm_eval_result import (
    CachedAnswer,
    LmEvalResult,
    MetricValue,
    RequestCounts,
    SampleAnswer,
    SampleOutcome,
    TaskMetric,
    TaskResult,
    TaskSample,
    compare_arms,
    parse_task_data,
    require_lm_eval,
    sample_outcome,
)
from personatlas.steering.evals.options import LmEvalOptions
from personatlas.steering.session import Arms, load_named, load_steered_model

if TYPE_CHECKING:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks import TaskManager

FEWSHOT_SEED = 1234  # lm-eval's own
TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
# IFEval's instructions that are checked by way of sentences
SENTENCE_CHECKS = ("length_constraints:number_sentences", "change_case:capital_word_frequency")
ABBREVIATIONS = (
    "a.m approx capt co corp dept dr e.g etc fig gen i.e inc jr lt ltd mr mrs ms mt no p.m ph.d prof rev sgt "
    "sr st u.k u.s vol vs"
)
MetricOutcomes = dict[str, dict[str, dict[int, SampleOutcome | None]]]  # by metric, arm and sample


@dataclass(frozen=True)
class _ArmRun:
    """A task in one arm: lm-eval's values and samples, and the counts of requests."""

    values: JsonObject
    samples: list[JsonObject]
    counts: RequestCounts


def run_lm_eval(
    model: str | Model,
    tasks: Sequence[str],
    axis: str | Axis | None = None,
    arms: Arms = (),
    out: Path | None = None,
    *,
    options: LmEvalOptions = LmEvalOptions(),
    load: ModelOptions = ModelOptions(),
    force: bool = False,
) -> LmEvalResult:
    """Runs every task in every arm; the result is also written to `out`/lm_eval.json if there is a folder.
    Resumes there.

    `arms` are as in `load_steered_model`; without an axis there is only the baseline. Raises `UserError` for
    what cannot be, before anything is asked where that can be known.
    """
    require_lm_eval()
    options.check()
    check_tasks(tasks, parse_task_data(options.data or []), options.tasks_folder)
    by_name: Mapping[str, Interventions] = {BASELINE: []}
    if axis is None and arms:
        raise UserError(f"the arm {next(iter(arms))} needs --axis: along which axis?")
    with contextlib.nullcontext() if out is None else open_run(out, create=True):
        if axis is None:
            model = load_named(model, load)
        else:
            steered = load_steered_model(model, axis, arms, load, force=force)
            model, by_name = steered.model, steered.arms
        return compare_tasks(model, by_name, tasks, out, options)


def compare_tasks(
    model: Model,
    arms: Mapping[str, Interventions],
    tasks: Sequence[str],
    out: Path | None = None,
    options: LmEvalOptions = LmEvalOptions(),
) -> LmEvalResult:
    """`run_lm_eval` of a loaded model. The first arm is the one that others are compared with."""
    if not arms:
        raise UserError('no arm is given: at least the baseline, {"baseline": []}')
    data = parse_task_data(options.data or [])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    results, outcomes = dict[str, TaskResult](), dict[str, MetricOutcomes]()
    notes, cuts = list[str](), list[str]()
    with _checkers_ready(tasks) as has_short_list, _quiet():
        loaded = load_tasks(tasks, data, options.tasks_folder)
        cache = ResultCache(
            None if out is None else out / "answers.jsonl", "key", sync=False, schema=CachedAnswer.from_json
        )
        for name, task in loaded.items():
            say_if_fewer("--limit", options.limit, len(task.eval_docs), f"of {name} ")
            runs = {arm: _run(model, plan, name, task, arm, options, cache) for arm, plan in arms.items()}
            results[name], outcomes[name] = _task_result(task, runs)
            cut = {arm: run.counts.cut for arm, run in runs.items() if run.counts.cut}
            cuts += [f"{name}, {arm}: {n} prompts were cut on the left to fit" for arm, n in cut.items()]
            docs, shots = task.eval_docs, task.get_config("num_fewshot")
            if name in data and shots and task.get_config("fewshot_split"):
                notes.append(
                    f"{name}: its {shots} examples come from {data[name]} itself, never the row that is asked"
                )
            if has_short_list and "instruction_id_list" in docs.features:
                instructions = docs["instruction_id_list"][: options.limit or len(docs)]
                n = sum(own in SENTENCE_CHECKS for item in instructions for own in item)
                reason = "nltk's punkt_tab could not be downloaded"
                effect = "so sentences are found by a shorter list of abbreviations"
                notes.append(f"{name}: {reason}, {effect}; {n} instructions are checked by it")
    names = ("limit", "fewshot", "max_new_tokens", "margin")
    asked = {name: getattr(options, name) for name in names} | {"as_chat": not options.raw}
    result = LmEvalResult(
        kind="lm_eval",
        lm_eval=version("lm_eval"),
        model=model.describe(),
        dtype=str(model.dtype).removeprefix("torch."),
        arms={arm: interventions_digest(plan) for arm, plan in arms.items()},
        asked=asked | {"data": {name: str(path) for name, path in data.items()}},
        tasks=compare_arms(results, next(iter(arms)), outcomes, options.margin),
        notes=(*notes, *cuts),
    )
    if out is not None:
        write_json(out / "lm_eval.json", result.to_json())
    return result


def check_tasks(names: Sequence[str], data: Mapping[str, Path], folder: Path | None) -> None:
    """Raises `UserError` for what can be seen to be wrong before anything is loaded."""
    if not names:
        raise UserError("no task is named: give lm-eval's names with commas between, such as ifeval,gsm8k")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder {folder} is not a folder")
    for name, file in data.items():
        if name not in names:
            raise UserError(f"--data {name}={file} is for a task that is not asked for ({', '.join(names)})")
        read_table(file)


def load_tasks(
    names: Sequence[str], data: Mapping[str, Path], folder: Path | None = None
) -> "dict[str, ConfigurableTask]":
    """lm-eval's tasks by name, groups and tags taken apart. `folder` holds task YAMLs of one's own, which go
    first.

    Raises `UserError` for names that are not there, data that cannot be read, and columns that a task needs
    and they lack.
    """
    from datasets.exceptions import DatasetsError
    from jinja2 import UndefinedError

    check_tasks(names, data, folder)
    manager = _task_manager(names, folder)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        where = f" and of {folder}" if folder is not None else ""
        raise UserError(f"task {not_one_of(unknown[0], manager.task_index)} (lm-eval's own{where})")
    tasks: dict[str, ConfigurableTask] = {}
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            path = manager.task_index[name].yaml_path
            spec = name if name not in data else _local_task(name, path, data[name], Path(temporary))
            try:
                tasks |= manager.load([spec])["tasks"]
            except (DatasetsError, OSError, json.JSONDecodeError) as error:
                reason = " ".join(str(error).split())[:300]
                hint = f"give a local copy with --data {name}=FILE.jsonl"
                raise UserError(f"task {name}: its data cannot be read ({reason}); {hint}") from None
            except UndefinedError as error:
                raise UserError(
                    f"task {name}: its data lack a column that its YAML names ({error})"
                ) from None
    return tasks


def _task_manager(names: Sequence[str], folder: Path | None) -> "TaskManager":
    """An index that holds the names, if there is one. To read all 14,000 built-in YAMLs takes 15 s: those
    that are called NAME.yaml are tried first."""
    import lm_eval.tasks

    own = [str(folder)] if folder is not None else []
    wanted = {f"{name}.yaml" for name in names}
    built_in = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
    likely = sorted({str(path.parent) for path in built_in if path.name in wanted})
    few = lm_eval.tasks.TaskManager(include_defaults=False, include_path=[*likely, *own])
    if all(name in few.task_index for name in names):
        return few
    return lm_eval.tasks.TaskManager(include_path=own or None)


def _local_task(name: str, base: Path | None, file: Path, folder: Path) -> str:
    """The path of a YAML that is the task at `base` over the rows of `file`."""
    import yaml
    from jinja2 import Environment, TemplateError, meta
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(base, resolve_func=False) if base is not None else {}
    if "class" in config or not isinstance(config.get("task"), str) or "output_type" not in config:
        reason = f"--data {name}={file}: {name} is no plain YAML task of its own"
        raise UserError(f"{reason}; name one of its tasks, or write a YAML into --tasks-folder")
    rows = [row for _, row in read_table(file)]
    columns, needed = {key for row in rows for key in row}, set[str]()
    for template in (config.get(key) for key in TEMPLATES):
        # `process_docs` makes columns of its own; lm-eval takes a bare word that is no column for a text
        if isinstance(template, str) and "process_docs" not in config:
            if re.fullmatch(r"\w+", template):
                needed.add(template)
            with contextlib.suppress(TemplateError):  # lm-eval will say so itself
                needed |= meta.find_undeclared_variables(Environment().parse(template))
    if missing := sorted(needed - columns):
        raise UserError(
            f"--data {name}={file} has no column {missing[0]!r}, which the task {name} needs; it has "
            f"{', '.join(sorted(columns))}"
        )
    split = next(
        (own for key in ("test", "validation", "training") if (own := config.get(f"{key}_split"))), "test"
    )
    examples = config.get("fewshot_config") or {}
    copy = folder / f"{name}.jsonl"
    copy.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {own: str(copy) for own in {split, examples.get("split") or split}}
    overlay = {
        "include": str(base),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files, "cache_dir": str(folder / "cache"), "keep_in_memory": True},
        "custom_dataset": None,
        "training_split": None,
        "validation_split": None,
        "test_split": split,
        "fewshot_split": None if examples.get("samples") else split,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    return str(path)


@contextlib.contextmanager
def _checkers_ready(names: Sequence[str]) -> Iterator[bool]:
    """Makes IFEval's checkers usable inside, if any of the tasks may be IFEval's; true where Punkt's data are
    missing and `ABBREVIATIONS` take their place."""
    if not any("ifeval" in name or "leaderboard" in name for name in names):
        yield False
        return
    if importlib.util.find_spec("langdetect") is not None:
        from langdetect import DetectorFactory

        DetectorFactory.seed = 0
    if importlib.util.find_spec("nltk") is None:
        yield False
        return
    import nltk

    has_punkt = False
    with contextlib.suppress(LookupError):
        has_punkt = bool(nltk.data.find("tokenizers/punkt_tab"))
    if has_punkt or nltk.download("punkt_tab", quiet=True, print_error_to=io.StringIO()):
        yield False
        return
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "tokenizers" / "punkt_tab" / "english"
        folder.mkdir(parents=True)
        for name in ("collocations.tab", "sent_starters.txt", "ortho_context.tab"):
            (folder / name).touch()
        (folder / "abbrev_types.txt").write_text("\n".join(ABBREVIATIONS.split()) + "\n", encoding="utf-8")
        nltk.data.path.append(root)
        try:
            yield True
        finally:
            nltk.data.path.remove(root)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval's own remarks and the bars of datasets are not for the user of a command; errors are."""
    import datasets

    logger, is_shown = logging.getLogger("lm_eval"), datasets.is_progress_bar_enabled()
    before = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if is_shown:
            datasets.enable_progress_bars()


def _run(
    model: Model,
    plan: Interventions,
    name: str,
    task: "ConfigurableTask",
    arm: str,
    options: LmEvalOptions,
    cache: ResultCache,
) -> _ArmRun:
    """One task in one arm."""
    from lm_eval.evaluator import evaluate

    from personatlas.steering.evals.harnesses.lm_eval import LENGTH_SETTINGS, PersonatlasLM

    # what lm-eval's own entry sets on a task before it is run
    shots, new = task.get_config("num_fewshot"), options.max_new_tokens
    if shots is None or (options.fewshot is not None and shots != 0):
        task.set_config("num_fewshot", options.fewshot or 0)
    if new is not None and task.OUTPUT_TYPE == "generate_until":
        settings = dict(task.get_config("generation_kwargs") or {})
        lengths = [settings.pop(key) for key in LENGTH_SETTINGS if key in settings]
        task.set_config("generation_kwargs", settings | {LENGTH_SETTINGS[0]: min([new, *lengths])})
    task.set_fewshot_seed(seed=FEWSHOT_SEED)  # every arm sees the same examples
    as_chat, tasks = not options.raw, {"tasks": {name: task}, "groups": {}, "group_map": {}}
    lm = PersonatlasLM(model, model.chat, plan, as_chat=as_chat, cache=cache, label=f"{name}, {arm}")
    prompts = {"apply_chat_template": as_chat, "fewshot_as_multiturn": as_chat}
    try:
        found = evaluate(lm, tasks, limit=options.limit, bootstrap_iters=0, **prompts)
    except KeyError as error:
        columns = list(task.eval_docs.features)
        if error.args[0] in columns:
            raise
        known = ", ".join(columns)
        raise UserError(
            f"task {name} needs the column {error.args[0]!r}, which its data lack; they have {known}"
        ) from None
    return _ArmRun(found["results"][name], found["samples"][name], lm.counts)


def _task_result(task: "ConfigurableTask", runs: Mapping[str, _ArmRun]) -> tuple[TaskResult, MetricOutcomes]:
    """Values and scores of all arms with every sample, and what is compared."""
    better = {name: bool(value) for name, value in task.higher_is_better().items()}
    metrics: dict[str, TaskMetric] = {}
    samples: dict[int, dict[str, SampleAnswer]] = {}
    outcomes: MetricOutcomes = {}
    is_whole = task.OUTPUT_TYPE == "loglikelihood_rolling"
    for arm, run in runs.items():
        for sample in run.samples:
            answers = [_json(one[0]) for one in sample["resps"]]
            if len(answers) > 1:  # of several continuations the log-likelihoods
                answers = [one[0] if isinstance(one, list) else one for one in answers]
            own = samples.setdefault(sample["doc_id"], {})
            own.setdefault(arm, SampleAnswer(answers[0] if len(answers) == 1 else answers, {}))
            for metric in sample["metrics"]:
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                own[arm].scores[name] = _json(sample[metric])
                by_arm = outcomes.setdefault(name, {}).setdefault(arm, {})
                by_arm[sample["doc_id"]] = sample_outcome(sample[metric], is_whole=is_whole)
        for name, value in run.values.items():
            metric, _, filtered = name.partition(",")
            if filtered and not metric.endswith("_stderr"):
                name = metric if filtered == "none" else name
                by_metric = metrics.setdefault(name, TaskMetric(better.get(metric), {}))
                by_metric.arms[arm] = MetricValue(_json(value))
    result = TaskResult(
        n=len(samples),
        output_type=task.OUTPUT_TYPE,
        fewshot=task.get_config("num_fewshot"),
        version=task.VERSION,
        metrics=metrics,
        account={arm: run.counts for arm, run in runs.items()},
        samples=tuple(TaskSample(doc_id, samples[doc_id]) for doc_id in sorted(samples)),
    )
    return result, outcomes


def _json(value: Any) -> Any:
    """JSON's own kinds of value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, Mapping):
        return {str(key): _json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_json(one) for one in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
