"""Conversations in several arms: each arm's own history, when a cap acts, resuming, ranks, formats, and simulated users."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import tiny_model
from tiny_axis import axis_of

from personatlas.analysis.drift_alarm import FalseAlarms, MOfN, ReferenceDistribution
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import BASELINE as PLAIN
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.conversations import runner
from personatlas.steering.conversations.runner import (
    RunnerConfig,
    Script,
    TurnFormat,
    alarm_after,
    run_conversations,
)
from personatlas.steering.conversations.simulated_user import EndpointUser
from personatlas.steering.drift_monitor import DriftMonitor
from personatlas.steering.teacher_forcing import mean_projections

SCRIPTS = [
    Script("coding-1/0", "coding", ("Hello.", "And so?", "Then?")),
    Script("therapy-1/1", "therapy", ("I am sad.", "Still.", "So be it.")),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def quartiles(axis, low=-1.0, high=1.0):
    rows = torch.tensor([[low, 0.0, high]] * len(axis.layers))
    return replace(axis, levels=(0.25, 0.5, 0.75), default_quantiles=rows, role_quantiles=rows)


def config_of(model, folder, tokens=6, **more):
    axis = quartiles(replace(axis_of(model), model=model.describe()))
    form = chat_format(model.tokenizer, 2)
    return RunnerConfig(model, form, axis, Sampling(tokens), folder / "turns.jsonl", **more)


def firm(config):
    """A cap that changes every token."""
    cap = config.axis.quantile_cap(config.axis.layers, 0.5)
    return replace(cap, floor=torch.full_like(cap.floor, 50.0))


def monitor(limit, mean=0.0):
    return DriftMonitor(
        ReferenceDistribution(mean, 1.0, 9),
        "tests",
        "two_of_three",
        MOfN(limit, 1, 1),
        FalseAlarms(0.0, (0.0, 0.1), 20, 0.0),
    )


def test_every_arm_has_its_own_conversation_and_is_measured_with_what_acts_on_it(model, tmp_path):
    config = config_of(model, tmp_path)
    cap = firm(config)
    said = run_conversations(config, SCRIPTS, {PLAIN: [], "capped": [cap]}, 3).turns
    assert len(said) == 2 * 2 * 3
    for arm, plan in ((PLAIN, []), ("capped", [cap])):
        messages = []
        for turn, user in enumerate(SCRIPTS[1].users):
            one = said[arm, "therapy-1/1", turn]
            messages.append({"role": "user", "content": user})
            ids = tuple(config.chat.prompt_ids(messages))
            text = Rollout("", (), ids, one.ids, "", 0, "end")
            for value, acting in ((one.projection, plan), (one.uncapped, [])):
                (place,) = mean_projections(
                    model, [text], acting, config.axis.layer, config.axis.at(config.axis.layer)
                )
                assert value == pytest.approx(place, abs=1e-4)
            messages.append({"role": "assistant", "content": one.text})
            assert one.acted == bool(plan)
    plain, capped = ([said[arm, talk.name, 0] for talk in SCRIPTS] for arm in (PLAIN, "capped"))
    assert [one.ids for one in plain] != [one.ids for one in capped]
    assert all(one.fired is None for one in plain)
    assert all(one.fired > 0.5 for one in capped)
    assert plain[0].projection == plain[0].uncapped


def test_an_adaptive_arm_is_the_model_as_it_is_until_its_alarm_and_capped_while_it_is_on(model, tmp_path):
    config = config_of(model, tmp_path)
    cap = firm(config)
    arms = {PLAIN: [], "never": [cap], "always on": [cap]}
    monitors = {"never": monitor(1e9), "always on": monitor(0.0, mean=1e6)}
    said = run_conversations(config, SCRIPTS, arms, 3, monitors=monitors).turns
    for talk in SCRIPTS:
        for turn in range(3):
            plain, same = said[PLAIN, talk.name, turn], said["never", talk.name, turn]
            assert replace(same, arm=PLAIN) == plain
            late = said["always on", talk.name, turn]
            assert late.acted == (turn > 0)  # the first answer was heard by nobody yet
            assert (late.ids == plain.ids) == (turn == 0)
    heard = [said[PLAIN, "coding-1/0", 0]]
    level = -heard[0].uncapped
    assert alarm_after(monitor(level - 0.1), heard)
    assert not alarm_after(monitor(level + 0.1), heard)
    uncalibrated = {"never": DriftMonitor(ReferenceDistribution(0.0, 1.0, 9), "tests")}
    with pytest.raises(ValueError, match="no calibrated alarm"):
        run_conversations(config, SCRIPTS, arms, 3, monitors=uncalibrated)


def test_capped_and_uncapped_rows_of_one_batch_are_what_they_are_apart(model, tmp_path, monkeypatch):
    config = config_of(model, tmp_path)
    (tmp_path / "gpu").mkdir()
    arms = {PLAIN: [], "capped": [firm(config)], "adaptive": [firm(config)]}
    monitors = {"adaptive": monitor(0.0, mean=1e6)}
    apart = run_conversations(config, SCRIPTS, arms, 3, monitors=monitors).turns
    # as on a GPU, but without a graph: all rows of a turn share the batches of a sampler that refills its slots
    monkeypatch.setattr(RunnerConfig, "on_gpu", True)
    monkeypatch.setattr(runner, "fastest_sampler", partial(GraphSampler, slots=4))
    together = run_conversations(
        config_of(model, tmp_path / "gpu"), SCRIPTS, arms, 3, monitors=monitors
    ).turns
    assert together.keys() == apart.keys()
    for key, one in together.items():
        assert (one.ids, one.acted, one.fired) == (apart[key].ids, apart[key].acted, apart[key].fired)
        assert one.projection == pytest.approx(apart[key].projection, abs=1e-4)


def test_a_study_that_was_killed_goes_on_to_the_same_log(model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CPU_CHUNK", 1)
    cap = firm(config_of(model, tmp_path))
    arms = {PLAIN: [], "capped": [cap]}
    whole = config_of(model, tmp_path)
    said = run_conversations(whole, SCRIPTS, arms, 3)
    lines = whole.log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    for kept in (b"", b"".join(lines[:1]), b"".join(lines[:7]), b"".join(lines[:7]) + lines[7][:40]):
        part = config_of(model, tmp_path / str(len(kept)))
        part.log.parent.mkdir()
        part.log.write_bytes(kept)
        assert run_conversations(part, SCRIPTS, arms, 3) == said
        assert part.log.read_bytes() == whole.log.read_bytes()
    monkeypatch.setattr(runner, "_answer", None)  # nothing is left to be made
    assert run_conversations(config_of(model, tmp_path), SCRIPTS, arms, 3) == said


def test_an_answer_with_a_token_that_the_model_has_not_is_made_again(model, tmp_path):
    config, arms = config_of(model, tmp_path), {PLAIN: []}
    said = run_conversations(config, SCRIPTS, arms, 2)
    whole = config.log.read_bytes()
    first, *rest = whole.decode().splitlines()
    row = json.loads(first)
    row["ids"][-1] = model.vocab_size
    config.log.write_text("".join(f"{line}\n" for line in (json.dumps(row), *rest)))
    assert run_conversations(config_of(model, tmp_path), SCRIPTS, arms, 2) == said
    assert sorted(config.log.read_bytes().splitlines()) == sorted(whole.splitlines())


def test_a_conversation_that_fills_the_context_ends_and_is_counted(model, tmp_path):
    config = config_of(model, tmp_path, tokens=8)
    long = Script("long/0", "coding", ("Hello.", "x" * 300, "y" * 300))
    done = run_conversations(config, [long, SCRIPTS[0]], {PLAIN: []}, 3)
    assert [turn for _, name, turn in done.turns if name == "long/0"] == [0, 1]
    assert [turn for _, name, turn in done.turns if name == "coding-1/0"] == [0, 1, 2]
    assert done.truncated == {(PLAIN, "long/0")}
    with pytest.raises(UserError, match="the first turn of long/0 leaves no room"):
        run_conversations(config, [Script("long/0", "coding", ("x" * 600,))], {PLAIN: []}, 1)


class ShortFormat(TurnFormat):
    """Rows without an arm, as of a study whose interventions are in the key alone."""

    names_arms = False

    def seed(self, script, turn):
        return script.seed + turn

    def row(self, turn):
        kept = ("ids", "text", "stopped", "projection", "fired")
        return {"key": turn.conversation, **{name: getattr(turn, name) for name in kept}}


def test_another_format_has_its_own_seeds_and_rows_and_equal_requests_of_two_arms_share_one(model, tmp_path):
    config = config_of(model, tmp_path, format=ShortFormat(), measure_uncapped=False)
    arms = {PLAIN: [], "capped": [firm(config)], "the same": [firm(config)]}
    done = run_conversations(config, SCRIPTS, arms, 3)
    assert [done.turns[PLAIN, "coding-1/0", turn].seed for turn in range(3)] == [0, 1, 2]
    rows = [json.loads(line) for line in config.log.read_text().splitlines()]
    assert len(rows) == len({row["id"] for row in rows}) == 2 * 2 * 3
    assert set(rows[0]) == {"id", "key", "ids", "text", "stopped", "projection", "fired"}
    for (arm, name, turn), one in done.turns.items():
        assert one.uncapped is None
        other = done.turns["the same" if arm == "capped" else arm, name, turn]
        assert (one.text, one.projection, one.fired) == (other.text, other.projection, other.fired)


def test_ranks_share_chunks_and_find_what_one_process_finds(model, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CPU_CHUNK", 1)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    alone = run_conversations(config_of(model, tmp_path / "one"), SCRIPTS, {PLAIN: []}, 1)
    first, second = (config_of(model, tmp_path / "two", world=World(rank, 2)) for rank in (0, 1))

    def other_rank(_world):
        monkeypatch.setattr(World, "barrier", lambda _: None)
        assert run_conversations(second, SCRIPTS, {PLAIN: []}, 1) == alone

    monkeypatch.setattr(World, "barrier", other_rank)
    assert run_conversations(first, SCRIPTS, {PLAIN: []}, 1) == alone
    for rank in (0, 1):
        assert len((tmp_path / "two" / f"turns.000{rank}.jsonl").read_text().splitlines()) == 1


def test_a_log_that_calls_the_baseline_as_it_is_resumes(model, tmp_path, monkeypatch):
    config = config_of(model, tmp_path)
    done = run_conversations(config, SCRIPTS, {PLAIN: []}, 2)
    config.log.write_text(config.log.read_text().replace(f'"arm": "{PLAIN}"', '"arm": "as it is"'))
    monkeypatch.setattr(runner, "_answer", None)
    assert run_conversations(config, SCRIPTS, {PLAIN: []}, 2) == done


class Endpoint:
    """An endpoint that says how many messages it was sent, and keeps them."""

    def __init__(self, monkeypatch, status=200, error=""):
        self.asked, self.status, self.error = [], status, error
        monkeypatch.setattr("httpx.Client.post", self.post)

    def post(self, url, json):
        import httpx

        self.asked.append(json)
        reply = {"choices": [{"message": {"content": f"<think>so</think> Turn {len(json['messages'])}."}}]}
        return httpx.Response(self.status, json={"error": self.error} if self.error else reply)


def test_an_endpoint_plays_the_user_from_the_second_turn_on_and_is_asked_once(model, tmp_path, monkeypatch):
    endpoint = Endpoint(monkeypatch)

    def staged(folder):
        user = EndpointUser("http://127.0.0.1:9/v1", "someone", tmp_path / "users.jsonl", backoff=0.0)
        return config_of(model, folder, user=user)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = run_conversations(staged(tmp_path / "a"), SCRIPTS, {PLAIN: []}, 3).turns
    assert [said[PLAIN, "therapy-1/1", turn].user for turn in range(3)] == ["I am sad.", "Turn 4.", "Turn 6."]
    assert len(endpoint.asked) == 4
    told = next(one["messages"] for one in endpoint.asked if one["messages"][2]["content"] == "I am sad.")
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert "hard time" in told[0]["content"]
    assert told[3]["content"] == (said[PLAIN, "therapy-1/1", 0].text or "...")
    rows = [json.loads(line) for line in (tmp_path / "users.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} == {"Turn 4.", "Turn 6."}
    assert run_conversations(staged(tmp_path / "b"), SCRIPTS, {PLAIN: []}, 3).turns == said
    assert len(endpoint.asked) == 4


def test_an_endpoint_that_fails_stops_the_study_in_one_line(tmp_path, monkeypatch):
    for status, tries in ((500, 3), (404, 1)):
        endpoint = Endpoint(monkeypatch, status)
        user = EndpointUser("http://127.0.0.1:9", "someone", tmp_path / "users.jsonl", retries=2, backoff=0.0)
        with pytest.raises(UserError, match=f"no user at .* \\(http {status}"):
            user.require_answer()
        assert len(endpoint.asked) == tries


def test_a_user_whose_context_is_full_ends_the_conversation_and_is_counted(model, tmp_path, monkeypatch):
    Endpoint(monkeypatch, 400, "context_length_exceeded")
    user = EndpointUser("http://127.0.0.1:9", "someone", tmp_path / "users.jsonl")
    said = run_conversations(config_of(model, tmp_path, user=user), SCRIPTS, {PLAIN: []}, 3)
    assert {turn for _, _, turn in said.turns} == {0}
    assert user.n_silent == 2
