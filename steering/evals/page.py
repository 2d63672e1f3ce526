"""The page of an evaluation: the verdict, every change with its interval, what it cost, and all answers to
look through.

    write_eval_page(Path("runs/smollm2-135m-eval/eval.html"), result)

Changes and shares by category are strips of HTML, which fit any width; gain against cost and the trajectories
of conversations are figures. The answers are data that answers.js filters.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

from personatlas.analysis.html.canvas import axis_style, empty_figure, line_style, plain
from personatlas.analysis.html.page import escape_json, write_page
from personatlas.persona.interventions import BASELINE
from personatlas.persona.records import JsonObject
from personatlas.persona.rollout import spread
from personatlas.steering.arms import RANDOM, is_control_name
from personatlas.steering.evals.result import CaseResult, EvalResult, OutcomeShare, SuiteResult, TurnMean
from personatlas.steering.evals.suites import registered_suites
from personatlas.steering.evals.verdict import (
    OUTCOME_NAMES,
    Status,
    find_change,
    main_outcome,
    p_value,
    percent,
    shown_outcomes,
    signed,
    signed_points,
    suite_order,
    write_verdict,
)

HERE = Path(__file__).parent
# how an arm looks, by its kind: colour, symbol, size
LOOKS = {
    BASELINE: ("--ink", "diamond", 12),
    "cap": ("--positive", "star", 16),
    "other cap": ("--accent", "circle", 11),
    RANDOM: ("--others", "x", 11),
}
MARGIN = {"l": 64, "r": 24, "t": 16, "b": 54}
EXTENTS = (0.05, 0.1, 0.2, 0.5, 1.0)  # half the width of the strips of changes
MOST_CASES = 1500  # on the page; all are in eval.json
COLUMNS = 3  # arms beside each other in a table


@dataclass(frozen=True)
class Strip:
    """A value with its interval on a line: `spots` are dot, low and high in per cent of its length."""

    arm: str
    kind: str
    status: Status
    spots: tuple[float, ...]
    text: str
    note: str


@dataclass(frozen=True)
class Measure:
    """A named row of strips, one an arm; `better` says which direction is."""

    name: str
    better: str
    strips: tuple[Strip, ...]


@dataclass(frozen=True)
class Section:
    """A suite on the page: its outcomes, changes, shares by category and figures; `hidden` answers are left
    out.
    """

    name: str
    suite: SuiteResult
    outcomes: Mapping[str, object]
    changes: tuple[Measure, ...]
    categories: tuple[Measure, ...]
    main: str
    figures: tuple[str, ...]
    hidden: bool


def write_eval_page(path: Path, result: EvalResult, *, show_answers: bool = False) -> None:
    """Writes the page. Requests and answers of suites that hide them are left out unless `show_answers`."""
    kinds = {}
    for number, arm in enumerate(result.arms):
        kinds[arm] = "cap" if number == 1 else "other cap"
        if arm == BASELINE or is_control_name(arm):
            kinds[arm] = BASELINE if arm == BASELINE else RANDOM
    classes = {own.name: own for suite in registered_suites().values() for own in (suite, *suite.parts)}
    names = suite_order(result)
    extent = _extent(result)
    figures: dict[str, go.Figure] = {}
    sections = []
    for name in names:
        drawn = _figures(name, result, kinds)
        figures |= drawn
        hidden = name in classes and classes[name].hides_answers and not show_answers
        section = Section(
            name,
            result.suites[name],
            shown_outcomes(result, name),
            tuple(_changes(result, name, kinds, extent)),
            tuple(_categories(result.suites[name], kinds)),
            OUTCOME_NAMES.get(main_outcome(result, name), main_outcome(result, name)),
            tuple(drawn),
            hidden,
        )
        sections.append(section)
    shown = {section.name for section in sections if not section.hidden}
    cases = [case for case in result.pairs if case.suite in shown]
    content = {
        "c": result,
        "verdict": write_verdict(result),
        "sections": sections,
        "kinds": kinds,
        "colours": {kind: colour for kind, (colour, *_) in LOOKS.items()},
        "extent": extent,
        "costs": result.capability,
        "cost_strips": _cost_strips(result, kinds),
        "blocks": [
            [BASELINE, *result.arms[1:][i : i + COLUMNS]] for i in range(0, len(result.arms) - 1, COLUMNS)
        ]
        or [[BASELINE]],
        "n_cases": len(cases),
        "answers": escape_json(json.dumps(_answers(result, cases), ensure_ascii=False)),
    }
    filters = {"percent": percent, "signed": signed, "points": signed_points, "p": p_value}
    write_page(path, HERE / "page.html.jinja", content, figures, filters, scripts=[HERE / "answers.js"])


def _extent(result: EvalResult) -> float:
    """Half the width of the scale that holds the intervals of all changes."""
    bounds = [
        abs(bound)
        for suite in result.suites
        for outcome in shown_outcomes(result, suite).values()
        for arm in outcome.arms.values()
        if arm.change is not None
        for bound in (arm.change.low, arm.change.high)
        if bound == bound
    ]
    return next((own for own in EXTENTS if own >= max(bounds, default=0.0)), EXTENTS[-1])


def _changes(result: EvalResult, suite: str, kinds: Mapping[str, str], extent: float) -> Sequence[Measure]:
    """An outcome a measure, with the change in every arm but the baseline."""
    measures = []
    for name, outcome in shown_outcomes(result, suite).items():
        strips = []
        for arm in result.arms[1:]:
            found = find_change(result, suite, name, arm)
            if found is not None:
                change = found.change
                bounds = [change.value if bound != bound else bound for bound in (change.low, change.high)]
                low, high = signed_points(change.low), signed_points(change.high)
                text = f"{signed_points(change.value)} [{low}, {high}]"
                note = f"p {p_value(change.adjusted_p)}, n = {change.n}"
                spots = tuple(50 + 50 * value / extent for value in (change.value, *bounds))
                strips.append(Strip(arm, kinds[arm], found.status, spots, text, note))
        measures.append(Measure(OUTCOME_NAMES.get(name, name), outcome.better, tuple(strips)))
    return measures


def _cost_strips(result: EvalResult, kinds: Mapping[str, str]) -> list[Strip]:
    """The loss on everyday answers, on a scale of its own."""
    costs = result.capability.benign or {}
    extent = (
        max((abs(bound) for cost in costs.values() for bound in cost.more_loss_interval), default=0.0) or 1.0
    )
    strips = []
    for arm, cost in costs.items():
        low, high = cost.more_loss_interval
        status: Status = "worse" if low > 0 else "better" if high < 0 else "unknown"
        spots = tuple(50 + 50 * value / extent for value in (cost.more_loss, low, high))
        text = f"{signed(cost.more_loss)} [{signed(low)}, {signed(high)}]"
        strips.append(Strip(arm, kinds.get(arm, RANDOM), status, spots, text, f"KL {cost.kl:.3f}"))
    return strips


def _categories(suite: SuiteResult, kinds: Mapping[str, str]) -> Sequence[Measure]:
    """Shares of the main outcome by category, the largest category first."""
    order = sorted(suite.categories, key=lambda name: -max(row.n for row in suite.categories[name].values()))
    measures = []
    for name in order:
        strips = []
        for arm, row in suite.categories[name].items():
            if row.share is not None and row.interval is not None:
                low, high = row.interval
                text = f"{percent(row.share)} [{percent(low)}, {percent(high)}]"
                spots = (100 * row.share, 100 * low, 100 * high)
                strips.append(Strip(arm, kinds[arm], "same", spots, text, f"n = {row.n}"))
        measures.append(Measure(name.replace("_", " "), "", tuple(strips)))
    return measures


def _answers(result: EvalResult, cases: Sequence[CaseResult]) -> JsonObject:
    """What answers.js shows: cases with all turns of all arms, and how each arm's main outcome changed."""
    main = {name: main_outcome(result, name) for name in result.suites}
    rows = []
    for case in spread(cases, MOST_CASES):
        better = shown_outcomes(result, case.suite)[main[case.suite]].better
        before = case.arms[BASELINE]
        changes, arms = {}, {}
        for arm, turns in case.arms.items():
            pairs = [
                (b.verdicts[main[case.suite]], a.verdicts[main[case.suite]])
                for b, a in zip(before, turns, strict=False)
            ]
            step = sum(a - b for b, a in pairs if a is not None and b is not None)
            changes[arm] = "" if step == 0 else "better" if (step > 0) == (better == "more") else "worse"
            arms[arm] = [
                {
                    "text": turn.answer,
                    "projection": None if turn.projection is None else round(turn.projection, 1),
                    "tags": [
                        OUTCOME_NAMES.get(name, name)
                        for name in shown_outcomes(result, case.suite)
                        if turn.verdicts.get(name)
                    ],
                }
                for turn in turns
            ]
        rows.append(
            {
                "suite": case.suite,
                "role": case.role,
                "category": case.category,
                "users": [case.messages[-1]["content"], *case.later],
                "arms": arms,
                "changes": changes,
            }
        )
    return {"arms": list(result.arms), "cases": rows}


def _figures(name: str, result: EvalResult, kinds: Mapping[str, str]) -> dict[str, go.Figure]:
    """A suite's figures by name: the main outcome against the cost, and trajectories."""
    suite, figures, points = result.suites[name], dict[str, go.Figure](), []
    rows, costs = (
        shown_outcomes(result, name)[main_outcome(result, name)].arms,
        result.capability.benign or {},
    )
    for arm in result.arms:
        row = rows[arm]
        if row.share is not None and row.interval is not None and (arm == BASELINE or arm in costs):
            points.append((arm, costs[arm].more_loss if arm in costs else 0.0, row))
    if costs and len(points) > 1 and name not in ("benign", "drift"):
        figures[f"gain-{name}"] = gain_scatter(points, kinds, main_outcome(result, name))
    for domain, by_arm in suite.trajectories.items():
        figures[f"turns-{name}-{domain}"] = turn_lines({arm: by_arm[arm] for arm in result.arms}, kinds)
    return figures


def gain_scatter(
    points: Sequence[tuple[str, float, OutcomeShare]], kinds: Mapping[str, str], outcome: str
) -> go.Figure:
    """Shares of an outcome by arm with their intervals, against the loss that the arm costs."""
    figure = empty_figure(margin=MARGIN)
    for arm, more_loss, row in points:
        colour, symbol, size = LOOKS[kinds[arm]]
        share, (low, high) = row.share or 0.0, row.interval or (0.0, 0.0)
        figure.add_scatter(
            x=[more_loss],
            y=[share],
            name=plain(arm),
            mode="markers",
            marker={"color": f"var({colour})", "symbol": symbol, "size": size},
            error_y=_error_bars(colour, [high - share], [share - low]),
            text=[plain(arm)],
            hovertemplate="%{text}: %{y:.1%} for %{x:+.1%} more loss<extra></extra>",
        )
    top = min(max(0.05, *(row.interval[1] for *_, row in points if row.interval)) * 1.08, 1.06)
    figure.update_xaxes(
        title_text="more loss on everyday answers", tickformat=".1%", nticks=6, **axis_style(zero=True)
    )
    title = OUTCOME_NAMES.get(outcome, outcome)
    figure.update_yaxes(title_text=title, tickformat=".0%", range=[0, top], **axis_style())
    return figure


def _error_bars(colour: str, above: Sequence[float], below: Sequence[float] | None = None) -> JsonObject:
    bars = {"type": "data", "array": above, "thickness": 1, "width": 0, "color": f"var({colour})"}
    return bars if below is None else bars | {"symmetric": False, "arrayminus": below}


def turn_lines(arms: Mapping[str, Sequence[TurnMean]], kinds: Mapping[str, str]) -> go.Figure:
    """Mean projection of answers by turn and arm, with standard errors."""
    figure = empty_figure(margin=MARGIN)
    for arm, rows in arms.items():
        shown = [row for row in rows if row.projection is not None]
        colour, symbol, _ = LOOKS[kinds[arm]]
        figure.add_scatter(
            x=[row.turn + 1 for row in shown],
            y=[row.projection for row in shown],
            name=plain(arm),
            mode="lines+markers",
            line=line_style(colour, 2.0),
            marker={"color": f"var({colour})", "symbol": symbol, "size": 8},
            error_y=_error_bars(colour, [row.error or 0.0 for row in shown]),
            text=[plain(arm)] * len(shown),
            hovertemplate="%{text}, turn %{x}: %{y:.1f}<extra></extra>",
        )
    last = max(map(len, arms.values()))
    figure.update_xaxes(title_text="turn", dtick=-(-last // 8), **axis_style())
    figure.update_yaxes(title_text="mean projection of the answer", **axis_style())
    return figure
