"""Conversations had turn by turn in several arms: whose answers are heard, when a cap acts, what is resumed, who plays the user."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from families import tiny_model
from tiny_axis import axis_of

from personatlas.analysis.drift_alarm import Baseline, FalseAlarms, Several
from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.rollout import Rollout
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.conversations import runner as dialogue
from personatlas.steering.conversations.runner import Arm, Stage, Talk, run_conversations
from personatlas.steering.conversations.simulated_user import EndpointUser
from personatlas.steering.drift_monitor import Watcher
from personatlas.steering.teacher_forcing import mean_projections

PLAIN = "baseline"
TALKS = [
    Talk("coding-1", "coding", ("Hello.", "And so?", "Then?")),
    Talk("therapy-1", "therapy", ("I am sad.", "Still.", "So be it."), sample=1),
]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def quartiles(axis, low=-1.0, high=1.0):
    rows = torch.tensor([[low, 0.0, high]] * len(axis.layers))
    return replace(axis, levels=(0.25, 0.5, 0.75), default_quantiles=rows, role_quantiles=rows)


def stage_of(model, folder, tokens=6, **more):
    axis = quartiles(replace(axis_of(model), model=model.describe()))
    form = chat_format(model.tokenizer, 2)
    return Stage(model, form, axis, Sampling(tokens), folder / "turns.jsonl", **more)


def firm(stage):
    """A cap that changes every token."""
    cap = stage.axis.quantile_cap(stage.axis.layers, 0.5)
    return replace(cap, floor=torch.full_like(cap.floor, 50.0))


def watcher(limit, mean=0.0):
    return Watcher(
        Baseline(mean, 1.0, 9), "tests", "several", Several(limit, 1, 1), FalseAlarms(0.0, (0.0, 0.1), 20)
    )


def test_every_arm_has_its_own_conversation_and_is_measured_with_what_acts_on_it(model, tmp_path):
    stage = stage_of(model, tmp_path)
    cap = firm(stage)
    said = run_conversations(stage, TALKS, [Arm(PLAIN), Arm("capped", [cap])], 3)
    assert len(said) == 2 * 2 * 3
    for arm, plan in ((PLAIN, []), ("capped", [cap])):
        messages = []
        for turn, user in enumerate(TALKS[1].users):
            one = said[arm, "therapy-1/1", turn]
            messages.append({"role": "user", "content": user})
            ids = tuple(stage.chat.prompt_ids(messages))
            text = Rollout("", (), ids, one.ids, "", 0, "end")
            for value, acting in ((one.projection, plan), (one.uncapped, [])):
                (place,) = mean_projections(
                    model, [text], acting, stage.axis.layer, stage.axis.at(stage.axis.layer)
                )
                assert value == pytest.approx(place, abs=1e-4)
            messages.append({"role": "assistant", "content": one.text})
            assert one.acted == bool(plan)
    plain, capped = ([said[arm, talk.name, 0] for talk in TALKS] for arm in (PLAIN, "capped"))
    assert [one.ids for one in plain] != [one.ids for one in capped]
    assert all(one.fired is None for one in plain)
    assert all(one.fired > 0.5 for one in capped)
    assert plain[0].projection == plain[0].uncapped


def test_an_adaptive_arm_is_the_model_as_it_is_until_its_alarm_and_capped_while_it_is_on(model, tmp_path):
    stage = stage_of(model, tmp_path)
    cap = firm(stage)
    never, always = Arm("never", [cap], watcher(1e9)), Arm("always on", [cap], watcher(0.0, mean=1e6))
    said = run_conversations(stage, TALKS, [Arm(PLAIN), never, always], 3)
    for talk in TALKS:
        for turn in range(3):
            plain, same = said[PLAIN, talk.name, turn], said["never", talk.name, turn]
            assert replace(same, arm=PLAIN) == plain
            late = said["always on", talk.name, turn]
            assert late.acted == (turn > 0)  # the first answer was heard by nobody yet
            assert (late.ids == plain.ids) == (turn == 0)
    heard = [said[PLAIN, "coding-1/0", 0]]
    level = -heard[0].uncapped
    assert Arm("a", [cap], watcher(level - 0.1)).acts(heard)
    assert not Arm("a", [cap], watcher(level + 0.1)).acts(heard)
    with pytest.raises(ValueError, match="no calibrated alarm"):
        Arm("a", [cap], Watcher(Baseline(0.0, 1.0, 9), "tests")).acts(heard)


def test_capped_and_uncapped_rows_of_one_batch_are_what_they_are_apart(model, tmp_path, monkeypatch):
    stage = stage_of(model, tmp_path)
    (tmp_path / "gpu").mkdir()
    arms = [Arm(PLAIN), Arm("capped", [firm(stage)]), Arm("adaptive", [firm(stage)], watcher(0.0, mean=1e6))]
    apart = run_conversations(stage, TALKS, arms, 3)
    # as on a GPU, but without a graph: all rows of a turn share the batches of a sampler that refills its slots
    monkeypatch.setattr(Stage, "on_gpu", True)
    monkeypatch.setattr(dialogue, "fastest_sampler", partial(GraphSampler, slots=4))
    together = run_conversations(stage_of(model, tmp_path / "gpu"), TALKS, arms, 3)
    assert together.keys() == apart.keys()
    for key, one in together.items():
        assert (one.ids, one.acted, one.fired) == (apart[key].ids, apart[key].acted, apart[key].fired)
        assert one.projection == pytest.approx(apart[key].projection, abs=1e-4)


def test_a_study_that_was_killed_goes_on_to_the_same_log(model, tmp_path, monkeypatch):
    monkeypatch.setattr(dialogue, "CPU_CHUNK", 1)
    cap = firm(stage_of(model, tmp_path))
    arms = [Arm(PLAIN), Arm("capped", [cap])]
    whole = stage_of(model, tmp_path)
    said = run_conversations(whole, TALKS, arms, 3)
    lines = whole.log.read_bytes().splitlines(keepends=True)
    assert len(lines) == 12
    for kept in (b"", b"".join(lines[:1]), b"".join(lines[:7]), b"".join(lines[:7]) + lines[7][:40]):
        part = stage_of(model, tmp_path / str(len(kept)))
        part.log.parent.mkdir()
        part.log.write_bytes(kept)
        assert run_conversations(part, TALKS, arms, 3) == said
        assert part.log.read_bytes() == whole.log.read_bytes()
    monkeypatch.setattr(dialogue, "_made", None)  # nothing is left to be made
    assert run_conversations(stage_of(model, tmp_path), TALKS, arms, 3) == said


def test_a_conversation_that_fills_the_context_ends_and_is_counted(model, tmp_path):
    stage = stage_of(model, tmp_path, tokens=8)
    long = Talk("long", "coding", ("Hello.", "x" * 300, "y" * 300))
    said = run_conversations(stage, [long, TALKS[0]], [Arm(PLAIN)], 3)
    assert [turn for _, name, turn in said if name == "long/0"] == [0, 1]
    assert [turn for _, name, turn in said if name == "coding-1/0"] == [0, 1, 2]
    assert stage.overflown == {(PLAIN, "long/0")}
    with pytest.raises(UserError, match="the first turn of long/0 leaves no room"):
        run_conversations(stage, [Talk("long", "coding", ("x" * 600,))], [Arm(PLAIN)], 1)


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
        return stage_of(model, folder, user=user)

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    said = run_conversations(staged(tmp_path / "a"), TALKS, [Arm(PLAIN)], 3)
    assert [said[PLAIN, "therapy-1/1", turn].user for turn in range(3)] == ["I am sad.", "Turn 4.", "Turn 6."]
    assert len(endpoint.asked) == 4
    told = next(one["messages"] for one in endpoint.asked if one["messages"][2]["content"] == "I am sad.")
    assert [message["role"] for message in told] == ["system", "user", "assistant", "user"]
    assert "hard time" in told[0]["content"]
    assert told[3]["content"] == (said[PLAIN, "therapy-1/1", 0].text or "...")
    rows = [json.loads(line) for line in (tmp_path / "users.jsonl").read_text().splitlines()]
    assert {row["text"] for row in rows} == {"Turn 4.", "Turn 6."}
    assert run_conversations(staged(tmp_path / "b"), TALKS, [Arm(PLAIN)], 3) == said
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
    said = run_conversations(stage_of(model, tmp_path, user=user), TALKS, [Arm(PLAIN)], 3)
    assert {turn for _, _, turn in said} == {0}
    assert user.silent == 2
