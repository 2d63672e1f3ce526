"""The engine that serves, when forwards fail: what was in them ends with an error, once, and everything else goes on."""

import time

from engines import LONG, PROMPTS, alone

from personatlas.steering.hooks.account import HookDidNotFire
from personatlas.steering.serve.engine import scheduler as engine_module
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.scheduler import EngineLimits, FinishEvent, GenerationRequest


def test_a_hook_that_goes_silent_is_an_error_of_the_answer_and_not_of_the_engine(served, monkeypatch):
    engine, listener = served(ends=frozenset())
    cap = engine.arms.resolve("mild")
    monkeypatch.setattr(
        engine.arms.steering,
        "restrict_layers",
        lambda _layers: engine.arms.steering.hooks.__dict__.update(restricted_to=frozenset()),
    )
    ticket = engine.submit(GenerationRequest(PROMPTS[2], max_tokens=5, arm=cap))
    (ended,) = listener.ended([ticket])
    assert ended.reason == "error"
    assert isinstance(ended.error, HookDidNotFire)
    well = engine.submit(GenerationRequest(PROMPTS[2], max_tokens=5))
    assert listener.ended([well])[0].reason == "length"


def test_a_forward_that_fails_ends_its_rows_and_the_engine_lives(served, monkeypatch):
    engine, listener = served(ends=frozenset())
    fails = iter([True])

    def advance(*given):
        if next(fails, False):
            raise RuntimeError("out of memory")
        return whole(*given)

    whole = engine.batch._advance
    monkeypatch.setattr(engine.batch, "_advance", advance)
    ticket = engine.submit(GenerationRequest(PROMPTS[2], max_tokens=5))
    (ended,) = listener.ended([ticket])
    assert (ended.reason, str(ended.error)) == ("error", "out of memory")
    again = engine.submit(GenerationRequest(PROMPTS[2], seed=4, max_tokens=5))
    assert listener.ended([again])[0].reason == "length"
    engine.close()
    assert listener.answer(again) == alone(engine, PROMPTS[2], None, 4, 5, 1.0, 1.0).ids


def fail_once(monkeypatch, module, after=0):
    """The module's forward raises at its call number `after` from now on, once."""
    whole, calls = module.forward, iter(range(10**6))

    def forward(*given, **named):
        if next(calls) == after:
            raise RuntimeError("out of memory")
        return whole(*given, **named)

    monkeypatch.setattr(module, "forward", forward)


def test_a_failure_between_two_capped_layers_leaves_nothing_behind(served, monkeypatch):
    """What the first layer had done stayed in the account, and no capped forward of another shape came through any more."""
    engine, listener = served(ends=frozenset())
    cap = engine.arms.resolve("mild")
    fail_once(monkeypatch, engine.model.blocks[1])
    broken = engine.submit(GenerationRequest(PROMPTS[5], seed=4, max_tokens=5, arm=cap))
    assert listener.ended([broken])[0].reason == "error"
    asks = [
        GenerationRequest(PROMPTS[2], seed=4, max_tokens=5, arm=cap),
        GenerationRequest(PROMPTS[3], seed=4, max_tokens=5),
        GenerationRequest(LONG, max_tokens=5, arm=cap),
    ]
    tickets = [engine.submit(ask) for ask in asks]
    assert {one.reason for one in listener.ended(tickets)} == {"length"}
    engine.close()
    assert listener.answer(tickets[0]) == alone(engine, PROMPTS[2], cap, 4, 5, 1.0, 1.0).ids


def test_a_failure_within_a_long_prompt_leaves_the_others_where_they_were(served, monkeypatch):
    """The prompts read after it went into the slot of the one that had failed, and rows decoded over somebody else's words."""
    monkeypatch.setattr(engine_module, "CHUNK_CPU", 16)
    engine, listener = served(EngineLimits(slots=4, context=256, prefix_bytes=0), ends=frozenset())
    talking = engine.submit(GenerationRequest(PROMPTS[1], seed=5, max_tokens=200))
    listener.first(talking, TokenEvent)
    whole, calls = engine.batch.decoder.read_on, iter(range(10**6))

    def read_on(*given):
        if next(calls) == 1:
            fail_once(monkeypatch, engine.model.blocks[0])
        whole(*given)

    monkeypatch.setattr(engine.batch.decoder, "read_on", read_on)
    long = engine.submit(GenerationRequest(LONG, seed=6, max_tokens=3))
    assert [one.reason for one in listener.ended([long, talking])] == ["error", "error"]
    again = [engine.submit(GenerationRequest(PROMPTS[4], seed=7, max_tokens=8)) for _ in range(2)]
    listener.ended(again)
    engine.close()
    assert {listener.answer(one) for one in again} == {alone(engine, PROMPTS[4], None, 7, 8, 1.0, 1.0).ids}


def test_when_one_of_several_cannot_be_read_each_ends_once(served, monkeypatch):
    engine, listener = served(EngineLimits(slots=4, context=256, prefix_bytes=0), ends=frozenset())
    opened, fails = engine.batch.open, iter([True])

    def open_(*given):
        if next(fails, False):
            raise RuntimeError("out of memory")
        opened(*given)

    monkeypatch.setattr(engine.batch, "open", open_)
    cap = engine.arms.resolve("mild")
    read = engine._read

    def read_all_at_once():
        while engine.queued < 3 and next(late, False):
            time.sleep(0.01)
            engine._receive()
        read()

    late = iter([True] * 100)
    monkeypatch.setattr(engine, "_read", read_all_at_once)
    asks = [
        GenerationRequest(PROMPTS[2], seed=1, max_tokens=4, arm=cap),
        GenerationRequest(LONG, max_tokens=0, arm=cap),
        GenerationRequest(PROMPTS[3], seed=1, max_tokens=4, arm=cap),
    ]
    tickets = [engine.submit(ask) for ask in asks]
    assert [one.reason for one in listener.ended(tickets)] == ["length", "error", "length"]
    engine.close()
    assert [sum(isinstance(event, FinishEvent) for event in listener.events[one]) for one in tickets] == [
        1,
        1,
        1,
    ]
    assert engine.arms.rows_in_use == 0


def test_what_cannot_be_kept_ends_nobody(served, monkeypatch):
    engine, listener = served(ends=frozenset())

    def prefix_of(*_given):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(engine.batch, "prefix_of", prefix_of)
    gone = engine.submit(GenerationRequest(LONG, max_tokens=100))
    listener.first(gone, TokenEvent)
    gone.cancel()
    well = engine.submit(GenerationRequest(PROMPTS[5], max_tokens=5))
    assert [one.reason for one in listener.ended([gone, well])] == ["cancelled", "length"]
    assert engine.alive
