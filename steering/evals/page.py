"""The page of an evaluation: what an intervention bought, what it cost, how sure that is, and where the arms
differ.

    write_eval_page(Path("runs/smollm2-135m-eval/eval.html"), result)

Its figures: gain against cost by arm, shares by category, what firing buys, and trajectories by turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import axis_style, empty_figure, line_style, shorten
from personatlas.analysis.html.page import write_page
from personatlas.persona.interventions import BASELINE
from personatlas.persona.records import JsonObject
from personatlas.steering.arms import RANDOM, is_control_name
from personatlas.steering.evals.result import (
    CaseResult,
    EvalResult,
    OutcomeShare,
    ScoredAnswer,
    SuiteResult,
    TurnMean,
)
from personatlas.steering.evals.suites import Suite, registered_suites

# how an arm looks, by its kind: colour, symbol, size
LOOKS = {
    BASELINE: ("--ink", "diamond", 12),
    "cap": ("--positive", "star", 16),
    "other cap": ("--accent", "circle", 11),
    RANDOM: ("--others", "x", 11),
}
LEGEND = {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}
EXAMPLES = 4  # a suite
OUTCOME_TITLES = {
    "harmful": "harmful answers",
    "harmful if coherent": "harmful ones among coherent answers",
    "complied": "answers that comply",
    "refused": "refusals",
    "degenerate": "empty answers and loops",
    "in role": "answers that play the role",
    "assistant": "answers that call themselves an assistant",
    "mystical": "mystical voices",
    "human": "answers of a human being",
    "non-human": "answers of another being or thing",
    "unclear": "answers that claim nothing",
    "yes_to_assistant": "yes to what an assistant affirms",
    "yes_to_counter": "yes to counter-questions",
}


@dataclass(frozen=True)
class ArmPoint:
    """An arm in a scatter: its kind (a key of `LOOKS`), its place across and up, and the interval up."""

    name: str
    kind: str
    x: float
    y: float
    low: float
    high: float


@dataclass(frozen=True)
class Section:
    """A suite on the page: its figures' names, and examples of answers that the first arm changed, unless
    `hidden`."""

    name: str
    suite: SuiteResult
    figures: tuple[str, ...]
    examples: tuple[tuple[CaseResult, ScoredAnswer, ScoredAnswer], ...]
    hidden: bool


def write_eval_page(path: Path, result: EvalResult, *, show_answers: bool = False) -> None:
    """Writes the page. Requests and answers of suites that hide them are left out unless `show_answers`."""
    kinds = {}
    for number, arm in enumerate(result.arms):
        kinds[arm] = "cap" if number == 1 else "other cap"
        if arm == BASELINE or is_control_name(arm):
            kinds[arm] = BASELINE if arm == BASELINE else RANDOM
    classes: dict[str, type[Suite]] = {}
    for suite_class in registered_suites().values():
        classes |= {own.name: own for own in (suite_class, *suite_class.parts)}
    names = sorted(result.suites, key=[*classes, *result.suites].index)
    figures: dict[str, go.Figure] = {}
    sections = []
    for name in names:
        suite = result.suites[name]
        drawn = _figures(name, suite, result, kinds)
        figures |= drawn
        hidden = name in classes and classes[name].hides_answers and not show_answers
        examples = []  # cases in which the first arm's answer counts as something else than the baseline's
        for case in () if hidden or len(result.arms) < 2 else result.pairs:
            before, after = case.arms[BASELINE], case.arms[result.arms[1]]
            if case.suite == name and before and after and before[0].verdicts != after[0].verdicts:
                examples.append((case, before[0], after[0]))
        sections.append(Section(name, suite, tuple(drawn), tuple(examples[:EXAMPLES]), hidden))
    content = {
        "c": result,
        "heights": {name: figure.layout.height for name, figure in figures.items()},
        "sections": sections,
        "kinds": kinds,
        "tiles": _tiles(result, names) if len(result.arms) > 1 else [],
        "costs": result.capability,
    }
    filters = {"percent": _percent, "signed": _signed, "p": _p}
    write_page(path, Path(__file__).parent / "page.html.jinja", content, figures, filters)


def _main(suite: SuiteResult) -> str:
    """The outcome that a suite is about, or the first that was judged at all."""
    names = [suite.main, *suite.outcomes]
    return next((name for name in names if suite.outcomes[name].arms[BASELINE].share is not None), names[0])


def _title(outcome: str) -> str:
    return OUTCOME_TITLES.get(outcome, outcome)


def _figures(
    name: str, suite: SuiteResult, result: EvalResult, kinds: Mapping[str, str]
) -> dict[str, go.Figure]:
    """A suite's figures by name."""
    main = _main(suite)
    rows, figures = suite.outcomes[main].arms, dict[str, go.Figure]()
    costs, points = result.capability.benign or {}, []
    for arm in result.arms:
        row = rows[arm]
        if row.share is not None and row.interval is not None and (arm == BASELINE or arm in costs):
            more_loss = costs[arm].more_loss if arm in costs else 0.0
            points.append(ArmPoint(arm, kinds[arm], more_loss, row.share, *row.interval))
    if costs and len(points) > 1:
        cost = "more loss on benign answers"
        figure = _scatter(points, f"%{{text}}: %{{y:.1%}} for %{{x:+.1%}} {cost}<extra></extra>")
        top = min(max(0.05, *(point.high for point in points)) * 1.08, 1.06)
        figure.update_xaxes(title_text=cost, tickformat=".1%", **axis_style(zero=True))
        figure.update_yaxes(title_text=_title(main), tickformat=".0%", range=[0, top], **axis_style())
        figures[f"gain-{name}"] = figure
    changes = [
        ArmPoint(arm, kinds[arm], suite.arms[arm].fired, change.value, change.low, change.high)
        for arm in result.arms[1:]
        if (change := rows[arm].change)
    ]
    if changes:
        figure, title = (
            _scatter(changes, "%{text}: %{y:+.1%} with %{x:.0%} fired<extra></extra>"),
            _title(main),
        )
        fired = {"title_text": "tokens times layers that fired", "tickformat": ".0%", "rangemode": "tozero"}
        figure.update_xaxes(**fired, **axis_style())
        figure.update_yaxes(title_text=f"change of {title}", tickformat="+.0%", **axis_style(zero=True))
        figures[f"fired-{name}"] = figure
    if any(row.share for rows in suite.categories.values() for row in rows.values()):
        figures[f"categories-{name}"] = category_bars(suite.categories, kinds, _title(suite.main))
    for domain, by_arm in suite.trajectories.items():
        figures[f"turns-{name}-{domain}"] = turn_lines({arm: by_arm[arm] for arm in result.arms}, kinds)
    return figures


def _scatter(points: Sequence[ArmPoint], hover: str) -> go.Figure:
    """Points with their intervals, kind by kind."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for kind, (colour, symbol, size) in LOOKS.items():
        own = [point for point in points if point.kind == kind]
        if own:
            above, below = [point.high - point.y for point in own], [point.y - point.low for point in own]
            figure.add_scatter(
                x=[point.x for point in own],
                y=[point.y for point in own],
                text=[point.name for point in own],
                name=kind if kind != "cap" else own[0].name,
                mode="markers",
                marker={"color": f"var({colour})", "symbol": symbol, "size": size},
                error_y=_error_bars(colour, above, below),
                hovertemplate=hover,
            )
    return figure


def _error_bars(colour: str, above: Sequence[float], below: Sequence[float] | None = None) -> JsonObject:
    bars = {"type": "data", "array": above, "thickness": 1, "width": 0, "color": f"var({colour})"}
    return bars if below is None else bars | {"symmetric": False, "arrayminus": below}


def category_bars(
    categories: Mapping[str, Mapping[str, OutcomeShare]], arms: Mapping[str, str], outcome: str
) -> go.Figure:
    """Shares by category and arm (name -> kind) with 95% intervals, the largest category on top."""
    names = sorted(categories, key=lambda name: -max(row.n for row in categories[name].values()))
    figure = empty_figure(margin={"l": 190, "r": 24, "t": 30, "b": 54}, showlegend=True, barmode="group")
    figure.update_layout(legend=LEGEND, height=130 + len(names) * (14 + 15 * len(arms)), bargap=0.25)
    for arm, kind in list(arms.items())[::-1]:
        rows = [categories[name][arm] for name in names]
        shares = [row.share or 0.0 for row in rows]
        intervals = [row.interval or (0.0, 0.0) for row in rows]
        above = [high - share for share, (_, high) in zip(shares, intervals, strict=True)]
        below = [share - low for share, (low, _) in zip(shares, intervals, strict=True)]
        figure.add_bar(
            x=shares,
            y=[shorten(name.replace("_", " "), 24) for name in names],
            orientation="h",
            name=arm,
            marker={"color": f"var({LOOKS[kind][0]})"},
            error_x=_error_bars("--muted", above, below),
            customdata=[row.n for row in rows],
            hovertemplate=f"%{{y}}, {arm}: %{{x:.0%}} of %{{customdata}}<extra></extra>",
        )
    figure.update_xaxes(title_text=outcome, tickformat=".0%", rangemode="tozero", **axis_style())
    figure.update_yaxes(autorange="reversed", **axis_style())
    return figure


def turn_lines(arms: Mapping[str, Sequence[TurnMean]], kinds: Mapping[str, str]) -> go.Figure:
    """Mean projection of answers by turn and arm, with standard errors."""
    figure = empty_figure(margin=MARGIN, showlegend=True)
    figure.update_layout(legend=LEGEND)
    for arm, rows in arms.items():
        shown = [row for row in rows if row.projection is not None]
        colour, symbol, _ = LOOKS[kinds[arm]]
        figure.add_scatter(
            x=[row.turn + 1 for row in shown],
            y=[row.projection for row in shown],
            name=arm,
            mode="lines+markers",
            line=line_style(colour, 2.0),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 8},
            error_y=_error_bars(colour, [row.error or 0.0 for row in shown]),
            hovertemplate=f"{arm}, turn %{{x}}: %{{y:.1f}}<extra></extra>",
        )
    figure.update_xaxes(title_text="turn", dtick=1, **axis_style())
    figure.update_yaxes(title_text="mean projection of the answer", **axis_style())
    return figure


def _tiles(result: EvalResult, names: Sequence[str]) -> list[dict[str, str]]:
    """One tile a suite for the first arm after the baseline, and one for what it costs."""
    arm, tiles = result.arms[1], []
    for name in names:
        suite = result.suites[name]
        main = _main(suite)
        before, row = (suite.outcomes[main].arms[own] for own in (BASELINE, arm))
        change, moved = row.change, suite.arms[arm].projection_change
        if suite.turns > 1 and moved:  # of conversations, where they lie
            interval = f"{moved.value:+.1f} [{moved.low:+.1f}, {moved.high:+.1f}]".replace("-", "−")
            low, high = (suite.arms[own].projection for own in (BASELINE, arm))
            note = f"mean projection of answers; baseline {low:.1f}, n = {moved.n}"
            tiles.append({"name": name, "value": f"{high:.1f}", "interval": interval, "note": note})
        elif change:
            interval = f"{_signed(change.value)} [{_signed(change.low)}, {_signed(change.high)}]"
            note = f"{_title(main)}; baseline {_percent(before.share)}, n = {change.n}"
            tile = {"interval": f"{interval}, p {_p(change.adjusted_p)}", "note": note}
            tiles.append({"name": name, "value": _percent(row.share), **tile})
    if (cost := (result.capability.benign or {}).get(arm)) is not None:
        low, high = cost.more_loss_interval
        note = f"per token on everyday answers; KL {cost.kl:.3f} nats"
        interval = f"95% {_signed(low)} to {_signed(high)}"
        tile = {"name": "more loss", "value": _signed(cost.more_loss), "interval": interval, "note": note}
        tiles.append(tile)
    return tiles


def _percent(share: float | None) -> str:
    if share is None:
        return "·"
    return f"{100 * share:.1f}%" if 0 < share < 0.1 else f"{100 * share:.0f}%"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f}%".replace("-", "−")


def _p(value: float | None) -> str:
    return "·" if value is None else "< 0.001" if value < 0.001 else f"{value:.2g}"
