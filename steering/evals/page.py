"""The page of an evaluation: what the cap bought, what it cost, how sure that is, and where the arms differ."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from personaxis.analysis.figures_eval import category_bars, fired_against_change, gain_against_cost, turns
from personaxis.analysis.page import write_page
from personaxis.steering.arms import AS_IT_IS
from personaxis.steering.evals.result import RANDOM

HERE = Path(__file__).parent
HARMFUL = ("persona-jailbreak", "harm", "contrast")  # suites whose requests and answers are left out unless asked for
ORDER = ("persona-jailbreak", "harm", "over-refusal", "contrast", "susceptibility", "drift", "benign")
EXAMPLES = 4  # a suite
WORDS = {
    "harmful": "harmful answers",
    "complied": "answers that comply",
    "refused": "refusals",
    "degenerate": "empty answers and loops",
    "in role": "answers that play the role",
    "assistant": "answers that call themselves an assistant",
    "mystical": "mystical voices",
}


def write_eval_page(path: Path, content: Mapping[str, Any], *, show_answers: bool = False) -> None:
    """Write the page of eval.json's content. Harmful requests and the answers to them are left out unless `show_answers`."""
    kinds = {arm: _kind(arm, number) for number, arm in enumerate(content["arms"])}
    figures: dict[str, Any] = {}
    sections = []
    for name in ORDER:
        if (suite := content["suites"].get(name)) is None:
            continue
        drawn = _figures(name, suite, content, kinds)
        figures |= drawn
        examples = [] if name in HARMFUL and not show_answers else _examples(content, name)
        hidden = name in HARMFUL and not show_answers
        sections.append({"name": name, "suite": suite, "figures": list(drawn), "examples": examples, "hidden": hidden})
    shown = {
        "c": content,
        "heights": {name: figure.layout.height for name, figure in figures.items()},
        "sections": sections,
        "kinds": kinds,
        "tiles": _tiles(content),
        "words": WORDS,
        "costs": content["capability"],
    }
    write_page(path, HERE / "eval.html.jinja", shown, figures, {"percent": _percent, "signed": _signed, "p": _p})


def _kind(arm: str, number: int) -> str:
    if arm == AS_IT_IS or arm.startswith(RANDOM):
        return AS_IT_IS if arm == AS_IT_IS else RANDOM
    return "cap" if number == 1 else "other cap"


def _main(suite: Mapping[str, Any]) -> str:
    """The outcome that a suite is about, or the first that was judged at all."""
    names = [suite["main"], *suite["outcomes"]]
    return next((name for name in names if suite["outcomes"][name]["arms"][AS_IT_IS]["share"] is not None), names[0])


def _figures(
    name: str, suite: Mapping[str, Any], content: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, Any]:
    main = _main(suite)
    rows, figures = suite["outcomes"][main]["arms"], {}
    costs = content["capability"].get("benign", {})
    points = [
        {"name": arm, "kind": kinds[arm], "cost": costs[arm]["more_loss"] if arm in costs else 0.0, **rows[arm]}
        for arm in content["arms"]
        if rows[arm]["share"] is not None and (arm == AS_IT_IS or arm in costs)
    ]
    if costs and len(points) > 1:
        figures[f"gain-{name}"] = gain_against_cost(points, WORDS[main], "more loss on benign answers")
    moved = [
        {
            "name": arm,
            "kind": kinds[arm],
            "fired": suite["arms"][arm]["fired"],
            "share": change["value"],
            "interval": (change["low"], change["high"]),
        }
        for arm in content["arms"][1:]
        if (change := rows[arm].get("change"))
    ]
    if moved:
        figures[f"fired-{name}"] = fired_against_change(moved, WORDS[main])
    if any(row["share"] for rows in suite["categories"].values() for row in rows.values()):
        figures[f"categories-{name}"] = category_bars(suite["categories"], kinds, WORDS[suite["main"]])
    for domain, by_arm in suite["trajectories"].items():
        figures[f"turns-{name}-{domain}"] = turns({arm: by_arm[arm] for arm in content["arms"]}, kinds)
    return figures


def _tiles(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """One tile a suite for the first cap, and one for what it costs."""
    if len(content["arms"]) < 2:
        return []
    cap, tiles = content["arms"][1], []
    for name in ORDER:
        if (suite := content["suites"].get(name)) is None:
            continue
        main = _main(suite)
        before, row = (suite["outcomes"][main]["arms"][arm] for arm in (AS_IT_IS, cap))
        change, moved = row.get("change"), suite["arms"][cap].get("projection_change")
        if suite["turns"] > 1 and moved:  # of conversations, where they lie
            span = f"{moved['value']:+.1f} [{moved['low']:+.1f}, {moved['high']:+.1f}]".replace("-", "−")
            before_place, place = (suite["arms"][arm]["projection"] for arm in (AS_IT_IS, cap))
            note = f"mean projection of answers; as it is {before_place:.1f}, n = {moved['n']}"
            tiles.append({"name": name, "value": f"{place:.1f}", "interval": span, "note": note})
        elif change:
            span = f"{_signed(change['value'])} [{_signed(change['low'])}, {_signed(change['high'])}], p {_p(change.get('p_holm', change['p']))}"
            note = f"{WORDS[main]}; as it is {_percent(before['share'])}, n = {change['n']}"
            tiles.append({"name": name, "value": _percent(row["share"]), "interval": span, "note": note})
    cost = content["capability"].get("benign", {}).get(cap)
    if cost:
        low, high = cost["more_loss_interval"]
        note = f"per token on everyday answers; KL {cost['kl']:.3f} nats"
        tiles.append(
            {
                "name": "more loss",
                "value": _signed(cost["more_loss"]),
                "interval": f"95% {_signed(low)} to {_signed(high)}",
                "note": note,
            }
        )
    return tiles


def _examples(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The first cases in which the first cap's answer counts as something else than the model's own."""
    if len(content["arms"]) < 2:
        return []
    cap, found = content["arms"][1], []
    for row in content["pairs"]:
        before, after = row["arms"][AS_IT_IS], row["arms"][cap]
        if row["suite"] == name and before and after and before[0]["verdicts"] != after[0]["verdicts"]:
            found.append({**row, "before": before[0], "after": after[0], "asked": row["messages"][-1]["content"]})
    return found[:EXAMPLES]


def _percent(share: float | None) -> str:
    if share is None:
        return "·"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")


def _p(value: float | None) -> str:
    return "·" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"
