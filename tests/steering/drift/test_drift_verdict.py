"""The finding that opens a drift study: where the baseline falls, what each arm does about it, and what that costs."""

from drift_results import make_drift

from personatlas.cli.drift_tables import print_drift
from personatlas.steering.drift.verdict import write_drift_verdict

SLOPES = {
    "coding": {"baseline": -0.2, "assistant": 0.1, "random 1": -0.3, "assistant, adaptive": 0.0},
    "therapy": {"baseline": -8.6, "assistant": -0.4, "random 1": -8.4, "assistant, adaptive": -2.0},
    "philosophy": {"baseline": -3.1, "assistant": 0.2, "random 1": -3.0, "assistant, adaptive": -0.2},
}


def test_the_domain_that_falls_most_comes_first_then_the_arm_that_holds_it_and_its_cost():
    first, cap, control = write_drift_verdict(make_drift(SLOPES))
    assert first == "therapy falls 8.6 [7.6, 9.6] a turn (also philosophy 3.1); coding does not"
    assert cap == (
        "assistant holds it (−0.4 [−1.4, +0.6] a turn), read without it −0.2; +14.0% [+12.0, +16.0] loss; "
        "adaptive, it acts on 50% of answers"
    )
    assert control.startswith("random 1 does not hold it (8.4 [7.4, 9.4] a turn)")


def test_an_arm_that_halves_a_fall_slows_it():
    slopes = {"therapy": {"baseline": -8.0, "assistant": -3.0}}
    assert write_drift_verdict(make_drift(slopes))[1].startswith("assistant slows it (3.0 [2.0, 4.0] a turn)")


def test_slopes_like_those_of_shuffled_turns_are_no_drift():
    slopes = {"coding": {"baseline": -0.5, "assistant": 0.0}, "therapy": {"baseline": 0.3, "assistant": 0.0}}
    first, cap = write_drift_verdict(make_drift(slopes))
    assert first.startswith(
        "no domain is shown to drift: the steepest, coding, moves −0.5 [−1.5, +0.5] a turn"
    )
    assert cap.startswith("assistant moves answers by +3.0 [+2.0, +4.0]")


def test_an_arm_that_never_fired_is_said_to_have_done_nothing():
    assert "never fired" in write_drift_verdict(make_drift(SLOPES, fired=0.0))[1]


def test_the_terminal_leads_with_the_finding(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", "60")
    print_drift(make_drift(SLOPES), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("therapy falls 8.6 [7.6, 9.6] a turn")
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= 60
