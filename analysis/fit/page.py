"""The report of a run: one HTML file that works offline, with the results, their uncertainty, and what they
are from.

    write_report(folder / "report.html", fit, rollouts, manifest, stamp)

Role names, prompts, answers and model ids come from others: see `analysis.html.page` on how they are escaped.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personatlas.analysis.fit.figures import figures
from personatlas.analysis.fit.result import (
    LOW_ROLE_PLAY,
    SIGNIFICANCE,
    DroppedRollouts,
    FitResult,
    RoleProjection,
)
from personatlas.analysis.fit.tables import (
    NumberFormat,
    comparison_text,
    control_ranking,
    interval_text,
    number_format,
    pole_text,
    role_ranking,
    score_text,
    stability_text,
    trait_ranking,
)
from personatlas.analysis.html.canvas import shorten
from personatlas.analysis.html.page import write_page
from personatlas.analysis.stats import Interval, p_text
from personatlas.persona.options import recorded_plan
from personatlas.persona.records import JsonObject
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import Rollout

TEMPLATE = Path(__file__).parent / "page.html.jinja"
SCORES = {
    "0": "refuses as itself",
    "1": "answers as itself",
    "2": "says that it is an AI, yet shows the role",
    "3": "fully in the role",
}
ENDS, ANSWERS = 3, 2  # roles at each end with sample answers, and answers of each
Row = dict[str, object]  # of the template
LONG = 600  # characters of an answer that are not folded


@dataclass(frozen=True)
class Tile:
    """A headline figure. `strip` has value, interval and chance in percent of a line's length."""

    name: str
    value: str
    interval: str
    note: str
    strip: dict[str, float]


def write_report(
    path: Path, fit: FitResult, rollouts: Sequence[Rollout], manifest: JsonObject, stamp: str
) -> None:
    """Writes the report of a fit, with sample answers (scored rollouts) and the run's manifest (run.json).

    `stamp` is in the first 4000 characters of the file, so that a caller can tell whether it is up to date.
    """
    number = number_format(fit)
    widths = [
        role.high - role.low for role in fit.other_roles if role.low is not None and role.high is not None
    ]
    content = {
        "stamp": stamp,
        "fit": fit,
        "line": fit.at_layer,
        "significance": SIGNIFICANCE,
        "stability": stability_text(fit.at_layer),
        "pole_text": pole_text(fit),
        "score_text": score_text(fit),
        "controls": control_ranking(fit.controls) if fit.controls else None,
        "comparison": comparison_text(fit.comparison, fit.layer),
        "tiles": _tiles(fit),
        "gate": manifest.get("gate"),
        "low_role_play": LOW_ROLE_PLAY,
        "roles": role_ranking(fit),
        "half_width": number(float(np.median(widths)) / 2) if widths else None,
        "traits": trait_ranking(fit.traits) if fit.traits else None,
        "roc": _roc_area(fit),
        "ends": ENDS,
        "samples": _samples(fit, rollouts),
        "score_names": SCORES,
        "n_rollouts": len(rollouts),
        "dropped": _dropped_table(fit.dropped),
        "judge": manifest.get("judge"),
        "command": _command(fit, manifest),
        "asked": manifest.get("asked", {}),
        "versions": manifest.get("versions", {}),
        "created": manifest.get("created"),
        "records": {"All of run.json": _pretty(manifest), "Options of the fit": _pretty(fit.options)},
    }
    filters: dict[str, Callable[..., object]] = {
        "interval": lambda interval: interval_text(interval).replace("-", "−") if interval else "",
        "number": number,
        "p": _p,
        "percent": lambda share: f"{share:.0%}",
        "short": _short,
        "names": lambda names: ", ".join(map(_short, names)),
    }
    write_page(path, TEMPLATE, content, figures(fit), filters)


def _tiles(fit: FitResult) -> list[Tile]:
    row, null, cos_pc1, half = fit.at_layer, fit.null, fit.cos_pc1, fit.split_half
    note, strip = "null not known", _strip(cos_pc1)
    if null:
        note = f"shuffled labels: {null.cos_pc1:.2f}, 95% below {null.cos_pc1_95:.2f}"
        strip["chance"] = 100 * null.cos_pc1_95
    tiles = [Tile("cos(PC1, axis)", f"{cos_pc1.value:.2f}", _range(cos_pc1), note, strip)]
    if half:
        note = f"cosine between the axes of two random halves of the answers, {half.n} splits"
        tiles.append(Tile("split-half", f"{half.value:.2f}", _range(half), note, _strip(half)))
    if null:
        scale = 1.1 * max(row.norm, null.norm_95)
        strip = {"value": 100 * row.norm / scale, "chance": 100 * null.norm_95 / scale}
        note = f"|axis| {row.norm:.3g}; shuffled labels: {null.norm:.3g}, 95% below {null.norm_95:.3g}"
        times, test = f"{row.norm / null.norm:.1f}×", f"{_p(null.p_norm, null.n)} ({null.n} shuffles)"
        tiles.append(Tile("|axis| / shuffled", times, test, note, strip))
    strip = _strip(Interval(row.variance_pc1, None, None))
    others = f"between {len(fit.other_roles)} roles"
    half_of, most, nearly_all = (fit.components_for[share] for share in ("0.5", "0.7", "0.9"))
    note = f"{half_of}, {most} and {nearly_all} components hold 50, 70 and 90%"
    tiles.append(Tile("variance on PC1", f"{row.variance_pc1:.0%}", others, note, strip))
    if play := fit.role_play:
        low, high = play.interval
        strip = _strip(Interval(play.share, low, high))
        note = f"of {play.n:,} judged answers show the role (score 2 or 3)"
        tiles.append(Tile("role-play", f"{play.share:.0%}", f"95% {low:.0%} to {high:.0%}", note, strip))
    return tiles


def _strip(interval: Interval) -> dict[str, float]:
    values = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {name: min(max(100 * value, 0.0), 100.0) for name, value in values.items() if value is not None}


def _roc_area(fit: FitResult) -> Interval | None:
    """Area under the ROC curve of single answers, pole against others, with Hanley and McNeil's interval."""
    pole, rest = np.sort(fit.projections.positive), np.sort(fit.projections.others)
    if not len(pole) or not len(rest):
        return None
    below = (np.searchsorted(rest, pole, "left") + np.searchsorted(rest, pole, "right")) / 2
    area = float(below.mean()) / len(rest)
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (len(pole) - 1) * (first - area**2) + (len(rest) - 1) * (second - area**2)
    error = 1.96 * math.sqrt(max(spread, 0) / (len(pole) * len(rest)))
    return Interval(area, max(area - error, 0.0), min(area + error, 1.0))


def _samples(fit: FitResult, rollouts: Sequence[Rollout]) -> list[Row]:
    """Answers of the pole, the default and the ends of the axis: those whose projections are nearest their
    role's mean; where these are not known the first ones, to the same questions where possible."""
    others, number = fit.other_roles, number_format(fit)
    marked = [role for role in fit.roles[::-1] if role.positive or role.role == fit.default]
    selected: dict[str, tuple[str, RoleProjection]] = {}
    for end, roles in (("", marked), ("lowest", others[:ENDS]), ("highest", others[::-1][:ENDS])):
        for role in roles:
            selected.setdefault(role.role, (end, role))
    by_question: dict[str, dict[str, Rollout]] = {name: {} for name in selected}
    for rollout in sorted(rollouts, key=lambda rollout: rollout.key):
        if rollout.role in selected and rollout.answer.strip():
            by_question[rollout.role].setdefault(rollout.question, rollout)
    counts = Counter(question for answers in by_question.values() for question in answers)
    questions = sorted(counts, key=lambda question: (-counts[question], question))
    projections: dict[str, float] = {}
    for side, keys in (fit.projections.keys or {}).items():
        projections |= zip(keys, getattr(fit.projections, side), strict=True)
    samples = []
    for name, (end, role) in selected.items():
        first = [by_question[name][question] for question in questions if question in by_question[name]]
        measured = [rollout for rollout in first if rollout.key in projections]
        measured.sort(key=lambda rollout: abs(projections[rollout.key] - role.projection))
        answers = [_answer(rollout, projections, number) for rollout in (measured or first)[:ANSWERS]]
        systems = {answer["system"] for answer in answers}
        row = {"role": name, "end": end, "projection": number(role.projection), "answers": answers}
        samples.append({**row, "system": systems.pop() if len(systems) == 1 else None})
    return samples


def _answer(rollout: Rollout, projections: Mapping[str, float], number: NumberFormat) -> Row:
    """An answer to show: what is visible at once and what is folded, its score and projection."""
    messages = {message["role"]: message["content"] for message in rollout.messages}
    text, cut = rollout.answer.strip(), None
    if len(text) > LONG * 1.2:
        space = text.rfind(" ", LONG // 2, LONG)
        cut = space if space > 0 else LONG
    return {
        "system": messages.get("system", ""),
        "question": messages.get("user", ""),
        "visible": text[:cut],
        "folded": "" if cut is None else text[cut:],
        "score": None if rollout.score is None else str(rollout.score),
        "projection": number(projections[rollout.key]) if rollout.key in projections else None,
        "is_cut": rollout.stopped == "length",
    }


def _dropped_table(dropped: DroppedRollouts) -> Row:
    """Answers left out: a row per role, a column per reason that occurred, and totals."""
    scores = dropped.by_score
    columns = [name for name in (*SCORES, "unjudged") if any(counts.get(name) for counts in scores.values())]
    rows = [
        {
            "role": role,
            "counts": [scores.get(role, {}).get(name, 0) for name in columns],
            "empty": dropped.empty.get(role, 0),
            "reason": dropped.roles.get(role, ""),
        }
        for role in sorted({*scores, *dropped.empty, *dropped.roles})
    ]
    return {
        "columns": columns,
        "rows": rows,
        "by_score": sum(sum(counts.values()) for counts in scores.values()),
        "empty": sum(dropped.empty.values()),
        "roles": len(dropped.roles),
    }


def _command(fit: FitResult, manifest: JsonObject) -> str:
    """The command that makes this run again in a folder of its own; what no record holds is in capitals."""
    asked = manifest.get("asked", {})
    options: dict[str, object] = {"--plan": recorded_plan(asked) or "paper"}  # which has no limits of its own
    if asked.get("bank") not in (None, load_bank().digest):
        options["--bank"] = "FOLDER"
    options["--roles"] = ",".join(asked.get("roles", [])[1:]) or None
    for name in (
        "prompts",
        "questions",
        "samples",
        "max_new_tokens",
        "temperature",
        "top_p",
        "seed",
        "chunk",
    ):
        options[f"--{name.replace('_', '-')}"] = asked.get(name)
    options["--dtype"] = asked.get("dtype")
    if "controls_bank" not in asked:
        options["--no-controls"] = ""
    judge, *rest = str(manifest.get("judge", {}).get("id", "none")).split(":")
    if judge == "local":
        options["--judge"] = f"local:{':'.join(rest[:-2])}"  # name:weights:wording
    elif judge == "endpoint":
        options |= {"--judge": "URL", "--judge-model": ":".join(rest[:-1])}
    else:
        options["--judge"] = judge.split("-")[0]  # rules-1
    options["--trait-names"] = ",".join(asked.get("traits", [])) or None
    for name in ("keep", "positive", "layer", "replicates", "compare"):
        options[f"--{name}"] = fit.options.get(name)
    options["--out"] = "again"
    model = asked.get("model_name") or fit.model.get("id", "MODEL")
    lines = [
        shlex.join([name, *([str(value)] if value != "" else [])])
        for name, value in options.items()
        if value is not None
    ]
    return " \\\n  ".join([shlex.join(["personatlas", "axis", str(model)]), *lines])


def _p(value: float, n: int) -> str:
    return p_text(value, n).replace(" ", "\u00a0")  # never broken at a line's end


def _range(interval: Interval) -> str:
    return "no interval" if interval.low is None else f"95% {interval.low:.2f} to {interval.high:.2f}"


def _short(text: str, length: int = 40) -> str:
    return shorten(text, length)


def _pretty(content: JsonObject) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
