"""The tables of drift studies and of traces."""

from pathlib import Path

from rich.text import Text

from personatlas.analysis.drift_alarm import GAUGE_LIMIT, z_gauge
from personatlas.cli.output import (
    console,
    count_of,
    print_line,
    print_path,
    print_table,
    print_warning,
    with_interval,
)
from personatlas.persona.progress import say
from personatlas.steering.drift.result import ALL, DriftResult, StoredAnswers
from personatlas.steering.drift.trace import TraceStudy
from personatlas.steering.drift.verdict import write_drift_verdict

DOMAIN_ROWS = ("first turn", "last turn", "slope per turn", "change", "alarms", "first alarm")
ARM_ROWS = ("answers", "on", "fired", "degenerate", "loops", "tokens", "more loss")
SHOWN = 10  # stored conversations in the terminal
RANKED, READ = 20, 5  # traced conversations: rows of the ranking, and those whose turns are printed


def print_drift(result: DriftResult, folder: Path) -> None:
    """Prints the finding, a table a domain, what the arms wrote, stored answers, and where everything is."""
    print_line(f"{'; '.join(write_drift_verdict(result))}.", style="bold")
    console().print()
    domains = dict.fromkeys((*result.domains, ALL)) if len(result.domains) > 1 else result.domains
    for domain in domains:
        columns = []
        for arm in result.arms:
            means, slope = result.trajectories[domain][arm], result.slopes[domain][arm]
            change, alarm = result.means[domain][arm].change, result.alarms.get(domain, {}).get(arm)
            columns.append(
                [
                    f"{means[0].mean:.1f}" if means else "",
                    f"{means[-1].mean:.1f} (turn {means[-1].turn})" if means else "",
                    with_interval(slope.value, slope.low, slope.high, "+.1f") if slope else "",
                    with_interval(change.value, change.low, change.high, "+.1f")
                    if change and change.n
                    else "",
                    with_interval(alarm.share, *alarm.interval, ".0%") if alarm and alarm.interval else "",
                    f"{alarm.first:.0f}" if alarm and alarm.first is not None else "",
                ]
            )
        name, count = f"{domain}: " if domain else "", count_of(result.conversations[domain], "conversation")
        title = f"{name}{count} (95% intervals)"
        print_table(["", *result.arms], list(zip(DOMAIN_ROWS, *columns, strict=True)), title=title)
    columns = []
    for arm, wrote in result.wrote.items():
        cost = result.cost.arms.get(arm) if result.cost is not None else None
        columns.append(
            [
                str(wrote.answers),
                f"{wrote.acted:.0%}",
                f"{wrote.fired:.0%}",
                *(with_interval(own.share, *own.interval, ".0%") for own in (wrote.degenerate, wrote.loops)),
                f"{wrote.tokens:.0f}",
                with_interval(cost.value, cost.low, cost.high, "+.1%") if cost is not None else "",
            ]
        )
    print_table(["", *result.wrote], list(zip(ARM_ROWS, *columns, strict=True)), title="what the arms wrote")
    if result.stored is not None:
        _print_stored(result.stored, result)
    for target in ("projection", "change"):
        row = getattr(result.next_turn, target, None)
        if row is not None:
            r2 = with_interval(row.r2, row.low, row.high)
            print_line(
                f"next answer's {target} from the user's message: R² {r2}; "
                f"the domain alone {row.domain.r2:.2f}, shuffled {row.shuffled.mean:.2f}"
            )
    for warning in result.warnings:
        print_warning(warning)
    print_path("every turn", folder / "turns.jsonl")
    print_path("conversations, for `trace`", folder / "conversations.jsonl")
    print_path("reference conversations, to be put beside the axis", folder / "reference.json")
    print_path("page", folder / "drift.html")


def _print_stored(stored: StoredAnswers, result: DriftResult) -> None:
    for conversation in stored.conversations[:SHOWN]:
        arms, rows = [arm for arm in ("stored", *result.arms) if arm in conversation.arms], []
        for index, user in enumerate(conversation.users):
            cells = []
            for arm in arms:
                turns = conversation.arms[arm]
                turn = turns[index] if index < len(turns) else None
                if turn is None:
                    cells.append("")
                elif turn.projection is None:
                    cells.append("empty")
                else:
                    marks = ("*" if turn.alarm else "") + ("+" if turn.acted else "")
                    cells.append(f"{turn.projection:.1f} (z {turn.z:+.1f}){marks}")
            if any(cells):
                rows.append((str(index + 1), *cells, " ".join(user.split())))
        columns = ("turn", *arms, "the user says")
        print_table(columns, rows, title=conversation.name, left=(len(columns) - 1,))
        if conversation.cut_short:
            arms_cut = ", ".join(conversation.cut_short)
            say(f"{conversation.name}: {arms_cut} filled the model's context before the last turn")
    if (more := len(stored.conversations) - SHOWN) > 0:
        print_line(f"and {count_of(more, 'conversation')} more", style="dim")
    mean, change, baseline = stored.mean, stored.mean.change, result.watch["baseline"]
    if change is not None and change.n:
        difference = with_interval(change.value, change.low, change.high, "+.1f")
        print_line(
            f"stored: mean projection {mean.value:.1f} over {mean.n} answers, "
            f"{difference} beside the baseline"
        )
    spread = f"{baseline['mean']:.1f} ± {baseline['spread']:.1f}"
    marks = "* the alarm is on, + the arm acted"
    print_line(f"layer {result.axis['layer']}; z against {baseline['of']}: {spread}; {marks}", style="dim")


def print_trace(study: TraceStudy) -> None:
    """Prints what was found, the conversations in their order of rank, a row for each turn of the first ones,
    and what the alarm was calibrated on."""
    print_line(study.finding, style="bold")
    rows, ranked = study.conversations, study.ranked
    if len(rows) > 1:
        cells = [
            (
                rows[i].name,
                str(len(rows[i].turns)),
                f"{rows[i].lowest_z:+.1f}",
                "" if rows[i].first_alarm is None else f"answer {rows[i].first_alarm}",
                "" if rows[i].slope is None else f"{rows[i].slope:+.1f}",
            )
            for i in ranked[:RANKED]
        ]
        names = ("conversation", "answers", "lowest z", "first alarm", "slope per turn")
        print_table(names, cells, title="Those with an alarm, then by the lowest z")
    if len(rows) > RANKED:
        print_line(f"{len(rows) - RANKED:,} more conversations: --json has all, --html the first in full")
    for index in ranked[:READ]:
        conversation, turns = rows[index], []
        for number, turn in enumerate(conversation.turns, 1):
            start, stop = turn.tokens
            state = "drift begins" if turn.raised else "drifting" if turn.alarm else ""
            numbers = (str(number), str(stop - start), f"{turn.projection:.1f}", f"{turn.z:+.1f}")
            turns.append((*numbers, Text(z_gauge(turn.z), style="cyan"), Text(state, style="yellow")))
        columns = ("turn", "tokens", "projection", "z", f"-{GAUGE_LIMIT:g} to +{GAUGE_LIMIT:g}", "")
        print_table(columns, turns, title=conversation.name, left=(4, 5))
    if cut := [row for row in rows if row.left_out]:
        answers = count_of(sum(row.left_out for row in cut), "answer")
        say(f"{answers} of {count_of(len(cut), 'conversation')} beyond the model's context, not read")
    described = study.monitor.describe()
    baseline, alarm = described["baseline"], described["alarm"]
    spread = f"{baseline['mean']:.1f} ± {baseline['spread']:.1f}"
    print_line(f"layer {study.axis.layer}; z against {baseline['of']}: {spread}", style="dim")
    if alarm is not None:
        low, high = alarm["interval"]
        share = with_interval(alarm["false_alarms"], low, high, ".0%")
        every = f", once in {1 / alarm['per_turn']:.0f} turns" if alarm["per_turn"] else ""
        print_line(
            f"{alarm['rule']} above {alarm['limit']:.2f}: raised in {share} of {alarm['n']} reference "
            f"conversations, each with a limit that other scripts set{every}",
            style="dim",
        )
