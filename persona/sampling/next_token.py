"""Drawing the next token: temperature and top-p without sorting the vocabulary, reproducible whatever the
batch.

The noise of a token depends on the rollout's seed, the step and the token id alone (a counter-based hash), so
a row draws the same token from the same logits in any batch, on any device. With Gumbel noise g, argmax over
the nucleus of logits / temperature + g is an exact sample from the renormalised nucleus (Gumbel-max), and no
cumulative sum is needed.

The nucleus is the smallest set of most likely tokens whose mass reaches top_p; tokens tied with its last are
in it too. Sorting 49,152 logits for 64 rows took 121 ms on two cores, two thirds of a whole decoding step;
the 256 largest take 5 ms and nearly always hold the nucleus. Rows where they do not are sorted.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

FIRST_TRY = 256
_LOW = 0xFFFFFFFF


def draw(
    logits: Float[Tensor, "B V"],
    seeds: Int[Tensor, " B"],
    steps: Int[Tensor, " B"],
    temperature: float | Float[Tensor, " B"],
    top_p: float | Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """One token id per row. `seeds` are in [0, 2**62), `steps` count the row's tokens; temperature 0 is the
    argmax.

    Temperature and top_p are one number for all rows, or one a row.
    """
    if isinstance(temperature, Tensor):
        greedy = temperature == 0
        if not logits.is_cuda and bool(greedy.all()):  # on a GPU it would wait for the answer
            return logits.argmax(-1)
        drawn = _drawn(logits, row_noise(seeds, steps), temperature.masked_fill(greedy, 1.0), top_p)
        return torch.where(greedy, logits.argmax(-1), drawn)
    if temperature == 0:
        return logits.argmax(-1)
    return _drawn(logits, row_noise(seeds, steps), temperature, top_p)


def _drawn(logits: Tensor, noise: Tensor, temperature: float | Tensor, top_p: float | Tensor) -> Tensor:
    if logits.is_cuda:
        from personatlas.persona.sampling.kernels import draw_on_gpu

        return draw_on_gpu(logits, noise, temperature, top_p)
    return draw_plainly(logits, noise, temperature, top_p)


def draw_plainly(
    logits: Float[Tensor, "B V"],
    noise: Int[Tensor, " B"],
    temperature: float | Float[Tensor, " B"],
    top_p: float | Float[Tensor, " B"],
) -> Int[Tensor, " B"]:
    """The same in plain torch, for CPUs and as the kernel's reference."""
    scaled = logits.float() / (temperature[:, None] if isinstance(temperature, Tensor) else temperature)
    top_p = top_p[:, None] if isinstance(top_p, Tensor) else top_p
    total = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(min(FIRST_TRY, scaled.shape[1]), dim=-1)
    chosen, whole = _choose(values, ids, total, noise, top_p)
    if not whole.all():
        rows = (~whole).nonzero()[:, 0]
        values, ids = scaled[rows].sort(-1, descending=True)
        reach = top_p[rows] if isinstance(top_p, Tensor) else top_p
        chosen[rows] = _choose(values, ids, total[rows], noise[rows], reach)[0]
    return chosen


def row_noise(seeds: Int[Tensor, " B"], steps: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """A 32-bit hash (in int64) of each row's seed and step; with a token id it gives that token's noise."""
    mixed = _mix((steps + 0x9E3779B9) & _LOW)
    mixed = _mix(mixed ^ (seeds & _LOW))
    return _mix(mixed ^ (seeds >> 32))


def gumbel(noise: Int[Tensor, "#B #K"], ids: Int[Tensor, "#B #K"]) -> Float[Tensor, "B K"]:
    """Standard Gumbel noise of token ids under `row_noise`, from 24 uniform bits; both broadcast together."""
    hashed = _mix((noise + ids * 0x9E3779B1) & _LOW)
    uniform = ((hashed >> 8).float() + 0.5) * 2.0**-24
    return -torch.log(-torch.log(uniform))


def _choose(
    values: Tensor, ids: Tensor, total: Tensor, noise: Tensor, top_p: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Draw from descending `values` (B, K); the second result says whether they held the whole nucleus."""
    mass = (values - total).exp().cumsum(-1)
    reached = mass >= top_p
    whole = reached[:, -1]
    last = torch.where(whole, reached.int().argmax(-1), torch.full_like(ids[:, 0], values.shape[1] - 1))
    threshold = values.gather(1, last[:, None])  # (B, 1)
    score = values + gumbel(noise[:, None], ids)
    score = score.masked_fill(values < threshold, -torch.inf)
    # a tie that reaches the end of the list may go on behind it
    whole = whole & (values[:, -1] < threshold[:, 0])
    return ids.gather(1, score.argmax(-1, keepdim=True))[:, 0], whole


def _mix(h: Tensor) -> Tensor:
    """A 32-bit finaliser (multiply and shift, as in MurmurHash3); int64 products wrap, and only their low
    half is kept.
    """
    h = h ^ (h >> 16)
    h = (h * 0x85EBCA6B) & _LOW
    h = h ^ (h >> 13)
    h = (h * 0xC2B2AE35) & _LOW
    return h ^ (h >> 16)
