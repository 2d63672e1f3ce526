"""The page of a calibration: which cap, why, what it buys and costs on material that it was not chosen on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personaxis.analysis.figures_pareto import pareto
from personaxis.analysis.page import write_page

HERE = Path(__file__).parent


def write_calibration_page(path: Path, content: Mapping[str, Any]) -> None:
    """Write the page of calibration.json's content."""
    shown = {"c": content, "tiles": _tiles(content), "rows": _rows(content), "tried": _tried(content)}
    filters = {"percent": _percent, "signed": _signed}
    figure = pareto(_points(content), content["budget"])
    write_page(path, HERE / "calibration.html.jinja", shown, {"pareto": figure}, filters)


def _points(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    tried = [
        {
            "name": f"{one['name']} (choosing half)",
            "kind": "tried, floors by gradient" if "shift" in one else "tried",
            "cost": one["more_loss"],
            "gain": one["assistant"],
        }
        for one in content["tried"]
        if "assistant" in one
    ]
    reported = [
        {
            "name": name,
            "kind": _kind(name),
            "cost": row["more_loss"],
            "gain": row["assistant"],
            "interval": row["interval"],
        }
        for name, row in content["report"].items()
    ]
    return [*tried, *reported]


def _kind(name: str) -> str:
    first = name.split(" ", 1)[0]
    return name if name in ("as it is", "chosen") else first if first in ("random", "add") else "also"


def _tiles(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    plain, chosen = content["report"]["as it is"], content["report"]["chosen"]
    randoms = [row for name, row in content["report"].items() if name.startswith("random")]
    mean = sum(row["assistant"] for row in randoms) / len(randoms)
    low, high = chosen["interval"]
    dear = sum(row["more_loss"] for row in randoms) / len(randoms)
    return [
        {
            "name": "call themselves an assistant",
            "value": _percent(chosen["assistant"]),
            "interval": f"95% {_percent(low)} to {_percent(high)}",
            "note": f"under the lowest roles, capped; as the model is {_percent(plain['assistant'])}",
        },
        {
            "name": "more loss on benign answers",
            "value": _signed(chosen["more_loss"]),
            "interval": "95% {} to {}".format(*map(_signed, chosen["more_loss_interval"])),
            "note": f"per token; KL {chosen['kl']:.3f} nats; the budget was {_percent(content['budget'])}",
        },
        {
            "name": "fired",
            "value": _percent(chosen["fired"]),
            "interval": f"{_percent(chosen['benign_fired'])} on benign answers",
            "note": "of tokens times layers under the roles",
        },
        {
            "name": "random directions",
            "value": _percent(mean),
            "interval": f"{_signed(dear)} loss",
            "note": f"mean of {len(randoms)} that fire as often: what disturbing alone does",
        },
    ]


def _rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"arm": name, "chosen": name == "chosen", **row} for name, row in content["report"].items()]


def _tried(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Those that were tried under role prompts, best first, then the others by cost."""
    return sorted(content["tried"], key=lambda one: (-one.get("assistant", -1.0), one["more_loss"]))


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")
