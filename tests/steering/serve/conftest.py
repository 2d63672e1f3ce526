"""Fixtures of the server's tests."""

import pytest
from engines import ENDS, Listener
from families import tiny_model
from tiny_axis import axis_of

from personatlas.steering.arms import Arm
from personatlas.steering.serve.engine.scheduler import Engine, EngineLimits


@pytest.fixture
def served():
    """engine(room, arms) on the tiny model, closed at the end."""
    opened = []

    def make(room=EngineLimits(slots=4, context=256), family="llama", ends=ENDS, arms=True):
        model = tiny_model(family)
        axis, listener = axis_of(model), Listener()
        caps = {"mild": axis.quantile_cap((0, 1), 0.5), "firm": axis.quantile_cap((1,), 0.75)}
        named = [Arm(name, (cap,)) for name, cap in caps.items()] if arms else []
        engine = Engine(model, ends, axis, named, room, listener)
        engine.start()
        opened.append(engine)
        return engine, listener

    yield make
    for engine in opened:
        engine.close()
        assert not any(block._forward_hooks for block in engine.model.blocks)
