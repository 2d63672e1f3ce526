"""The page of `personatlas replay --html`: the stored answers, the model's own now, and the capped ones, turn by turn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personatlas.analysis.html.page import write_page
from personatlas.steering.drift.page import conversation, shaded, span_of
from personatlas.steering.drift.result import ADAPTIVE

HERE = Path(__file__).parent
MOST = 20  # conversations on one page


def write_replay_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of replay.json's content."""
    rows = content["conversations"][:MOST]
    figures = {
        f"turns-{number}": conversation(
            {
                arm: [{**told, "turn": int(turn)} for turn, told in own.items()]
                for arm, own in row["arms"].items()
            },
            content["baseline"],
        )
        for number, row in enumerate(rows)
    }
    shown = {
        "c": content,
        "conversations": [_conversation(row, content["arms"]) for row in rows],
        "more": len(content["conversations"]) - len(rows),
    }
    write_page(path, HERE / "replay.html.jinja", shown, figures, {"span": span_of})


def _conversation(row: Mapping[str, Any], arms: list[str]) -> dict[str, Any]:
    """Its turns as columns. There is room for three: an adaptive arm is drawn, and not written out."""
    columns = [arm for arm in arms if arm in row["arms"] and arm != ADAPTIVE]
    turns = []
    for number, user in enumerate(row["users"], 1):
        cells = [row["arms"][arm].get(str(number)) for arm in columns]
        if any(cells):
            turns.append({"asked": [user], "cells": [shaded(cell) if cell else None for cell in cells]})
    return {
        "name": row["name"],
        "domain": row["domain"],
        "arms": columns,
        "turns": turns,
        "cut": row["cut_short"],
    }
