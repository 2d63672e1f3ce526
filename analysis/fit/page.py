"""The report of a run: one HTML file that works offline and says what was found, how sure it is, and from what.

    write_report(folder / "report.html", fit, rollouts, manifest, stamp)

Role names, prompts, answers and model ids come from others: the template escapes all of them, figures carry them as
JSON without markup, and the page's own policy runs no script but the three written here and loads nothing at all.
"""

import json
import math
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from personatlas.analysis.fit.figures import figures
from personatlas.analysis.fit.tables import number_format, ranking, say_compared, stability, trait_ranking
from personatlas.analysis.html.page import write_page
from personatlas.persona.roles.bank import load_bank
from personatlas.persona.rollout import Rollout

HERE = Path(__file__).parent
SCORES = {
    "0": "refuses as itself",
    "1": "answers as itself",
    "2": "says that it is an AI, yet shows the role",
    "3": "fully in the role",
}
ENDS, ANSWERS, LONG = (
    3,
    2,
    600,
)  # roles at each end, answers a role, and letters of an answer that are shown at once
HARDLY = 0.25  # a share of role-play below this is said aloud
SURE = 0.05  # p-values above this are called chance

Row = dict[str, Any]


def write_report(
    path: Path, fit: dict[str, Any], rollouts: Sequence[Rollout], manifest: dict[str, Any], stamp: str
) -> None:
    """Write the report of a fit (fit.json) with sample answers (scored rollouts) and the run's manifest (run.json).

    `stamp` is found in the first 4000 characters of the file, so that a caller can tell whether it is up to date.
    """
    content = _content(fit, rollouts, manifest, stamp)
    write_page(
        path, HERE / "page.html.jinja", content, figures(fit), {"interval": _interval, "short": _short}
    )


def _content(
    fit: dict[str, Any], rollouts: Sequence[Rollout], manifest: dict[str, Any], stamp: str
) -> dict[str, Any]:
    line = next(line for line in fit["layers"] if line["layer"] == fit["layer"])
    return {
        "stamp": stamp,
        "fit": fit,
        "line": line,
        "others": len(fit["roles"]) - 1,
        "verdict": _verdict(fit, line),
        "stable": stability(line),
        "tiles": _tiles(fit, line),
        "gate": manifest.get("gate"),
        "hardly": HARDLY,
        "ranking": ranking(fit),
        "traits": trait_ranking(fit["traits"]) if fit.get("traits") else None,
        "says": {"roles": _say_roles(fit), "layers": _say_layers(fit), "answers": _say_answers(fit)}
        | {"curve": _say_curve(fit), "traits": _say_traits(fit), "compared": say_compared(fit)},
        "samples": _samples(fit, rollouts),
        "score_names": SCORES,
        "n_rollouts": len(rollouts),
        "dropped": _dropped(fit["dropped"]),
        "judge": manifest.get("judge"),
        "command": _command(fit, manifest),
        "asked": manifest.get("asked", {}),
        "versions": manifest.get("versions", {}),
        "created": manifest.get("created"),
        "records": {
            "All of run.json": _pretty(manifest),
            "What the fit was asked for": _pretty(fit["asked"]),
        },
    }


def _verdict(fit: dict[str, Any], line: dict[str, Any]) -> str:
    """What the layer to use says about the two questions: do the poles differ, and is their difference the main one?"""
    pole, others, null = _short(fit["positive"]), len(fit["roles"]) - 1, line.get("null")
    if null is None:
        return (
            f"At layer {fit['layer']} the cosine between PC1 of {others} roles and the axis is {line['cos_pc1']:.2f}; what "
            "chance would give is not known: no rollout means were kept there, or no replicates were asked for."
        )
    norm, cos, times = _p(null["p_norm"]), _p(null["p_cos_pc1"]), line["norm"] / null["norm"]
    if null["p_norm"] > SURE:
        return (
            f"At layer {fit['layer']} “{pole}” is no further from the {others} other roles than shuffled labels would put "
            f"it ({norm}): nothing here tells an axis from chance."
        )
    apart = (
        f"At layer {fit['layer']} “{pole}” stands apart from the {others} other roles, {times:.1f} times as far as shuffled "
        f"labels would put it ({norm})"
    )
    if null["p_cos_pc1"] > SURE:
        return (
            f"{apart}. But the main direction between the roles (PC1) does not point to it more than chance would ({cos}): "
            "use the axis, and do not take PC1 for it."
        )
    return f"{apart}, and the main direction between the roles (PC1) points to it ({cos})."


class Tile(NamedTuple):
    """A headline figure. `strip` places value, interval and chance on a line, in percent of its length."""

    name: str
    value: str
    interval: str
    note: str
    strip: dict[str, float]


def _tiles(fit: dict[str, Any], line: dict[str, Any]) -> list[Tile]:
    null, cos, half = line.get("null"), line.get("cos_pc1_by_roles"), line.get("split_half")
    note = (
        f"shuffled labels: {null['cos_pc1']:.2f}, 95% below {null['cos_pc1_95']:.2f}"
        if null
        else "chance not known"
    )
    strip = _strip(line["cos_pc1"], cos) | ({"chance": 100 * null["cos_pc1_95"]} if null else {})
    tiles = [Tile("cos(PC1, axis)", f"{line['cos_pc1']:.2f}", _range(cos), note, strip)]
    if half:
        note = f"cosine between the axes of two random halves of the answers, {half['n']} splits"
        tiles.append(
            Tile("split-half", f"{half['value']:.2f}", _range(half), note, _strip(half["value"], half))
        )
    if null:
        scale = 1.1 * max(line["norm"], null["norm_95"])
        strip = {"value": 100 * line["norm"] / scale, "chance": 100 * null["norm_95"] / scale}
        note = (
            f"|axis| {line['norm']:.3g}; shuffled labels: {null['norm']:.3g}, 95% below {null['norm_95']:.3g}"
        )
        times, of = f"{line['norm'] / null['norm']:.1f}×", f"{_p(null['p_norm'])} ({null['n']} shuffles)"
        tiles.append(Tile("|axis| / shuffled", times, of, note, strip))
    counts, others = fit["components_for"], len(fit["roles"]) - 1
    note = f"{counts['0.5']}, {counts['0.7']} and {counts['0.9']} components hold 50, 70 and 90%"
    place = _strip(line["variance_pc1"], None)
    tiles.append(
        Tile("variance on PC1", f"{line['variance_pc1']:.0%}", f"between {others} roles", note, place)
    )
    if share := fit.get("role_play"):
        low, high = share["interval"]
        place = _strip(share["share"], {"low": low, "high": high})
        note = f"of {share['n']:,} judged answers show the role (score 2 or 3)"
        tiles.append(Tile("role-play", f"{share['share']:.0%}", f"95% {low:.0%} to {high:.0%}", note, place))
    return tiles


def _strip(value: float, interval: Row | None) -> dict[str, float]:
    place = {"value": value} | ({"low": interval["low"], "high": interval["high"]} if interval else {})
    return {name: min(max(100 * number, 0), 100) for name, number in place.items()}


def _say_roles(fit: dict[str, Any]) -> str:
    others, show = [role for role in fit["roles"] if not role["positive"]], number_format(fit)
    pole = next(role for role in fit["roles"] if role["positive"])
    name, below = _short(pole["role"]), sum(role["projection"] < pole["projection"] for role in others)
    ends = ", ".join(_short(role["role"]) for role in others[:ENDS])
    where = f"“{name}” lies at {show(pole['projection'])}, above {below} of {len(others)} roles; the lowest are {ends}."
    if "low" not in pole:
        return f"{where} No rollout means were kept at this layer, so how sure each place is cannot be said."
    apart = sum(role["high"] < pole["low"] for role in others)
    wide = float(np.median([role["high"] - role["low"] for role in others])) / 2
    return (
        f"{where} Intervals are 95% over a role's own answers, typically ±{show(wide)}, so neighbours are seldom told "
        f"apart; those of {apart} roles end below the interval of “{name}”."
    )


def _say_layers(fit: dict[str, Any]) -> str:
    if not any("null" in line for line in fit["layers"]):
        return (
            "Only the angle and the length are known: no rollout means were kept, or no replicates were asked for, so "
            "there are no intervals and no chance level."
        )
    return (
        "A layer is of use where the curves are high and clear of the grey, in which shuffled labels stay 95% of the time "
        "(dotted: their mean). Coloured bands are 95% intervals, over resampled roles for the cosine and over random splits "
        "for the halves."
    )


def _say_curve(fit: dict[str, Any]) -> str:
    found = fit.get("curve")
    if not found or not found["answers"]:
        return ""
    last, needed = found["cosines"][-1], found["needed"]
    there = f"With {found['answers'][-1]:.3g} answers a role, two axes have cosine {last['value']:.2f}"
    if needed is None:
        return f"{there}; nothing can be said of more."
    return (
        f"{there}; about {needed:,.0f} a role would make it {found['goal']} (dotted, by Spearman and Brown's rule). The pole's "
        "own answers are the scarcest: they are one side of the difference, and those of all other roles the other."
    )


def _say_traits(fit: dict[str, Any]) -> str:
    traits = fit.get("traits")
    if not traits:
        return ""
    rows, chance = traits["traits"], traits["chance"]
    ends = (
        ", ".join(_short(row["trait"]) for row in rows[:ENDS]),
        ", ".join(_short(r["trait"]) for r in rows[::-1][:ENDS]),
    )
    said = (
        f"Each trait is the difference between answers that show it and answers that show its opposite. Toward "
        f"“{fit['poles'][0]}” point {ends[1]}; away from it {ends[0]}."
    )
    if chance is not None:
        beyond = sum(abs(row["cosine"]) > chance for row in rows)
        said += f" {beyond} of {len(rows)} lie beyond ±{chance:.2f}, where 95% of traits with shuffled answers stay."
    if traits["judged"]:
        said += (
            f" {traits['other_side']:,} answers that did not show their side by the judge's score were dropped, and "
            f"{traits['unjudged']:,} that it gave no score."
        )
    if traits["left_out"]:
        said += f" Left out for want of answers: {', '.join(map(_short, traits['left_out']))}."
    counts = traits["components_for"]
    return (
        f"{said} {counts['0.5']}, {counts['0.7']} and {counts['0.9']} components hold 50, 70 and 90% of the variance between "
        f"traits; the first has cosine {traits['cos_pc1_axis']:.2f} with the axis."
    )


def _say_answers(fit: dict[str, Any]) -> str:
    """How well a single answer tells the pole from the rest: area under the ROC curve, Hanley and McNeil's interval."""
    ours, rest = (np.sort(fit["projections"].get(side, [])) for side in ("positive", "others"))
    if not len(ours) or not len(rest):
        return "No rollout means were kept at this layer, so single answers have no projection to show."
    below = (np.searchsorted(rest, ours, "left") + np.searchsorted(rest, ours, "right")) / 2
    area = float(below.mean()) / len(rest)
    first, second = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (len(ours) - 1) * (first - area**2) + (len(rest) - 1) * (second - area**2)
    error = 1.96 * math.sqrt(max(spread, 0) / (len(ours) * len(rest)))
    low, high = max(area - error, 0), min(area + error, 1)
    return (
        f"Of an answer of “{_short(fit['positive'])}” and one of another role, the first lies higher in {area:.0%} of pairs; "
        f"chance is 50%, and the 95% interval {low:.0%} to {high:.0%} if answers are independent."
    )


def _samples(fit: dict[str, Any], rollouts: Sequence[Rollout]) -> list[Row]:
    """Answers of the pole, the default and the ends, to the same questions where they can be: the first, not chosen."""
    others = [role for role in fit["roles"] if not role["positive"]]
    marked = [role for role in fit["roles"][::-1] if role["positive"] or role["role"] == fit["default"]]
    ends = [("", marked), ("lowest", others[:ENDS]), ("highest", others[::-1][:ENDS])]
    wanted: dict[str, tuple[str, Row]] = {}
    for end, roles in ends:
        for role in roles:
            wanted.setdefault(role["role"], (end, role))
    own: dict[str, dict[str, Rollout]] = {name: {} for name in wanted}
    for rollout in sorted(rollouts, key=lambda rollout: rollout.key):
        if rollout.role in own and rollout.answer.strip():
            own[rollout.role].setdefault(rollout.question, rollout)
    asked = Counter(question for answers in own.values() for question in answers)
    same = sorted(asked, key=lambda question: (-asked[question], question))
    places, show = _places(fit), number_format(fit)
    found = []
    for name, (end, role) in wanted.items():
        taken = [own[name][question] for question in same if question in own[name]][:ANSWERS]
        answers = [_sample(rollout, places.get(rollout.key), show) for rollout in taken]
        systems = {answer["system"] for answer in answers}
        row = {"role": name, "end": end, "projection": show(role["projection"]), "answers": answers}
        found.append({**row, "system": systems.pop() if len(systems) == 1 else None})
    return found


def _places(fit: dict[str, Any]) -> dict[str, float]:
    """Projections of single rollouts by key, where the fit names the keys of its projections."""
    found: dict[str, float] = {}
    for side, keys in fit["projections"].get("keys", {}).items():
        found |= zip(keys, fit["projections"][side], strict=True)
    return found


def _sample(rollout: Rollout, place: float | None, show: Any) -> Row:
    said = {message["role"]: message["content"] for message in rollout.messages}
    return {
        "key": rollout.key,
        "system": said.get("system", ""),
        "question": said.get("user", ""),
        "answer": _parts(rollout.answer.strip()),
        "score": None if rollout.score is None else str(rollout.score),
        "projection": None if place is None else show(place),
        "cut": rollout.stopped == "length",
    }


def _parts(text: str) -> tuple[str, str]:
    """What is shown of an answer and what is folded away, parted at a space."""
    if len(text) <= LONG * 1.2:
        return text, ""
    end = text.rfind(" ", LONG // 2, LONG)
    return text[: end if end > 0 else LONG], text[end if end > 0 else LONG :]


def _dropped(dropped: dict[str, Any]) -> dict[str, Any]:
    """Answers left out as a table: a row a role, a column a reason that occurred."""
    scores, empty, whole = dropped.get("by_score", {}), dropped.get("empty", {}), dropped.get("roles", {})
    columns = [name for name in (*SCORES, "unjudged") if any(counts.get(name) for counts in scores.values())]
    rows = []
    for role in sorted({*scores, *empty, *whole}):
        counts = [scores.get(role, {}).get(name, 0) for name in columns]
        rows.append({"role": role, "counts": counts, "empty": empty.get(role, 0), "why": whole.get(role, "")})
    by_score = sum(sum(counts.values()) for counts in scores.values())
    return {
        "columns": columns,
        "rows": rows,
        "by_score": by_score,
        "empty": sum(empty.values()),
        "whole": len(whole),
    }


def _command(fit: dict[str, Any], manifest: dict[str, Any]) -> str:
    """The command that makes this run again in a folder of its own; what no record holds is in capitals."""
    asked, fitted = manifest.get("asked", {}), fit["asked"]
    options: dict[str, Any] = {
        "--plan": "paper"
    }  # the plan without limits of its own: all that it had follows
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
        "dtype",
    ):
        options[f"--{name.replace('_', '-')}"] = asked.get(name)
    judge, *rest = str(manifest.get("judge", {}).get("id", "none")).split(":")
    if judge == "local":
        options["--judge"] = f"local:{':'.join(rest[:-2])}"  # name:weights:wording
    elif judge == "endpoint":
        options |= {"--judge": "URL", "--judge-model": ":".join(rest[:-1])}
    else:
        options["--judge"] = judge.split("-")[0]  # rules-1
    options["--trait-names"] = ",".join(asked.get("traits", [])) or None
    for name in ("keep", "positive", "layer", "replicates", "compare"):
        options[f"--{name}"] = fitted.get(name)
    model = asked.get("model_name") or (fit.get("model") or {}).get("id", "MODEL")
    options["--out"] = "again"
    lines = [shlex.join([name, str(value)]) for name, value in options.items() if value is not None]
    return " \\\n  ".join([shlex.join(["personatlas", "axis", str(model)]), *lines])


def _p(value: float) -> str:
    return f"p\u00a0=\u00a0{value:.2g}"  # never parted at a line's end


def _range(interval: Row | None) -> str:
    return "no interval" if interval is None else f"95% {interval['low']:.2f} to {interval['high']:.2f}"


def _interval(value: Row | None) -> str:
    return (
        ""
        if value is None
        else f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]".replace("-", "−")
    )


def _short(text: str, length: int = 40) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _pretty(content: Any) -> str:
    return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False)
