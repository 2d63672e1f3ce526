"""ReferenceConversations conversations beside an axis: what an alarm is calibrated on, and on what its false alarms are counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny_axis import axis_of

from personatlas.analysis.drift_alarm import calibrate_rule, count_false_alarms, fit_reference
from personatlas.persona.errors import UserError
from personatlas.steering.drift_monitor import (
    RULES,
    ReferenceConversation,
    ReferenceConversations,
    direction_digest,
    load_monitor,
    load_reference,
    save_reference,
)


def reference_conversations(axis, scripts=20, samples=2, seed=0):
    """Two samples each of so many scripts in two domains, around where the axis begins."""
    draw = np.random.default_rng(seed)
    return [
        ReferenceConversation(f"{domain}-{n}/{sample}", domain, tuple(draw.normal(0, 3, 8).tolist()))
        for domain in ("coding", "writing")
        for n in range(scripts // 2)
        for sample in range(samples)
    ]


def quartiled(axis):
    levels = (0.25, 0.5, 0.75)
    rows = torch.tensor([[-1.349, 0.5, 1.349]] * len(axis.layers))
    return replace(axis, levels=levels, default_quantiles=rows, role_quantiles=rows)


def test_a_script_is_in_one_half_only_and_both_halves_hold_every_domain():
    rows = reference_conversations(None)
    fit, held = ReferenceConversations(tuple(rows), {}).split()
    assert len(fit) == len(held) == 20
    assert not {one.script for one in fit} & {one.script for one in held}
    assert {one.domain for one in fit} == {one.domain for one in held} == {"coding", "writing"}
    again, _ = ReferenceConversations(tuple(rows[::-1]), {}).split()
    assert {one.name for one in again} == {one.name for one in fit}


@pytest.mark.parametrize("name", ["cusum", "two_of_three"])
def test_false_alarms_are_counted_in_conversations_that_did_not_set_the_limit(name):
    calm = ReferenceConversations(tuple(reference_conversations(None, samples=6)), {})
    monitor = calm.monitor(name, 0.05)
    fit, held = ([one.projections for one in half] for half in calm.split())
    baseline = fit_reference([value for one in fit for value in one])
    assert monitor.reference == baseline
    assert monitor.rule == calibrate_rule(RULES[name](), fit, baseline, 0.05)
    assert monitor.false_alarms == count_false_alarms(monitor.rule, baseline, held)
    told = monitor.describe()["alarm"]
    assert (told["rule"], told["limit"], told["n"]) == (name, monitor.rule.limit, 60)
    alarm = monitor.start()
    assert [alarm.update(-100.0).alarm for _ in range(2)] == [name == "cusum", True]


def test_what_was_saved_is_loaded_and_anything_else_is_refused(tmp_path):
    model = tiny_model()
    axis, path = replace(axis_of(model), model=model.describe()), tmp_path / "reference.json"
    rows = reference_conversations(axis)
    save_reference(path, axis, model.describe(), rows, {"seeds": [0, 1]})
    assert json.loads(path.read_text())["direction"] == direction_digest(axis)
    assert (
        load_reference(path, axis, model.describe())
        == load_reference(path, axis)
        == ReferenceConversations(tuple(rows), {"seeds": [0, 1]})
    )
    with pytest.raises(UserError, match="record of reference conversations came from"):
        load_reference(path, axis, tiny_model(seed=1).describe())
    with pytest.raises(UserError, match="along another direction"):
        load_reference(path, replace(axis, vectors=-axis.vectors))
    whole = json.loads(path.read_text())
    for broken in (
        {"kind": "calm"},
        whole | {"conversations": [{"name": "a", "domain": "b", "projections": []}]},
    ):
        path.write_text(json.dumps(broken))
        with pytest.raises(UserError, match="is damaged"):
            load_reference(path, axis)
    path.write_text("[]")
    with pytest.raises(UserError, match="no record of reference"):
        load_reference(path, axis)


def test_a_monitor_comes_from_what_is_given_else_from_beside_the_axis_else_from_its_quartiles(tmp_path):
    model = tiny_model()
    axis = quartiled(replace(axis_of(model), model=model.describe(), stem=tmp_path / "axis"))
    plain = load_monitor(axis)
    assert (plain.reference.mean, plain.reference.std) == (0.5, pytest.approx(2.0))
    assert plain.start() is None
    assert plain.describe()["alarm"] is None
    for name in ("calm.json", "reference.json"):  # the first name is that of earlier versions
        save_reference(tmp_path / name, axis, model.describe(), reference_conversations(axis), {})
        beside = load_monitor(axis)
        assert beside.population == "reference conversations"
        assert beside == load_monitor(replace(axis, stem=None), tmp_path / name)
        (tmp_path / name).unlink()
    with pytest.raises(UserError, match=r"is no reference\.json"):
        load_monitor(axis, tmp_path / "chats.jsonl")


def test_too_few_reference_conversations_and_unknown_rules_are_refused():
    few = ReferenceConversations(tuple(reference_conversations(None, samples=1)), {})
    with pytest.raises(UserError, match="20 reference conversations: 10 to calibrate an alarm on and 10"):
        few.monitor()
    with pytest.raises(UserError, match="'mean' is not one of cusum, two_of_three"):
        few.monitor("mean")
