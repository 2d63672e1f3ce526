"""The engine that serves: rows come, go and are given up, and each gets what it would get alone."""

import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from engines import ENDS, LONG, PROMPTS, alone
from families import tiny_model
from tiny_axis import axis_of

from personatlas.persona.errors import UserError
from personatlas.persona.models.detokenizer import Detokenizer
from personatlas.persona.sampling import kv_cache
from personatlas.steering.arms import Arm
from personatlas.steering.hooks.steering import steer
from personatlas.steering.serve.answer_stream import StreamedAnswer
from personatlas.steering.serve.engine import batch as batch_module
from personatlas.steering.serve.engine import scheduler as engine_module
from personatlas.steering.serve.engine.arm_slots import SPARE_PLANS, ArmSlots
from personatlas.steering.serve.engine.batch import TokenEvent
from personatlas.steering.serve.engine.prefix_cache import CachedPrefix, PrefixCache
from personatlas.steering.serve.engine.scheduler import (
    EngineLimits,
    FinishEvent,
    GenerationRequest,
    PrefillEvent,
    ServerBusy,
)
from personatlas.steering.serve.options import CapacityOptions
from personatlas.steering.serve.schema import CapByName, PersonaRequest
from personatlas.steering.serve.startup import _engine_limits
from personatlas.steering.traces import trace_answer


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "falcon", "mixtral", "mistral", "rwkv"])
def test_every_row_of_a_full_engine_gets_what_it_would_get_alone(served, family):
    engine, listener = served(family=family)
    caps = [None, engine.arms.resolve("mild"), engine.arms.resolve("firm")]
    prompts = [*PROMPTS, LONG]
    asks = [
        GenerationRequest(
            ids,
            seed=n,
            temperature=(0.7, 0.0, 1.3)[n % 3],
            top_p=(0.9, 1.0)[n % 2],
            max_tokens=10,
            arm=caps[n % 3],
        )
        for n, ids in enumerate(prompts)
    ]
    tickets = [engine.submit(ask) for ask in asks]
    listener.ended(tickets)
    got = [listener.answer(ticket) for ticket in tickets]
    engine.close()  # its hooks are off
    assert got == [
        alone(engine, a.ids, a.arm, a.seed, a.max_tokens, a.temperature, a.top_p).ids for a in asks
    ]


@pytest.mark.parametrize("family", ["llama", "rwkv"])
def test_projections_and_firings_are_those_of_reading_it_all_again(served, family):
    engine, listener = served(family=family, ends=frozenset())
    cap = engine.arms.resolve("mild")
    tickets = [
        engine.submit(GenerationRequest(ids, seed=3, max_tokens=9, arm=cap)) for ids in (PROMPTS[3], LONG)
    ]
    listener.ended(tickets)
    engine.close()
    for ticket in tickets:
        read = listener.first(ticket, PrefillEvent)
        steps = [event for event in listener.events[ticket] if isinstance(event, TokenEvent)]
        again = trace_answer(
            engine.model, ticket.request.ids, listener.answer(ticket), cap.interventions, engine.arms.axis
        )
        got = torch.tensor([*read.projections, *(step.projection for step in steps)])
        assert torch.allclose(got, again.projection[:-1], atol=1e-4)
        fired = again.fired_layers[len(ticket.request.ids) - 1 : -1].tolist()
        assert [step.fired for step in steps] == fired
        assert read.fired == int(again.fired_layers[: len(ticket.request.ids) - 1].sum())
        assert sum(fired) > 0


def test_a_conversation_that_goes_on_is_not_read_again_and_says_the_same(served):
    engine, listener = served(ends=frozenset())
    (first,) = [engine.submit(GenerationRequest(LONG, seed=1, max_tokens=8))]
    listener.ended([first])
    longer = (*LONG, *listener.answer(first), *PROMPTS[2])
    kept = engine.submit(GenerationRequest(longer, seed=2, max_tokens=8))
    listener.ended([kept])
    assert listener.first(kept, PrefillEvent).cached == len(LONG) + 7  # the last token was never fed
    engine.prefixes.clear()
    fresh = engine.submit(GenerationRequest(longer, seed=2, max_tokens=8))
    listener.ended([fresh])
    assert listener.first(fresh, PrefillEvent).cached == 0
    assert listener.answer(fresh) == listener.answer(kept)
    one, other = (torch.tensor(listener.first(ticket, PrefillEvent).projections) for ticket in (kept, fresh))
    assert torch.allclose(one, other, atol=1e-4)


def test_what_a_cap_changed_never_serves_a_row_without_it(served):
    engine, listener = served(ends=frozenset())
    cap = engine.arms.resolve("mild")
    for wanted, kept in (
        (cap, False),
        (None, False),
        (cap, True),
        (None, True),
        (engine.arms.resolve("firm"), False),
    ):
        ticket = engine.submit(GenerationRequest(LONG, seed=1, max_tokens=4, arm=wanted))
        listener.ended([ticket])
        assert (listener.first(ticket, PrefillEvent).cached > 0) == kept
    engine.close()
    assert (
        listener.answer(ticket)
        == alone(engine, LONG, ticket.request.arm, seed=1, max_tokens=4, temperature=1.0, top_p=1.0).ids
    )


def test_a_prompt_can_be_read_without_an_answer(served):
    engine, listener = served()
    ticket = engine.submit(GenerationRequest(LONG, max_tokens=0))
    assert listener.ended([ticket]) == [FinishEvent("read")]
    answer = StreamedAnswer(0, ticket, Detokenizer(engine.model.tokenizer), ENDS)
    for event in listener.events[ticket]:
        answer.take(event)
    engine.close()
    read = trace_answer(engine.model, LONG, (), [], engine.arms.axis).projection
    assert torch.allclose(torch.tensor(answer.prompt_projections), read, atol=1e-4)
    assert answer.ids == []


def test_cancelling_frees_the_slot_and_leaves_the_others_alone(served):
    engine, listener = served(EngineLimits(slots=2, context=256, prefix_bytes=0), ends=frozenset())
    stay = engine.submit(GenerationRequest(PROMPTS[1], seed=5, max_tokens=60))
    gone = engine.submit(GenerationRequest(PROMPTS[2], seed=6, max_tokens=200))
    waits = engine.submit(GenerationRequest(PROMPTS[3], seed=7, max_tokens=5))
    never = engine.submit(GenerationRequest(PROMPTS[4], seed=8, max_tokens=5))
    never.cancel()
    listener.first(gone, TokenEvent)
    gone.cancel()
    gone.cancel()
    ended = listener.ended([stay, gone, waits, never])
    assert [one.reason for one in ended] == ["length", "cancelled", "length", "cancelled"]
    assert not any(isinstance(event, TokenEvent) for event in listener.events[never])
    assert engine.running == 0
    assert engine.queued == 0
    engine.close()
    assert listener.answer(stay) == alone(engine, PROMPTS[1], None, 5, 60, 1.0, 1.0).ids


def test_a_long_prompt_is_read_in_pieces_while_others_go_on(served, monkeypatch):
    monkeypatch.setattr(engine_module, "CHUNK_CPU", 16)
    engine, listener = served(ends=frozenset())
    talking = engine.submit(GenerationRequest(PROMPTS[1], seed=5, max_tokens=120))
    listener.first(talking, TokenEvent)
    order = []
    engine.listener = lambda told: (
        order.extend(type(event) for ticket, event in told if ticket is talking),
        listener(told),
    )
    long = engine.submit(GenerationRequest(LONG, seed=6, max_tokens=3))
    listener.first(long, PrefillEvent)
    between = len(order)
    listener.ended([talking, long])
    assert between >= 5  # 89 tokens are six pieces: the other row stepped between them
    engine.close()
    assert listener.answer(long) == alone(engine, LONG, None, 6, 3, 1.0, 1.0).ids


def test_described_caps_share_the_spare_plans_and_wait_for_one(served):
    engine, listener = served(EngineLimits(slots=8, context=256), ends=frozenset())
    wanted = [engine.arms.resolve(CapByName(name="mild", shift=0.1 * n)) for n in range(1, SPARE_PLANS + 3)]
    asks = [GenerationRequest(PROMPTS[2], seed=n, max_tokens=12, arm=cap) for n, cap in enumerate(wanted)]
    tickets = [engine.submit(ask) for ask in asks]
    listener.ended(tickets)
    engine.close()
    assert [listener.answer(one) for one in tickets] == [
        alone(engine, ask.ids, ask.arm, ask.seed, 12, 1.0, 1.0).ids for ask in asks
    ]


def test_who_waits_for_a_spare_plan_holds_up_nobody_else(served):
    engine, listener = served(EngineLimits(slots=8, context=256), ends=frozenset())
    shifted = [engine.arms.resolve(CapByName(name="mild", shift=0.1 * n)) for n in range(1, SPARE_PLANS + 2)]
    held = [
        engine.submit(GenerationRequest(PROMPTS[2], seed=n, max_tokens=200, arm=cap))
        for n, cap in enumerate(shifted)
    ]
    plain = engine.submit(GenerationRequest(PROMPTS[2], max_tokens=3))
    listener.ended([plain])
    assert not isinstance(listener.events[held[0]][-1], FinishEvent)
    for ticket in held:
        ticket.cancel()
    listener.ended(held)


def test_a_conversation_under_uneven_floors_does_not_depend_on_what_is_kept(served):
    """As part of the next prompt an answer has the prompt's floor: its keys from when it was spoken are another text's."""
    engine, listener = served(ends=frozenset())
    mild = engine.arms.resolve("mild").interventions[0]
    uneven = replace(mild, prompt_floor=mild.floor - 0.5)
    wanted = Arm("uneven", (uneven,))
    (first,) = [engine.submit(GenerationRequest(LONG, seed=1, max_tokens=12, arm=wanted))]
    listener.ended([first])
    longer = (*LONG, *listener.answer(first), *PROMPTS[2])
    kept = engine.submit(GenerationRequest(longer, seed=2, max_tokens=4, arm=wanted))
    listener.ended([kept])
    engine.prefixes.clear()
    fresh = engine.submit(GenerationRequest(longer, seed=2, max_tokens=4, arm=wanted))
    listener.ended([fresh])
    assert listener.first(kept, PrefillEvent).cached == len(LONG)
    one, other = (torch.tensor(listener.first(ticket, PrefillEvent).projections) for ticket in (kept, fresh))
    assert torch.allclose(one, other, atol=1e-4)


def test_many_requests_with_some_given_up_leave_nothing_behind(served):
    engine, listener = served(EngineLimits(slots=4, context=64, prefix_bytes=2**20))
    tickets = []
    for n in range(300):
        tickets.append(
            engine.submit(
                GenerationRequest(
                    PROMPTS[n % 7],
                    seed=n,
                    max_tokens=1 + n % 6,
                    arm=engine.arms.resolve("mild") if n % 2 else None,
                )
            )
        )
        if n % 10 == 0:
            tickets[-1].cancel()
    listener.ended(tickets)
    assert {one[-1].reason for one in listener.events.values()} <= {"end", "length", "cancelled"}
    assert (engine.running, engine.queued, len(engine.batch.rows)) == (0, 0, 0)
    assert engine.arms.rows_in_use == 0
    assert engine.prefixes.nbytes <= 2**20


def test_what_does_not_fit_is_refused_before_it_waits(served):
    engine, _ = served(EngineLimits(slots=1, context=64, queue=2), ends=frozenset())
    with pytest.raises(UserError, match="90 tokens to read and 1 to write are more than the 64"):
        engine.submit(GenerationRequest(LONG))
    with pytest.raises(UserError, match="empty prompt"):
        engine.submit(GenerationRequest(()))
    asks = [GenerationRequest(PROMPTS[0], max_tokens=50)] * 50
    with pytest.raises(ServerBusy, match="are waiting, which is the most"):
        [engine.submit(ask) for ask in asks]


def test_closing_ends_everything_with_an_error_that_says_so(served):
    engine, listener = served(ends=frozenset())
    tickets = [engine.submit(GenerationRequest(PROMPTS[1], max_tokens=200)) for _ in range(9)]
    listener.first(tickets[0], TokenEvent)
    began = time.perf_counter()
    engine.close()
    assert time.perf_counter() - began < 5
    assert {str(one.error) for one in listener.ended(tickets)} == {"the server is ending"}
    with pytest.raises(ServerBusy):
        engine.submit(GenerationRequest(PROMPTS[0]))


def test_log_probabilities_are_those_of_the_model(served):
    engine, listener = served(ends=frozenset())
    ticket = engine.submit(GenerationRequest(PROMPTS[3], seed=1, max_tokens=6, logprobs=4))
    plain = engine.submit(GenerationRequest(PROMPTS[2], seed=1, max_tokens=6))
    listener.ended([ticket, plain])
    engine.close()
    ids = [*PROMPTS[3], *listener.answer(ticket)]
    logits = engine.model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    scores = logits[len(PROMPTS[3]) - 1 : -1].float().log_softmax(-1)
    steps = [event for event in listener.events[ticket] if isinstance(event, TokenEvent)]
    for step, line in zip(steps, scores, strict=True):
        assert step.logprobs[0] == pytest.approx(float(line[step.token]), abs=1e-4)
        assert list(step.logprobs[1].values()) == pytest.approx(line.topk(4).values.tolist(), abs=1e-4)
    assert all(event.logprobs is None for event in listener.events[plain] if isinstance(event, TokenEvent))


def test_a_text_is_scored_with_its_plan_between_the_steps_of_others(served, monkeypatch):
    monkeypatch.setattr(batch_module, "SCORED_CPU", 16)
    engine, listener = served(ends=frozenset())
    cap = engine.arms.resolve("mild")
    talking = engine.submit(
        GenerationRequest(PROMPTS[1], seed=5, max_tokens=60, arm=engine.arms.resolve("firm"))
    )
    listener.first(talking, TokenEvent)
    gone, scored = (engine.score(GenerationRequest(LONG, arm=cap, logprobs=2)) for _ in range(2))
    assert gone.cancel()
    found = [scored.result(20)]
    listener.ended([talking])
    engine.close()
    assert engine.arms.rows_in_use == 0
    with steer(engine.model, cap.interventions) as held:
        held.describe(torch.tensor([len(LONG)]), torch.tensor([len(LONG)]))
        scores = engine.model.hf(input_ids=torch.tensor([LONG]), use_cache=False).logits[0].log_softmax(-1)
    own = [float(scores[at, id]) for at, id in enumerate(LONG[1:])]
    assert found[0][0] == (None, {})
    assert [one for one, _ in found[0][1:]] == pytest.approx(own, abs=1e-4)
    assert listener.answer(talking) == alone(engine, PROMPTS[1], talking.request.arm, 5, 60, 1.0, 1.0).ids


@pytest.mark.parametrize("cap", ["../../etc/passwd", "/etc/passwd", "mild.json", "p50@99", "p50@0,0", "p50@", "p101@0", "mild+99", {}, {"name": "x"}, {"level": 3, "layers": "1"}, {"level": "p50", "layers": "x"}, {"name": "mild", "shift": float("nan")}, 7])  # fmt: skip
def test_what_is_no_cap_is_one_line_and_never_a_path(cap):
    model = tiny_model()
    axis = axis_of(model)
    slots = ArmSlots(axis, model, [Arm("mild", (axis.quantile_cap((0, 1), 0.5),))])
    with pytest.raises(ValueError):  # noqa: PT011 (of the schema or of the slots)
        slots.resolve(PersonaRequest(cap=cap).cap)


def prefix(digest, ids):
    return CachedPrefix(
        digest, np.array(ids), (0.0,) * len(ids), [(torch.zeros(2, len(ids), 4), torch.zeros(2, len(ids), 4))]
    )


def test_prefixes_keep_the_longest_and_forget_the_least_used():
    one = prefix("a", range(20)).nbytes
    kept = PrefixCache(capacity=3 * one)
    kept.add(prefix("a", range(20)))
    kept.add(prefix("b", range(20)))
    assert kept.longest("c", range(30)) is None
    assert kept.longest("a", [*range(18), 99, 98])[1] == 18
    assert kept.longest("a", range(20))[1] == 19  # one is left to feed
    assert kept.longest("a", range(10)) is None
    kept.add(prefix("a", range(30)))  # continues the first, and takes its place
    assert len(kept) == 2
    kept.add(prefix("c", range(100, 130)))
    assert kept.nbytes <= kept.capacity
    assert kept.longest("b", range(20)) is None
    kept.add(prefix("d", range(1000)))
    assert kept.longest("d", range(1000)) is None


STOPS = ("\n\n", "END", "é!")


@pytest.mark.parametrize(
    "text", ["Hello there", "one\n\ntwo", "a\nb END c", "café!", "naïve — 日本語 🦜 ok", "EN EN END", "\n"]
)
def test_what_is_spoken_in_pieces_is_the_whole_text_up_to_a_stop(text):
    tokenizer = tiny_model().tokenizer
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    plain, stopped = Detokenizer(tokenizer), Detokenizer(tokenizer, STOPS)
    pieces = [plain.add(id) for id in ids] + [plain.flush()]
    assert "".join(pieces) == plain.text == tokenizer.decode(ids)
    assert not any(piece.endswith("\ufffd") for piece in pieces)
    for id in ids:
        stopped.add(id)
    stopped.flush()
    ends = [at for stop in STOPS if (at := text.find(stop)) >= 0]
    assert stopped.text == (text[: min(ends)] if ends else text)
    assert stopped.stopped == bool(ends)


def test_slots_and_served_contexts_share_one_reckoning_of_memory(monkeypatch):
    model = tiny_model()
    config = model.hf.config
    token = 2 * model.n_layers * config.num_key_value_heads * config.head_dim * model.dtype.itemsize
    monkeypatch.setattr(kv_cache, "CPU_BYTES", 1000 * token + 1)
    assert kv_cache.fitting_tokens(model, 0.5) == 1000
    limits = _engine_limits(model, CapacityOptions(slots=4))
    assert limits.context == 128  # of 1,000 tokens for 4 slots, a prompt and a text to score, in steps of 64
