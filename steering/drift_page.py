"""The page of a drift study: where conversations go, what a cap changes, when an alarm comes, and what predicts the next turn."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from personaxis.analysis.figures_drift import alarms_on, conversation, differences, trajectories
from personaxis.analysis.page import write_page
from personaxis.steering.arms import AS_IT_IS
from personaxis.steering.drift_result import ADAPTIVE, ALL, CAPPED

HERE = Path(__file__).parent
FARTHEST, DEEPEST = 4.0, 55  # the z at which a turn's colour is full, and how full that is (percent)


def write_drift_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of drift.json's content."""
    baseline, span = content["watch"]["baseline"], _span(content)

    def in_order(rows: Mapping[str, Any]) -> dict[str, Any]:  # a file's names are sorted
        return {arm: rows[arm] for arm in content["arms"] if arm in rows}

    figures: dict[str, Any] = {
        f"turns-{number}": trajectories(in_order(content["trajectories"][domain]), baseline, span)
        for number, domain in enumerate(content["domains"])
    }
    if len(content["arms"]) > 1:
        figures["differences"] = differences(in_order(content["differences"][ALL]))
    if content["alarms"]:
        figures["alarms"] = alarms_on({arm: row["on"] for arm, row in in_order(content["alarms"][ALL]).items()})
    for number, one in enumerate(content["examples"]):
        numbered = {
            arm: [{**row, "turn": n} for n, row in enumerate(own, 1)] for arm, own in in_order(one["arms"]).items()
        }
        figures[f"example-{number}"] = conversation(numbered, baseline)
    shown = {
        "c": content,
        "tiles": _tiles(content),
        "rows": [*content["domains"], *([ALL] if len(content["domains"]) > 1 else [])],
        "examples": [_example(one) for one in content["examples"]],
        "targets": {name: row for name, row in (content["next_turn"] or {}).items() if isinstance(row, Mapping)},
    }
    filters: dict[str, Callable[..., Any]] = {
        "percent": _percent,
        "span": span_of,
        "share": _share,
        "alarm": lambda row: _share({**row, "share": row["false_alarms"]}),
    }
    write_page(path, HERE / "drift.html.jinja", shown, figures, filters)


def _span(content: Mapping[str, Any]) -> tuple[float, float]:
    """One range for all domains, so that they can be compared."""
    values = [
        row[name]
        for by_arm in content["trajectories"].values()
        for rows in by_arm.values()
        for row in rows
        for name in ("mean", "low", "high")
        if row[name] is not None
    ]
    values.append(content["watch"]["baseline"]["mean"])
    room = 0.06 * (max(values) - min(values) or 1.0)
    return min(values) - room, max(values) + room


def _tiles(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The steepest domain, and what each arm does to its answers and to all."""
    slopes = {d: own[AS_IT_IS] for d, own in content["slopes"].items() if d != ALL and own[AS_IT_IS]}
    tiles = []
    if slopes:
        domain = min(slopes, key=lambda d: slopes[d]["value"])
        row = slopes[domain]
        note = f"slope a turn in {domain or 'all'}, as it is; {row['n']} conversations, shuffled turns within ±{row['chance']:.1f}"
        tiles.append(
            {"name": "steepest drift", "value": f"{row['value']:+.1f}", "interval": _interval(row), "note": note}
        )
    plain = content["means"][ALL][AS_IT_IS]
    tiles.append({"name": "mean, as it is", "value": f"{plain['value']:.1f}", "interval": _interval(plain), "note": f"projection of {plain['n']} answers"})  # fmt: skip
    for arm in content["arms"][1:]:
        row, wrote = content["means"][ALL][arm], content["wrote"][arm]
        note = f"on average over its answers; the cap acted on {_percent(wrote['acted'])} of them, fired on {_percent(wrote['fired'])}"
        change = row["change"]
        tiles.append({"name": f"mean, {arm}", "value": f"{row['value']:.1f}", "interval": f"{change['value']:+.1f} {_interval(change)}", "note": note})  # fmt: skip
    return [{name: text.replace("-", "−") if name != "note" else text for name, text in tile.items()} for tile in tiles]


def _interval(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"[{row['low']:+.1f}, {row['high']:+.1f}]"


def _example(one: Mapping[str, Any]) -> dict[str, Any]:
    """A conversation as columns: as it is beside the arm that reacts, or else the capped one."""
    other = next((arm for arm in (ADAPTIVE, CAPPED) if arm in one["arms"]), None)
    arms = [AS_IT_IS, *([other] if other else [])]
    length = max(len(one["arms"][arm]) for arm in arms)
    turns = []
    for turn in range(length):
        cells = [shaded(own[turn]) if turn < len(own := one["arms"][arm]) else None for arm in arms]
        turns.append({"asked": list(dict.fromkeys(cell["user"] for cell in cells if cell)), "cells": cells})
    return {"name": one["name"], "domain": one["domain"], "arms": arms, "turns": turns}


def shaded(row: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with its colour: the farther from the calm mean, the deeper, on the side where it lies."""
    z = row["z"] or 0.0
    depth = round(min(abs(z), FARTHEST) / FARTHEST * DEEPEST)
    return {**row, "side": "positive" if z >= 0 else "others", "depth": depth}


def span_of(row: Mapping[str, Any] | None, form: str = "+.1f", name: str = "value") -> str:
    """A value with its interval, where it has one."""
    if row is None or row[name] is None:
        return "·"
    text = f"{row[name]:{form}}" + ("" if row["low"] is None else f" [{row['low']:{form}}, {row['high']:{form}}]")
    return text.replace("-", "−")


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None or row["share"] is None:
        return "·"
    low, high = row["interval"]
    return f"{row['share']:.0%} [{low:.0%}, {high:.0%}]"


def _percent(share: float | None) -> str:
    return "·" if share is None else f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"
