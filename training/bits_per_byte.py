"""Bits per byte of held-out text: a loss that does not depend on the tokenizer.

    bits_per_byte = Σ nats / (ln 2 · Σ bytes)

over every target that stands for text: the mark that begins a document is no text, and neither its loss nor a byte of it
counts, as in nanochat. Rows of one context follow one another, so a token sees half a context of text on average.

Bits per byte of texts under any model: how well it predicts them, whatever its tokenizer.

    fit = fit_of_texts(load_model("runs/books"), ["It was a dark night.", ...])
    fit.bits_per_byte, fit.interval         # Σ nats / (ln 2 · Σ bytes), 95% over documents drawn again

A document is read in windows of the model's context, each of which begins with the last token of the one before, the first with the
token that begins a text; every token of it is predicted once, so that the sum of nats is that of the document's bytes.
A token sees half a context of its document on average.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray as Array
from torch import Tensor

from personatlas.analysis.stats import bootstrap_sums, percentile_interval
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.models.load import Model
from personatlas.training.data.batches import held_out_rows
from personatlas.training.data.token_shards import Stream
from personatlas.training.loop.distributed import summed
from personatlas.training.model.cross_entropy import IGNORED


@dataclass(frozen=True)
class Fit:
    """How well a model predicts a text."""

    bits_per_byte: float
    loss: float
    "nats a token"
    tokens: int
    bytes: int

    def row(self, step: int) -> dict[str, Any]:
        """As it stands in metrics.jsonl."""
        return {"kind": "held-out", "step": step, **asdict(self)}


@torch.no_grad()
def fit_of(
    forward: Callable[..., Tensor],
    stream: Stream,
    lengths: Tensor,
    context: int,
    rows: int,
    world: World = World(),
    most: int | None = None,
) -> Fit:
    """Read a stream and sum its loss: over all of it, or (with `most`) over about so many tokens, spread over all of it.

    `forward(ids, targets)` gives the summed loss in nats of what is not ignored. `lengths` (V,) are the bytes that each id stands
    for, on the device to compute on. All ranks share the work and get the same answer.
    """
    nats, counted, size = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    every = 1 if most is None else max(1, len(stream) // max(most, 1))
    for ids, counts in held_out_rows(stream, context, rows, world.rank, world.size, every):
        targets = ids[:, 1:].to(lengths.device)
        each = lengths[targets] * counts.to(lengths.device)  # (B, T)
        targets = torch.where(each > 0, targets, IGNORED)
        nats += forward(ids[:, :-1].to(lengths.device), targets).double().cpu()
        counted += (each > 0).sum().cpu()
        size += each.sum().cpu()
    found = summed(torch.stack([nats, counted, size]), world).tolist()
    nats_, tokens, bytes_ = found[0], int(found[1]), int(found[2])
    return Fit(nats_ / (math.log(2) * max(bytes_, 1)), nats_ / max(tokens, 1), tokens, bytes_)


LONGEST = 2048  # tokens of a window, whatever longer context a model has
BATCH = 8192  # tokens at once
DRAWS = 1000


@dataclass(frozen=True)
class TextFit:
    """How well a model predicts some documents."""

    bits_per_byte: float
    interval: tuple[float, float] | None
    "95%, documents drawn again; None for a single one"
    loss: float
    "nats a token"
    documents: int
    tokens: int
    bytes: int


def fit_of_texts(model: Model, texts: Sequence[str], context: int | None = None) -> TextFit:
    """Predict every token of every text. Raises `UserError` for texts without a byte and a context of less than 2."""
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    if not sizes.sum():
        raise UserError("there is no text to predict")
    window = min(context or LONGEST, _context(model), LONGEST if context is None else context)
    if window < 2:
        raise UserError(f"--context {window}: at least 2 tokens are needed to predict one from another")
    nats, tokens = np.zeros(len(texts)), 0
    for ids, documents in _batches(model, texts, window):
        losses = _losses(model, ids)  # (B,), nats
        np.add.at(nats, documents, losses)
        tokens += int((ids[:, 1:] >= 0).sum())
    bits = nats.sum() / math.log(2) / sizes.sum()
    return TextFit(
        float(bits),
        _interval(nats, sizes),
        float(nats.sum() / max(tokens, 1)),
        len(texts),
        tokens,
        int(sizes.sum()),
    )


def _context(model: Model) -> int:
    config = model.hf.config.get_text_config(decoder=True)
    return int(getattr(config, "max_position_embeddings", None) or LONGEST)


def _windows(model: Model, texts: Sequence[str], window: int) -> Iterator[tuple[int, list[int]]]:
    """Each window's document and its ids, the first of which is only seen."""
    tokenizer = model.tokenizer
    begins = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begins is None:
        raise UserError(
            "this model's tokenizer has no token that begins a text, so the first one cannot be predicted"
        )
    for number, text in enumerate(texts):
        ids = [begins, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for start in range(0, len(ids) - 1, window - 1):
            yield number, ids[start : start + window]


def _batches(model: Model, texts: Sequence[str], window: int) -> Iterator[tuple[torch.Tensor, Array]]:
    """Windows of like length together: ids (B, T), filled up with -1, and their documents (B,)."""
    windows = sorted(_windows(model, texts, window), key=lambda one: -len(one[1]))
    first = 0
    while first < len(windows):
        longest = len(windows[first][1])
        some = windows[first : first + max(1, BATCH // longest)]
        ids = torch.full((len(some), longest), -1)
        for row, (_, own) in enumerate(some):
            ids[row, : len(own)] = torch.tensor(own)
        yield ids, np.array([number for number, _ in some])
        first += len(some)


@torch.no_grad()
def _losses(model: Model, ids: torch.Tensor) -> Float64[Array, "B"]:
    here = ids.to(model.device)
    real, targets = here >= 0, here[:, 1:]
    logits = model.hf(input_ids=here.clamp_min(0), attention_mask=real.long(), use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(
        logits.float().mT, targets, ignore_index=-1, reduction="none"
    )  # (B, T)
    return np.asarray(each.sum(1).double().cpu())


def _interval(nats: Float64[Array, "N"], sizes: Float64[Array, "N"]) -> tuple[float, float] | None:
    if len(nats) < 2:
        return None
    loss, size = bootstrap_sums(nats, sizes, samples=DRAWS)
    return percentile_interval(loss / np.maximum(size, 1) / math.log(2))
