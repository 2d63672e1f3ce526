"""Progress: one line for a study, the time left from measured speed, bars that move while answers are written."""

import pytest
from families import tiny_model

from personatlas.persona import progress as module
from personatlas.persona.progress import Stage, Study, format_duration, progress, stages
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def parts(clock, study, seconds, n=20):
    """The stage that is on, in equal parts."""
    for _ in range(n):
        clock[0] += seconds / n
        study.advance(1 / n, "", False)
        yield


def test_from_its_first_tenth_on_an_estimate_is_right_within_a_factor_of_two(clock):
    """Kinds of work whose speeds differ from what was planned by a factor of three either way."""
    planned = [Stage("a", 100, "writing"), Stage("b", 10, "reading"), Stage("c", 200, "writing")]
    seconds = {"a": 100, "b": 30, "c": 230}
    study, errors = Study(planned, lambda study: None), []
    for stage in planned:
        study.start(stage.name)
        for _ in parts(clock, study, seconds[stage.name]):
            gone, total = clock[0] - 100, sum(seconds.values())
            if total / 10 <= gone < 0.98 * total:
                errors.append(study.seconds_left / (total - gone))
    assert len(errors) > 30
    assert 0.5 < min(errors) <= max(errors) < 2


def test_answers_of_an_earlier_run_say_nothing_of_the_speed(clock):
    study = Study([Stage("a", 10, "writing")], lambda study: None)
    study.start("a")
    study.advance(0.5, "", True)
    assert study.seconds_left is None
    clock[0] += 8
    study.advance(0.25, "", False)
    assert study.seconds_left == pytest.approx(8)
    assert study.done == 0.75


def test_through_a_pipe_a_study_says_every_ten_seconds_where_it_is(clock, capsys):
    with stages([Stage("harm", 30), Stage("cost", 10)]) as study:
        for name, n in (("harm", 3), ("cost", 1)):
            study.start(name)
            with progress("answering", n) as advance:
                for _ in range(n):
                    clock[0] += 11
                    advance(1, note="arm cap")
    assert capsys.readouterr().err.splitlines() == [
        "step 1 of 2: harm, arm cap: 25% of all in 11 s, about 33 s left",
        "step 1 of 2: harm, arm cap: 50% of all in 22 s, about 22 s left",
        "step 1 of 2: harm, arm cap: 75% of all in 33 s, about 11 s left",
        "step 2 of 2: cost, arm cap: 100% of all in 44 s, about 0 s left",
        "done in 44 s",
    ]


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {"TERM": "xterm"}])
def test_a_terminal_shows_one_line_and_a_dumb_one_plain_lines(monkeypatch, capsys, clock, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with stages([Stage("harm", 1)]) as study:
        study.start("harm")
        clock[0] += 20
        with progress("answering", 1) as advance:
            advance(1)
    said = capsys.readouterr().err
    assert ("\x1b[" in said) == (variables["TERM"] == "xterm")
    assert "harm" in said or "done" in said


@pytest.mark.parametrize("kind", [Sampler, GraphSampler])
def test_a_bar_moves_while_answers_are_written_and_ends_at_their_number(kind):
    model, told = tiny_model("llama"), []
    prompts = [Prompt((1, 2, 3 + n), n) for n in range(5)]
    sampler = kind(model, frozenset({5, 6, 7}), Sampling(24))
    answers = list(sampler.answers(prompts, advance=lambda done, *_, **__: told.append(done)))
    assert max(len(answer.ids) for answer in answers) == 24
    assert sum(told) == pytest.approx(5)
    assert len(told) > 2
    assert min(told) >= 0


def test_what_is_far_away_is_not_known_to_the_second():
    assert [format_duration(s) for s in (4.2, 99, 121, 3540, 9000)] == [
        "4 s",
        "99 s",
        "2 min",
        "59 min",
        "2.5 h",
    ]
