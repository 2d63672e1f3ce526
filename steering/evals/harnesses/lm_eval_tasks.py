"""Tasks of EleutherAI's lm-eval harness by name, without a network where their data are local.

    tasks = load_tasks(["ifeval"], {"ifeval": Path("ifeval.jsonl")})      # {"ifeval": lm-eval's own Task over that file}

A built-in task is pointed at a JSONL file by a small YAML that includes the task's own and changes where its rows come from,
so that prompts, filters and metrics stay lm-eval's. Few-shot examples then come from the same rows, never the asked one.
"""

import importlib.util
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from personatlas.persona.errors import UserError

TEMPLATES = ("doc_to_text", "doc_to_target", "doc_to_choice")
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # what a task may call its longest answer
READER = "personatlas.steering.evals.harnesses.lm_eval_tasks.local_rows"


def require_lm_eval() -> None:
    """Raises `UserError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install personatlas[lm-eval]")


def load_tasks(names: Sequence[str], data: Mapping[str, Path], folder: Path | None = None) -> dict[str, Any]:
    """lm-eval's tasks by name, groups and tags taken apart. `folder` holds task YAMLs of one's own, which go first; `data` are
    JSONL files to read in place of a task's own data.

    Raises `UserError` for names that are not there, data that cannot be read, and columns that a task needs and they lack.
    """
    require_lm_eval()
    require_asked(names, data, folder)
    manager = _manager(names, folder)
    unknown = [name for name in names if name not in manager.task_index]
    if unknown:
        near = get_close_matches(unknown[0], list(manager.task_index), 3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        where = f" nor in {folder}" if folder is not None else ""
        raise UserError(f"task {unknown[0]!r} is not among lm-eval's own{where}{hint}")
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            spec = name
            if name in data:
                spec = str(_pointed(name, manager.task_index[name].yaml_path, data[name], Path(place)))
            found |= _loaded(manager, name, spec)
    return found


def local_rows(file: str, splits: Sequence[str], **_: Any) -> Any:
    """The rows of a JSONL file as a dataset under each of `splits`. Called by lm-eval, by the name in `READER`."""
    import datasets

    rows = read_rows(Path(file))
    columns = {
        name: [row.get(name) for row in rows] for name in dict.fromkeys(key for row in rows for key in row)
    }
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(columns) for split in splits})


def require_asked(names: Sequence[str], data: Mapping[str, Path], folder: Path | None) -> None:
    """Raises `UserError` for what can be seen to be wrong before anything is loaded."""
    if not names:
        raise UserError("no task is named: give lm-eval's names with commas between, such as ifeval,gsm8k")
    if folder is not None and not folder.is_dir():
        raise UserError(f"--tasks-folder {folder} is not a folder")
    for name, file in data.items():
        if name not in names:
            raise UserError(f"--data {name}={file} is for a task that is not asked for ({', '.join(names)})")
        if not file.is_file():
            raise UserError(f"--data {name}={file}: the file does not exist")
        if not read_rows(file):
            raise UserError(f"--data {name}={file} is empty: it must hold one JSON object a line")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The JSON objects of a user's JSONL file, which may lack its last newline. Raises `UserError` with the line's number."""
    rows = []
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}:{number} is not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(
                f"{file}:{number} is a JSON {type(row).__name__}, not an object: it must be one object a line"
            )
        rows.append(row)
    return rows


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """An index that holds the names, if there is one. To read all 14,000 built-in YAMLs takes 15 s: those that are called
    NAME.yaml are tried first."""
    import lm_eval.tasks
    from lm_eval.tasks import TaskManager

    own = [str(folder)] if folder is not None else []
    built_in = Path(lm_eval.tasks.__file__).parent
    wanted = {f"{name}.yaml" for name in names}
    likely = sorted({str(path.parent) for path in built_in.rglob("*.yaml") if path.name in wanted})
    few = TaskManager(include_defaults=False, include_path=[*likely, *own])
    if all(name in few.task_index for name in names):
        return few
    return TaskManager(include_path=own or None)


def _pointed(name: str, base: Path | None, file: Path, place: Path) -> Path:
    """A YAML that is the task at `base` over the rows of `file`."""
    import yaml

    config = _config(Path(base)) if base is not None else {}
    if "class" in config or not isinstance(config.get("task"), str) or "output_type" not in config:
        raise UserError(f"--data {name}={file}: {name} is no plain YAML task of its own; name one of its tasks, or write a YAML into --tasks-folder")  # fmt: skip
    columns = {key for row in read_rows(file) for key in row}
    missing = sorted(_columns_needed(config) - columns)
    if missing:
        raise UserError(f"--data {name}={file} has no column {missing[0]!r}, which the task {name} needs; it has {', '.join(sorted(columns))}")  # fmt: skip
    split = (
        config.get("test_split") or config.get("validation_split") or config.get("training_split") or "test"
    )
    examples = config.get("fewshot_config") or {}
    overlay: dict[str, Any] = {
        "include": str(base),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
    }
    overlay |= {"training_split": None, "validation_split": None, "test_split": split}
    overlay["fewshot_split"] = None if examples.get("samples") else split
    overlay["dataset_kwargs"] = {
        "file": str(file.resolve()),
        "splits": sorted({split, examples.get("split") or split}),
    }
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump(overlay) + f"custom_dataset: !function {READER}\n", encoding="utf-8")
    return path


def _config(path: Path) -> dict[str, Any]:
    """A task's YAML with what it includes, its functions as None."""
    import yaml

    class Plain(yaml.SafeLoader):
        pass

    Plain.add_constructor("!function", lambda loader, node: None)
    own = yaml.load(path.read_text(encoding="utf-8"), Plain)
    included = own.pop("include", [])
    merged: dict[str, Any] = {}
    for base in [included] if isinstance(included, str) else included:
        merged |= _config(path.parent / base)
    return merged | own


def _columns_needed(config: Mapping[str, Any]) -> set[str]:
    """Columns that the templates name. A task with `process_docs` makes columns of its own, so nothing is said of it."""
    from jinja2 import Environment, TemplateError, meta

    needed: set[str] = set()
    for template in (config.get(name) for name in TEMPLATES):
        if not isinstance(template, str) or config.get("process_docs", "") is None:
            continue
        if re.fullmatch(r"\w+", template):
            needed.add(template)
            continue
        try:
            needed |= meta.find_undeclared_variables(Environment().parse(template))
        except TemplateError:
            continue  # lm-eval will say so itself
    return needed


def _loaded(manager: Any, name: str, spec: str) -> dict[str, Any]:
    from datasets.exceptions import DatasetsError
    from jinja2 import UndefinedError

    try:
        return dict(manager.load([spec])["tasks"])
    except (DatasetsError, OSError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"task {name}: its data cannot be read ({reason[:300]}); give a local copy with --data {name}=FILE.jsonl") from None  # fmt: skip
    except UndefinedError as error:
        raise UserError(f"task {name}: its data lack a column that its YAML names ({error})") from None
