"""The page of `personaxis generate --html`: both answers, every token coloured by its projection, fired tokens marked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from personaxis.analysis.page import write_page as write
from personaxis.persona.axis import Axis, Cap
from personaxis.persona.subject import Subject
from personaxis.steering.caps import layers_in_words
from personaxis.steering.generate import Generated, Trace

HERE = Path(__file__).parent


def write_page(
    path: Path,
    arms: Mapping[str, Generated],
    subject: Subject,
    axis: Axis,
    cap: Cap,
    name: str,
    messages: Sequence[Mapping[str, str]],
) -> None:
    """Write the page. Colours run from the lowest to the highest projection of any answer's token, around their middle."""
    values = sorted(value for one in arms.values() for value in one.trace.answer.tolist())
    low, high = (values[len(values) // 50], values[-1 - len(values) // 50]) if values else (0.0, 1.0)
    floor = float(cap.floor[cap.layers.index(axis.layer)]) if axis.layer in cap.layers else None
    shown = {
        "arms": [_arm(label, one, subject, low, high) for label, one in arms.items()],
        "messages": messages,
        "model": subject.describe(),
        "layer": axis.layer,
        "poles": axis.poles,
        "low": low,
        "high": high,
        "floor": floor,
        "floor_place": None if floor is None else 100 * placed(floor, low, high),
        "cap": {
            "name": name,
            "layers": layers_in_words(cap.layers),
            "level": cap.level,
            "population": cap.population,
            "phase": cap.phase,
        },
    }
    write(path, HERE / "tokens.html.jinja", shown, {}, {})


def _arm(name: str, one: Generated, subject: Subject, low: float, high: float) -> dict[str, Any]:
    trace, tally = one.trace, one.tally
    start = trace.answer_from
    answer = trace.answer.tolist()
    return {
        "name": name,
        "prompt": _tokens(trace, subject, 0, start, low, high),
        "answer": _tokens(trace, subject, start, len(trace.ids), low, high),
        "mean": sum(answer) / len(answer) if answer else None,
        "share": None if tally is None else tally.share,
        "most": None if tally is None else float(tally.most.max()),
        "stopped": one.stopped,
    }


def _tokens(trace: Trace, subject: Subject, first: int, last: int, low: float, high: float) -> list[dict[str, Any]]:
    """Text, colour and what was done, token by token. A token that is part of a character shows as its replacement mark."""
    fired, moved = trace.fired.tolist(), trace.corrections.sum(0).tolist()
    found = []
    for at in range(first, last):
        place = placed(float(trace.projection[at]), low, high)
        side = "positive" if place >= 0.5 else "others"
        said = f"projection {float(trace.projection[at]):.1f}"
        if fired[at]:
            said += f"; changed at {fired[at]} of {len(trace.layers)} layers, by {moved[at]:.1f} in all"
        text = subject.tokenizer.decode([trace.ids[at]])
        depth = round(abs(place - 0.5) * 2 * 62)
        found.append({"text": text, "side": side, "depth": depth, "fired": fired[at], "said": said})
    return found


def placed(value: float, low: float, high: float) -> float:
    """Where a value lies between two others, from 0 to 1."""
    return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)
