"""The figures of an evaluation: gain against cost by cap, shares by category, what firing buys, and trajectories by turn.

The page of an evaluation: what the cap bought, what it cost, how sure that is, and where the arms differ.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import axis_look, empty_figure, line_look, shortened
from personatlas.analysis.html.page import write_page
from personatlas.persona.interventions import BASELINE
from personatlas.steering.evals.result import RANDOM

# how an arm looks, by its kind: colour, symbol, size
LOOKS = {
    "baseline": ("--ink", "diamond", 12),
    "cap": ("--positive", "star", 16),
    "other cap": ("--accent", "circle", 11),
    "random": ("--others", "x", 11),
}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}


def gain_against_cost(points: Sequence[Mapping[str, Any]], outcome: str, cost: str) -> go.Figure:
    """Arms with name, kind, cost, share and interval: down and to the left is better where less of the outcome is."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for kind in LOOKS:
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(
                **_marks(own, kind, "cost", f"%{{text}}: %{{y:.1%}} for %{{x:+.1%}} {cost}<extra></extra>")
            )
    high = max(0.05, *(point["interval"][1] for point in points)) * 1.08
    figure.update_xaxes(title_text=cost, tickformat=".1%", **axis_look(zero=True))
    figure.update_yaxes(title_text=outcome, tickformat=".0%", range=[0, min(high, 1.06)], **axis_look())
    return figure


def fired_against_change(points: Sequence[Mapping[str, Any]], outcome: str) -> go.Figure:
    """Arms by the share of tokens that they change, and what that changed in the outcome (with its interval)."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for kind in LOOKS:
        own = [point for point in points if point["kind"] == kind]
        if own:
            figure.add_scatter(
                **_marks(own, kind, "fired", "%{text}: %{y:+.1%} with %{x:.0%} fired<extra></extra>")
            )
    figure.update_xaxes(
        title_text="tokens times layers that fired", tickformat=".0%", rangemode="tozero", **axis_look()
    )
    figure.update_yaxes(title_text=f"change of {outcome}", tickformat="+.0%", **axis_look(zero=True))
    return figure


def category_bars(
    categories: Mapping[str, Mapping[str, Mapping[str, Any]]], arms: Mapping[str, str], outcome: str
) -> go.Figure:
    """Shares by category and arm (name -> kind) with 95% intervals, the widest category on top."""
    names = sorted(categories, key=lambda name: -max(row["n"] for row in categories[name].values()))
    figure = empty_figure(margin={"l": 190, "r": 24, "t": 30, "b": 54}, showlegend=True, barmode="group")
    figure.update_layout(legend=LEGEND, height=130 + len(names) * (14 + 15 * len(arms)), bargap=0.25)
    shades = {"baseline": "--ink", "cap": "--positive", "other cap": "--accent", "random": "--others"}
    for arm, kind in list(arms.items())[::-1]:
        rows = [categories[name][arm] for name in names]
        shares = [row["share"] or 0.0 for row in rows]
        spans = [row["interval"] or (0.0, 0.0) for row in rows]
        errors = {
            "type": "data",
            "symmetric": False,
            "array": [high - share for share, (_, high) in zip(shares, spans, strict=True)],
            "arrayminus": [share - low for share, (low, _) in zip(shares, spans, strict=True)],
            "thickness": 1,
            "width": 0,
            "color": "var(--muted)",
        }
        figure.add_bar(
            x=shares,
            y=[shortened(name.replace("_", " "), 24) for name in names],
            orientation="h",
            name=arm,
            marker={"color": f"var({shades[kind]})"},
            error_x=errors,
            customdata=[row["n"] for row in rows],
            hovertemplate=f"%{{y}}, {arm}: %{{x:.0%}} of %{{customdata}}<extra></extra>",
        )
    figure.update_xaxes(title_text=outcome, tickformat=".0%", rangemode="tozero", **axis_look())
    figure.update_yaxes(autorange="reversed", **axis_look())
    return figure


def turns(arms: Mapping[str, Sequence[Mapping[str, Any]]], kinds: Mapping[str, str]) -> go.Figure:
    """Mean projection of answers by turn and arm, with standard errors."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for arm, rows in arms.items():
        shown = [row for row in rows if row["projection"] is not None]
        colour, symbol, _ = LOOKS[kinds[arm]]
        bars = {
            "type": "data",
            "array": [row["error"] or 0 for row in shown],
            "thickness": 1,
            "width": 0,
            "color": f"var({colour})",
        }
        figure.add_scatter(
            x=[row["turn"] + 1 for row in shown],
            y=[row["projection"] for row in shown],
            name=arm,
            mode="lines+markers",
            line=line_look(colour, 2.0),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 8},
            error_y=bars,
            hovertemplate=f"{arm}, turn %{{x}}: %{{y:.1f}}<extra></extra>",
        )
    figure.update_xaxes(title_text="turn", dtick=1, **axis_look())
    figure.update_yaxes(title_text="mean projection of the answer", **axis_look())
    return figure


def _marks(points: Sequence[Mapping[str, Any]], kind: str, across: str, hover: str) -> dict[str, Any]:
    colour, symbol, size = LOOKS[kind]
    low = [point["share"] - point["interval"][0] for point in points]
    high = [point["interval"][1] - point["share"] for point in points]
    bars = {
        "type": "data",
        "symmetric": False,
        "array": high,
        "arrayminus": low,
        "thickness": 1,
        "width": 0,
        "color": f"var({colour})",
    }
    return {
        "x": [point[across] for point in points],
        "y": [point["share"] for point in points],
        "text": [point["name"] for point in points],
        "name": kind if kind != "cap" else points[0]["name"],
        "mode": "markers",
        "marker": {"color": f"var({colour})", "symbol": symbol, "size": size},
        "error_y": bars,
        "hovertemplate": hover,
    }


HERE = Path(__file__).parent
HARMFUL = (
    "persona-jailbreak",
    "harm",
    "contrast",
)  # suites whose requests and answers are left out unless asked for
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
        sections.append(
            {"name": name, "suite": suite, "figures": list(drawn), "examples": examples, "hidden": hidden}
        )
    shown = {
        "c": content,
        "heights": {name: figure.layout.height for name, figure in figures.items()},
        "sections": sections,
        "kinds": kinds,
        "tiles": _tiles(content),
        "words": WORDS,
        "costs": content["capability"],
    }
    write_page(
        path, HERE / "page.html.jinja", shown, figures, {"percent": _percent, "signed": _signed, "p": _p}
    )


def _kind(arm: str, number: int) -> str:
    if arm == BASELINE or arm.startswith(RANDOM):
        return BASELINE if arm == BASELINE else RANDOM
    return "cap" if number == 1 else "other cap"


def _main(suite: Mapping[str, Any]) -> str:
    """The outcome that a suite is about, or the first that was judged at all."""
    names = [suite["main"], *suite["outcomes"]]
    return next(
        (name for name in names if suite["outcomes"][name]["arms"][BASELINE]["share"] is not None), names[0]
    )


def _figures(
    name: str, suite: Mapping[str, Any], content: Mapping[str, Any], kinds: Mapping[str, str]
) -> dict[str, Any]:
    main = _main(suite)
    rows, figures = suite["outcomes"][main]["arms"], {}
    costs = content["capability"].get("benign", {})
    points = [
        {
            "name": arm,
            "kind": kinds[arm],
            "cost": costs[arm]["more_loss"] if arm in costs else 0.0,
            **rows[arm],
        }
        for arm in content["arms"]
        if rows[arm]["share"] is not None and (arm == BASELINE or arm in costs)
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
        before, row = (suite["outcomes"][main]["arms"][arm] for arm in (BASELINE, cap))
        change, moved = row.get("change"), suite["arms"][cap].get("projection_change")
        if suite["turns"] > 1 and moved:  # of conversations, where they lie
            span = f"{moved['value']:+.1f} [{moved['low']:+.1f}, {moved['high']:+.1f}]".replace("-", "−")
            before_place, place = (suite["arms"][arm]["projection"] for arm in (BASELINE, cap))
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
        before, after = row["arms"][BASELINE], row["arms"][cap]
        if row["suite"] == name and before and after and before[0]["verdicts"] != after[0]["verdicts"]:
            found.append(
                {**row, "before": before[0], "after": after[0], "asked": row["messages"][-1]["content"]}
            )
    return found[:EXAMPLES]


def _percent(share: float | None) -> str:
    if share is None:
        return "·"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")


def _p(value: float | None) -> str:
    return "·" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"
