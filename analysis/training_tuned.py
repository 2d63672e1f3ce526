"""What chat tuning changed, as tables: losses on held-out conversations by source, and measures of the answers' style.

The run's last row of held-out conversations, and style.json where answers were written, have them with 95% intervals over
questions.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaxis.analysis.training_record import Row
from personaxis.persona.store import read_json

NAMES = {"teacher": "teacher", "before": "untuned", "after": "tuned"}
Table = dict[str, Any]


def losses_by_source(held_out: Sequence[Row]) -> Table | None:
    """Loss of the first and the last evaluation that tell sources apart; None where none does."""
    rows = [row["sources"] for row in held_out if row.get("sources")]
    if not rows:
        return None
    first, last = rows[0], rows[-1]
    lines = [
        [name, _shown(first.get(name), "loss"), _shown(one, "loss"), *_counts(one)]
        for name, one in last.items()
        if name == "all" or len(last) > 2  # a lone source is all of them
    ]
    return {"columns": ["conversations", "before", "now", "n", "known", "tokens"], "rows": lines}


def _counts(found: Mapping[str, Any]) -> list[str]:
    known = f"{found['met'] / found['conversations']:.0%}" if "met" in found else "·"
    return [f"{found['conversations']:,}", known, f"{found['tokens']:,}"]


def style(folder: Path) -> Table | None:
    """Measures of the teacher's, the untuned and the tuned model's answers to held-out questions, over all roles."""
    path = folder / "style.json"
    if not path.is_file():
        return None
    record = read_json(path)
    told = record.get("measures") or {}
    measures = {
        who: told[who]["all"] for who in [*NAMES, *sorted(set(told) - set(NAMES))] if "all" in told.get(who, {})
    }
    if not measures:
        return None
    names = list(dict.fromkeys(name for found in measures.values() for name in found))
    rows = [[name, *(_shown(found.get(name), "value") for found in measures.values())] for name in names]
    columns = ["measure", *(NAMES.get(who, who) for who in measures)]
    return {"columns": columns, "rows": rows, "questions": record.get("questions")}


def _shown(found: Mapping[str, Any] | float | None, name: str) -> str:
    if found is None:
        return "·"
    if not isinstance(found, Mapping):
        return f"{found:.2f}"
    digits = 1 if found[name] >= 10 else 3 if name == "loss" else 2
    known = "" if found.get("low") is None else f" [{found['low']:.{digits}f}, {found['high']:.{digits}f}]"
    return f"{found[name]:.{digits}f}{known}"
