"""The page of `personaxis trace --html`: conversations with their turns and tokens coloured, and their trajectory with its alarms."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaxis.analysis.figures_drift import conversation
from personaxis.analysis.page import write_page
from personaxis.steering.conversations import Conversation
from personaxis.steering.drift_page import shaded
from personaxis.steering.page import placed
from personaxis.steering.traced import Traced

HERE = Path(__file__).parent
MOST = 20  # conversations on one page


def write_trace_page(
    path: Path, content: Mapping[str, Any], found: Sequence[Traced], told: Sequence[Conversation], poles: Sequence[str]
) -> None:
    """Write the page of what `trace` prints. Tokens are coloured from the lowest to the highest of all answers' on the page, the
    2% at either end cut off."""
    shown = list(zip(content["conversations"], found, told, strict=True))[:MOST]
    values = sorted(
        value for _, one, _ in shown for turn in one.turns for value in one.projection[turn.start : turn.stop].tolist()
    )
    low, high = values[len(values) // 50], values[-1 - len(values) // 50]
    figures = {
        f"turns-{number}": conversation(
            {"answers": [{**turn, "turn": n} for n, turn in enumerate(row["turns"], 1)]}, content["baseline"]
        )
        for number, (row, _, _) in enumerate(shown)
    }
    page = {
        "c": content,
        "poles": poles,
        "low": low,
        "high": high,
        "conversations": [_conversation(*one, low, high) for one in shown],
        "more": len(content["conversations"]) - len(shown),
    }
    write_page(path, HERE / "trace.html.jinja", page, figures, {})


def _conversation(row: Mapping[str, Any], one: Traced, told: Conversation, low: float, high: float) -> dict[str, Any]:
    """Its messages in order: what users said, and answers with their tokens."""
    turns = {turn["message"]: turn for turn in row["turns"]}
    messages: list[dict[str, Any]] = []
    for number, message in enumerate(told.messages):
        if number not in turns:
            messages.append({"speaker": message["role"], "text": message["content"]})
            continue
        start, stop = turns[number]["tokens"]
        tokens = [_token(one.spans.pieces[at], float(one.projection[at]), low, high) for at in range(start, stop)]
        messages.append({"speaker": "assistant", "cell": shaded({**turns[number], "acted": False}), "tokens": tokens})
    return {"name": row["name"], "domain": told.domain, "messages": messages, "left_out": row["left_out"]}


def _token(text: str, projection: float, low: float, high: float) -> dict[str, Any]:
    place = placed(projection, low, high)
    side = "positive" if place >= 0.5 else "others"
    return {
        "text": text,
        "side": side,
        "depth": round(abs(place - 0.5) * 2 * 62),
        "said": f"projection {projection:.1f}",
    }
