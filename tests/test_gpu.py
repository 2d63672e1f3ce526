"""On a GPU: the kernels against their plain twins, the captured decoder against the plain one, recording
against float64.
"""

import pytest
import torch
from engines import LONG, PROMPTS, Listener, alone
from families import tiny_model
from test_record import by_hand, made_up, recorded
from test_sampler import ENDS, SAMPLING, answers
from test_step import in_a_compiled_forward
from tiny_axis import axis_of

from personatlas.persona.interventions import Ablate, Add, Cap
from personatlas.persona.pipeline.record import span_sum, span_sum_plainly
from personatlas.persona.sampling.cuda_graph import GraphSampler
from personatlas.persona.sampling.next_token import draw_plainly, row_noise
from personatlas.persona.sampling.sampler import PlainDecoder, Sampler
from personatlas.steering.hooks.account import Account, Batch, accumulate
from personatlas.steering.hooks.binding_check import run_cap_test
from personatlas.steering.hooks.step import apply_bounds, apply_table, gather_bounds
from personatlas.steering.hooks.tables import build_tables
from personatlas.steering.serve.engine.scheduler import Engine, EngineLimits, GenerationRequest, PrefillEvent
from personatlas.steering.traces import trace_answer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
FAMILIES = ("llama", "qwen3", "gemma2", "gemma3", "mistral", "gpt2", "falcon", "mixtral")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0])
def test_the_draw_is_that_of_the_plain_twin(dtype, top_p):
    torch.manual_seed(0)
    logits = (torch.randn(512, 49152, device="cuda") * 3 + 2).to(dtype)
    logits[:100] *= 3
    noise = row_noise(torch.randint(0, 2**62, (512,)), torch.arange(512)).cuda()
    from personatlas.persona.sampling.kernels import draw_on_gpu

    same = draw_on_gpu(logits, noise, 0.7, top_p) == draw_plainly(logits, noise, 0.7, top_p)
    # a token at the very edge of the nucleus may fall on either side: the masses are added in another order
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d_model", [576, 4096, 100])
def test_span_sums_are_those_of_the_plain_twin(dtype, d_model):
    h = torch.randn(64, 300, d_model, device="cuda").to(dtype)
    start = torch.randint(1, 150, (64,), device="cuda")
    stop = start + torch.randint(1, 150, (64,), device="cuda")
    assert torch.allclose(span_sum(h, start, stop), span_sum_plainly(h, start, stop), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "window"), [(9, 3, 64, 0), (8, 1, 128, 40), (16, 16, 32, 0)]
)
def test_slot_attention_is_masked_attention(dtype, heads, key_heads, width, window):
    from personatlas.persona.sampling.kernels import attend_on_gpu

    query = torch.randn(100, heads, width, device="cuda").to(dtype)
    keys, values = (torch.randn(100, key_heads, 256, width, device="cuda").to(dtype) for _ in range(2))
    positions, columns = torch.randint(0, 256, (100,), device="cuda"), torch.arange(256, device="cuda")
    mask = columns <= positions[:, None]
    if window:
        mask &= columns > positions[:, None] - window
    groups = heads // key_heads
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None].double(),
        keys.double().repeat_interleave(groups, 1),
        values.double().repeat_interleave(groups, 1),
        attn_mask=mask[:, None, None],
        scale=width**-0.5,
    )[:, :, 0]
    found = attend_on_gpu(query, keys, values, positions, width**-0.5, window).double()
    assert (found - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_captured_decoder_answers_as_reading_the_whole_text_does(family):
    model = tiny_model(family, device="cuda")
    plain = Sampler(model, ENDS, SAMPLING)
    plain.decoder = PlainDecoder
    captured = GraphSampler(model, ENDS, SAMPLING, slots=3)
    expected = answers(plain)
    assert captured.decoder is not PlainDecoder
    assert answers(captured) == expected
    assert answers(captured) == expected  # replayed without another capture
    assert model.hf.config._attn_implementation != "personatlas_slots"


@pytest.mark.filterwarnings("ignore:TensorFloat32")  # the compiler's advice; exactness is what is tested
@pytest.mark.filterwarnings(r"ignore:\s*Online softmax")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_recorded_means_equal_a_float64_mean(family, compile):
    model, rollouts = tiny_model(family, device="cuda"), made_up()
    reference = torch.stack([by_hand(model, rollout).cpu() for rollout in rollouts])
    for tokens in (64, 4096):
        found = recorded(model, rollouts, tokens=tokens, compile=compile).double()
        assert ((found - reference).norm(dim=-1) / reference.norm(dim=-1)).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("d_model", "tokens", "n_plans"), [(576, 1, 3), (4096, 1, 1), (100, 17, 2), (576, 40, 4)]
)
def test_the_steering_kernel_is_its_plain_twin(dtype, d_model, tokens, n_plans):
    generator = torch.Generator().manual_seed(tokens)
    vectors = torch.nn.functional.normalize(torch.randn(3, d_model, generator=generator), dim=1)
    floors = torch.randn(n_plans, 3, generator=generator)
    plans = [
        [Cap((0,), vectors[:1], floors[i, :1]), Add((0,), vectors[1:2], floors[i, 1:2], phase="answer")]
        for i in range(n_plans)
    ]
    plans[0].append(Ablate((0,), vectors[2:], phase="prompt", spare_first=True))
    table = build_tables(plans).at(0).to(torch.device("cuda"))
    rows = 33
    h = torch.randn(rows, tokens, d_model, generator=generator).to("cuda", dtype)
    numbers = [
        torch.randint(0, high, (rows,), generator=generator).cuda()
        for high in (n_plans + 1, tokens + 1, tokens + 1, 2)
    ]
    for slots in (None, torch.randperm(rows, generator=generator).cuda()):
        batch = Batch(*numbers, slots)
        accounts = [Account.empty(1, rows, h.device) for _ in range(2)]
        for _ in range(2):  # the second adds to the first
            expected, done = apply_bounds(h, table.vectors, gather_bounds(table, batch, tokens))
            accumulate(accounts[0], slots, [(0, done)])
            found, own = apply_table(h, table, batch, accounts[1].at(0))
            if own is not None:
                accumulate(accounts[1], slots, [(0, own)])
        torch.testing.assert_close(found, expected, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-5)
        left = done.length == 0
        assert torch.equal(found[left], h[left])
        for one, other in zip(*(account.columns for account in accounts), strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_capping_binds_in_the_captured_decoder(family):
    model = tiny_model(family, device="cuda")
    checks = run_cap_test(model, axis_of(tiny_model(family)))
    assert [(check.name, check.found) for check in checks if not check.passed] == []


def test_a_compiled_forward_is_steered_and_changed_without_compiling_again():
    assert "steered, compiled once, changed in place" in in_a_compiled_forward("cuda")


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_in_captured_steps_get_what_they_would_get_alone(family):
    model = tiny_model(family, device="cuda")
    axis, listener = axis_of(tiny_model(family)), Listener()
    engine = Engine(
        model,
        ENDS,
        axis,
        {"mild": axis.quantile_cap((0, 1), 0.5)},
        EngineLimits(slots=6, context=256),
        listener,
    )
    cap = engine.arms.resolve("mild")
    asks = [
        GenerationRequest(
            ids,
            seed=n,
            temperature=(0.7, 0.0)[n % 2],
            top_p=(0.9, 1.0, 0.5)[n % 3],
            max_tokens=9,
            arm=(None, cap)[n % 2],
        )
        for n, ids in enumerate([*PROMPTS, LONG] * 3)
    ]
    engine.start()
    tickets = [engine.submit(ask) for ask in asks]
    ended = listener.ended(tickets, 120.0)
    engine.close()
    assert [one.error for one in ended if one.error is not None] == []
    got = [listener.answer(ticket) for ticket in tickets]
    expected = [alone(engine, a.ids, a.arm, a.seed, a.max_tokens, a.temperature, a.top_p).ids for a in asks]
    same = sum(one == other for one, other in zip(got, expected, strict=True))
    assert same >= len(asks) - 1  # sums in another order may turn one draw
    for ask, ticket, ids in zip(asks, tickets, got, strict=True):
        read = torch.tensor(listener.first(ticket, PrefillEvent).projections)
        again = trace_answer(model, ask.ids, ids, cap.interventions if ask.arm else [], axis).projection
        torch.testing.assert_close(read, again[: len(read)], rtol=1e-3, atol=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")
@pytest.mark.parametrize("family", FAMILIES)
def test_models_on_two_cards_answer_alike_in_one_process_and_leave_the_current_card(family):
    before, found = torch.cuda.current_device(), []
    models = [tiny_model(family, device=device) for device in ("cuda:0", "cuda:1")]
    for model in models:
        captured = GraphSampler(model, ENDS, SAMPLING, slots=3)
        checks = run_cap_test(model, axis_of(tiny_model(family)))
        assert [(check.name, check.found) for check in checks if not check.passed] == []
        found.append(answers(captured))
        rollouts = made_up()
        reference = torch.stack([by_hand(model, rollout).cpu() for rollout in rollouts])
        means = recorded(model, rollouts, tokens=64, compile=False).double()
        assert ((means - reference).norm(dim=-1) / reference.norm(dim=-1)).max() < 1e-5
    assert found[0] == found[1]
    assert torch.cuda.current_device() == before
