"""ReferenceConversations conversations beside an axis: what an alarm is calibrated on, and on what its false alarms are counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import tiny_model
from tiny_axis import axis_of

from personatlas.analysis.drift_alarm import calibrate_rule, false_alarms, first_alarm, fit_reference
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


def reference_conversations(axis, scripts=40, samples=2, seed=0):
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


def test_scripts_have_an_order_that_only_their_names_make():
    rows = reference_conversations(None)
    scripts = ReferenceConversations(tuple(rows), {}).scripts
    assert len(scripts) == 40
    assert ReferenceConversations(tuple(rows[::-1]), {}).scripts == scripts


@pytest.mark.parametrize("name", ["cusum", "two_of_three"])
def test_false_alarms_are_counted_with_limits_that_other_scripts_set(name):
    calm = ReferenceConversations(tuple(reference_conversations(None, samples=3)), {})
    monitor = calm.monitor(name, 0.05)
    every = [one.projections for one in calm.conversations]
    assert monitor.reference == fit_reference(every)
    scripts = [one.script for one in calm.conversations]
    assert monitor.rule == calibrate_rule(RULES[name](), every, scripts, monitor.reference, 0.05)
    assert sorted(script for fold in monitor.folds for script in fold.scripts) == sorted(set(scripts))
    firsts = []
    for one in calm.conversations:
        others = [own for own in calm.conversations if own.script not in fold_of(monitor, one.script).scripts]
        projections = [own.projections for own in others]
        reference = fit_reference(projections)
        rule = calibrate_rule(RULES[name](), projections, [own.script for own in others], reference, 0.05)
        alarm = monitor.start(one.script)
        assert (alarm.rule, alarm.reference) == (rule, reference)
        firsts.append(first_alarm(rule, reference, one.projections))
    assert monitor.false_alarms == false_alarms(firsts, [8] * len(firsts), scripts)
    described = monitor.describe()["alarm"]
    assert (described["rule"], described["limit"], described["n"]) == (name, monitor.rule.limit, 120)
    alarm = monitor.start()
    assert [alarm.update(-100.0).alarm for _ in range(2)] == [name == "cusum", True]


def fold_of(monitor, script):
    return next(fold for fold in monitor.folds if script in fold.scripts)


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
    (tmp_path / "chats.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"is no reference\.json"):
        load_monitor(axis, tmp_path / "chats.jsonl")


def test_too_few_reference_conversations_and_unknown_rules_are_refused():
    few = ReferenceConversations(tuple(reference_conversations(None, scripts=20)), {})
    with pytest.raises(UserError, match=r"of 20 scripts; .* in other scripts 22 are the fewest"):
        few.monitor()
    with pytest.raises(UserError, match="'mean' is not one of cusum, two_of_three"):
        few.monitor("mean")
