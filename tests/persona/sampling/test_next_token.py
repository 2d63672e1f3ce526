"""The sampler: right distribution, exact nucleus, and noise that depends on seed, step and token alone."""

import numpy as np
import pytest
import torch

from personatlas.persona.sampling.next_token import draw, draw_plainly, row_noise


def nucleus(logits, temperature, top_p):
    """The reference, in float64: ids of the smallest set of most likely tokens that holds top_p, ties with its last included."""
    scaled = logits.double().numpy() / temperature
    p = np.exp(scaled - scaled.max())
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    last = order[np.searchsorted(np.cumsum(p[order]), top_p - 1e-12)]
    return set(np.flatnonzero(p >= p[last] - 1e-15)), p


def rows(n, seed=0):
    return torch.arange(n) * 7919 + seed, torch.zeros(n, dtype=torch.long)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0])
@pytest.mark.parametrize("vocabulary", [7, 300, 2000])
def test_a_draw_never_leaves_the_nucleus(spread, vocabulary):
    torch.manual_seed(0)
    logits = torch.randn(1, vocabulary) * spread
    allowed, _ = nucleus(logits[0], 0.7, 0.9)
    drawn = draw(logits.expand(400, -1), *rows(400), 0.7, 0.9)
    assert set(drawn.tolist()) <= allowed


def test_draws_follow_the_renormalised_nucleus():
    torch.manual_seed(1)
    logits = torch.randn(1, 40) * 1.5
    allowed, p = nucleus(logits[0], 0.7, 0.9)
    n = 40_000
    counts = np.bincount(draw(logits.expand(n, -1), *rows(n), 0.7, 0.9).numpy(), minlength=40)
    expected = np.where([i in allowed for i in range(40)], p, 0)
    expected *= n / expected.sum()
    inside = expected > 0
    chi_square = ((counts - expected)[inside] ** 2 / expected[inside]).sum()
    assert chi_square < inside.sum() + 4 * np.sqrt(2 * inside.sum())


def test_a_row_draws_the_same_token_alone_and_in_any_batch():
    torch.manual_seed(2)
    logits = torch.randn(64, 1000) * 3
    seeds, steps = torch.randint(0, 2**62, (64,)), torch.randint(0, 500, (64,))
    together = draw(logits, seeds, steps, 0.7, 0.9)
    order = torch.randperm(64)
    assert torch.equal(draw(logits[order], seeds[order], steps[order], 0.7, 0.9), together[order])
    for i in (0, 17, 63):
        assert draw(logits[i : i + 1], seeds[i : i + 1], steps[i : i + 1], 0.7, 0.9) == together[i]


def test_another_seed_or_step_gives_other_draws():
    flat = torch.zeros(1000, 5000)
    seeds, steps = rows(1000)
    first = draw(flat, seeds, steps, 1.0, 1.0)
    assert (first == draw(flat, seeds + 1, steps, 1.0, 1.0)).float().mean() < 0.01
    assert (first == draw(flat, seeds, steps + 1, 1.0, 1.0)).float().mean() < 0.01
    assert len(set(first.tolist())) > 800  # 5000 equal tokens: a draw of 1000 repeats about 90


def test_a_flat_row_beside_a_peaked_one_falls_back_to_the_whole_vocabulary():
    logits = torch.zeros(2, 4000)
    logits[1, 5] = 50
    drawn = draw(logits.repeat(200, 1), *rows(400), 1.0, 0.9)
    assert set(drawn[1::2].tolist()) == {5}
    assert drawn[::2].max() > 1000


def test_temperature_zero_takes_the_likeliest_token():
    logits = torch.randn(8, 50)
    assert torch.equal(draw(logits, *rows(8), 0.0, 0.9), logits.argmax(-1))


def test_the_kernel_draws_what_the_plain_twin_draws(triton_interpreter):
    from personatlas.persona.sampling.kernels import draw_on_gpu

    torch.manual_seed(3)
    masked = (torch.randn(4, 300) * 3).masked_fill(torch.rand(4, 300) < 0.5, -torch.inf)
    rows = [torch.randn(6, 900) * 4, torch.randn(6, 700) * 2 - 30, torch.zeros(3, 300), masked]
    for logits in [*rows, *(row.bfloat16() for row in rows), rows[0].half()]:
        noise = row_noise(torch.randint(0, 2**62, (len(logits),)), torch.arange(len(logits)))
        for top_p in (0.3, 0.9, 1.0):
            assert torch.equal(
                draw_on_gpu(logits, noise, 0.7, top_p), draw_plainly(logits, noise, 0.7, top_p)
            )


def test_rows_with_numbers_of_their_own_draw_what_they_would_draw_alone(triton_interpreter):
    from personatlas.persona.sampling.kernels import draw_on_gpu

    torch.manual_seed(4)
    logits = torch.randn(6, 500) * 3
    seeds, steps = torch.randint(0, 2**62, (6,)), torch.arange(6)
    temperature, top_p = (
        torch.tensor([0.7, 0.0, 1.0, 2.0, 0.0, 0.3]),
        torch.tensor([0.9, 0.9, 1.0, 0.5, 0.1, 0.0]),
    )
    drawn = draw(logits, seeds, steps, temperature, top_p)
    for row in range(6):
        one = slice(row, row + 1)
        assert drawn[one] == draw(
            logits[one], seeds[one], steps[one], float(temperature[row]), float(top_p[row])
        )
    noise, warm = row_noise(seeds, steps), temperature.clamp(min=0.3)
    assert torch.equal(draw_on_gpu(logits, noise, warm, top_p), draw_plainly(logits, noise, warm, top_p))
    assert torch.equal(draw(logits, seeds, steps, torch.zeros(6), top_p), logits.argmax(-1))


def test_the_span_sum_kernel_equals_its_plain_twin(triton_interpreter):
    from personatlas.persona.pipeline.record import span_sum_plainly
    from personatlas.persona.sampling.kernels import span_sum_on_gpu

    h = torch.randn(3, 37, 40).bfloat16()
    start, stop = torch.tensor([1, 5, 30]), torch.tensor([20, 6, 37])
    assert torch.allclose(span_sum_on_gpu(h, start, stop), span_sum_plainly(h, start, stop), atol=1e-4)


@pytest.mark.parametrize("window", [0, 7])
def test_the_attention_kernel_equals_masked_attention(triton_interpreter, window):
    from personatlas.persona.sampling.kernels import attend_on_gpu

    query, keys, values = torch.randn(3, 6, 16), torch.randn(3, 2, 50, 16), torch.randn(3, 2, 50, 16)
    positions, columns = torch.tensor([0, 33, 49]), torch.arange(50)
    mask = columns <= positions[:, None]
    if window:
        mask &= columns > positions[:, None] - window
    expected = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], keys, values, attn_mask=mask[:, None, None], scale=0.25, enable_gqa=True
    )[:, :, 0]
    assert torch.allclose(attend_on_gpu(query, keys, values, positions, 0.25, window), expected, atol=1e-5)
