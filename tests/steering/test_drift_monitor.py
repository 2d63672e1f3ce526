"""Calm conversations beside an axis: what an alarm is calibrated on, and on what its false alarms are counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny_axis import axis_of

from personatlas.analysis.drift_alarm import baseline_of, calibrated, false_alarms
from personatlas.persona.errors import UserError
from personatlas.steering.drift_monitor import (
    RULES,
    Calm,
    CalmConversation,
    direction_of,
    load_calm,
    save_calm,
    watcher_of,
)


def calm_conversations(axis, scripts=20, samples=2, seed=0):
    """Two samples each of so many scripts in two domains, around where the axis begins."""
    draw = np.random.default_rng(seed)
    return [
        CalmConversation(f"{domain}-{n}/{sample}", domain, tuple(draw.normal(0, 3, 8).tolist()))
        for domain in ("coding", "writing")
        for n in range(scripts // 2)
        for sample in range(samples)
    ]


def quartiled(axis):
    levels = (0.25, 0.5, 0.75)
    rows = torch.tensor([[-1.349, 0.5, 1.349]] * len(axis.layers))
    return replace(axis, levels=levels, default_quantiles=rows, role_quantiles=rows)


def test_a_script_is_in_one_half_only_and_both_halves_hold_every_domain():
    rows = calm_conversations(None)
    fit, held = Calm(tuple(rows), {}).halves()
    assert len(fit) == len(held) == 20
    assert not {one.script for one in fit} & {one.script for one in held}
    assert {one.domain for one in fit} == {one.domain for one in held} == {"coding", "writing"}
    again, _ = Calm(tuple(rows[::-1]), {}).halves()
    assert {one.name for one in again} == {one.name for one in fit}


@pytest.mark.parametrize("name", ["cusum", "several"])
def test_false_alarms_are_counted_in_conversations_that_did_not_set_the_limit(name):
    calm = Calm(tuple(calm_conversations(None, samples=6)), {})
    watcher = calm.watcher(name, 0.05)
    fit, held = ([one.projections for one in half] for half in calm.halves())
    baseline = baseline_of([value for one in fit for value in one])
    assert watcher.baseline == baseline
    assert watcher.rule == calibrated(RULES[name](), fit, baseline, 0.05)
    assert watcher.false_alarms == false_alarms(watcher.rule, baseline, held)
    told = watcher.describe()["alarm"]
    assert (told["rule"], told["limit"], told["n"]) == (name, watcher.rule.limit, 60)
    monitor = watcher.monitor()
    assert [monitor.turn(-100.0).alarm for _ in range(2)] == [name == "cusum", True]


def test_what_was_saved_is_loaded_and_anything_else_is_refused(tmp_path):
    model = tiny_model()
    axis, path = replace(axis_of(model), model=model.describe()), tmp_path / "calm.json"
    rows = calm_conversations(axis)
    save_calm(path, axis, model.describe(), rows, {"seeds": [0, 1]})
    assert json.loads(path.read_text())["direction"] == direction_of(axis)
    assert (
        load_calm(path, axis, model.describe())
        == load_calm(path, axis)
        == Calm(tuple(rows), {"seeds": [0, 1]})
    )
    with pytest.raises(UserError, match="record of calm conversations came from"):
        load_calm(path, axis, tiny_model(seed=1).describe())
    with pytest.raises(UserError, match="along another direction"):
        load_calm(path, replace(axis, vectors=-axis.vectors))
    whole = json.loads(path.read_text())
    for broken in (
        {"kind": "calm"},
        whole | {"conversations": [{"name": "a", "domain": "b", "projections": []}]},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="is damaged"):
            load_calm(path, axis)
    path.write_text("[]")
    with pytest.raises(UserError, match="kind calm"):
        load_calm(path, axis)


def test_a_watcher_comes_from_what_is_given_else_from_beside_the_axis_else_from_its_quartiles(tmp_path):
    model = tiny_model()
    axis, stem = quartiled(replace(axis_of(model), model=model.describe())), tmp_path / "axis"
    plain = watcher_of(axis, stem)
    assert (plain.baseline.mean, plain.baseline.spread) == (0.5, pytest.approx(2.0))
    assert plain.monitor() is None
    assert plain.describe()["alarm"] is None
    save_calm(tmp_path / "calm.json", axis, model.describe(), calm_conversations(axis), {})
    beside = watcher_of(axis, stem)
    assert beside.of == "calm conversations"
    assert beside == watcher_of(axis, tmp_path / "elsewhere" / "axis", tmp_path / "calm.json")
    other = tmp_path / "chats.jsonl"
    with pytest.raises(UserError, match=r"is no calm\.json"):
        watcher_of(axis, stem, other)
    traced = Calm(tuple(calm_conversations(axis, seed=1)), {})
    assert watcher_of(axis, stem, other, trace=lambda _: traced) == traced.watcher()


def test_too_few_calm_conversations_and_unknown_rules_are_refused():
    few = Calm(tuple(calm_conversations(None, samples=1)), {})
    with pytest.raises(UserError, match="20 calm conversations: 10 to calibrate an alarm on and 10"):
        few.watcher()
    with pytest.raises(UserError, match="'mean' is not one of cusum, several"):
        few.watcher("mean")
