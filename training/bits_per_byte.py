"""Bits per byte of held-out text: a loss that does not depend on the tokenizer.

    bits_per_byte = Σ nats / (ln 2 · Σ bytes)

over every target that stands for text. The mark that begins a document is no text: neither its loss nor a
byte of it counts, as in nanochat. Text is read in windows of one context, so a token sees half a context on
average.

    held_out_bits_per_byte(model, tokens.held_out, token_lengths, context=2048, rows=16).bits_per_byte
    text_bits_per_byte(load_model("runs/books"), ["It was a dark night.", ...]).interval
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray as Array
from torch import Tensor

from personatlas.analysis.stats import ratio_interval
from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.models.control_tokens import TextEncoder
from personatlas.persona.models.load import Model
from personatlas.persona.records import Count, Ends, JsonRecord, NonNegative
from personatlas.training.data.batches import held_out_rows
from personatlas.training.data.token_shards import Stream
from personatlas.training.loop.distributed import all_sum
from personatlas.training.model.cross_entropy import IGNORED

LONGEST_WINDOW = 2048  # tokens, whatever longer context a model has
BATCH_TOKENS = 8192


@dataclass(frozen=True)
class HeldOutLoss(JsonRecord):
    """How well a GPT predicts its held-out stream; as in metrics.jsonl."""

    bits_per_byte: NonNegative | None
    loss: NonNegative | None
    "nats a token"
    tokens: Count
    bytes: Count


@torch.no_grad()
def held_out_bits_per_byte(
    forward: Callable[..., Tensor],
    stream: Stream,
    token_lengths: Tensor,
    context: int,
    rows: int,
    world: World = World(),
    max_tokens: int | None = None,
) -> HeldOutLoss:
    """Sums the loss over a stream, or over about `max_tokens` spread over all of it.

    `forward(ids, targets)` gives the summed loss in nats of what is not ignored. `token_lengths` (V,) are the
    bytes that each id stands for, on the device to compute on. All ranks share the work and get the same
    answer.
    """
    nats, counted, size = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    every = 1 if max_tokens is None else max(1, len(stream) // max(max_tokens, 1))
    for ids, counts in held_out_rows(stream, context, rows, world.rank, world.size, every):
        targets = ids[:, 1:].to(token_lengths.device)
        each = token_lengths[targets] * counts.to(token_lengths.device)  # (B, T)
        targets = torch.where(each > 0, targets, IGNORED)
        nats += forward(ids[:, :-1].to(token_lengths.device), targets).double().cpu()
        counted += (each > 0).sum().cpu()
        size += each.sum().cpu()
    total, tokens, n_bytes = all_sum(torch.stack([nats, counted, size]), world).tolist()
    bits = total / (math.log(2) * max(int(n_bytes), 1))
    return HeldOutLoss(bits, total / max(int(tokens), 1), int(tokens), int(n_bytes))


@dataclass(frozen=True)
class TextLoss(JsonRecord):
    """How well a model predicts some documents."""

    bits_per_byte: NonNegative
    interval: Ends | None
    "95% over documents; None for a single one"
    loss: NonNegative
    "nats a token"
    documents: Count
    tokens: Count
    bytes: Count


def text_bits_per_byte(model: Model, texts: Sequence[str], context: int | None = None) -> TextLoss:
    """Predicts every token of every text once, in windows of `context` tokens (the model's, at most 2,048).

    A window begins with the last token of the one before, the first with the token that begins a text. Raises
    `UserError` for texts without a byte, a context below 2, and a tokenizer that has no token to begin with.
    """
    sizes = np.array([len(text.encode()) for text in texts], dtype=np.float64)
    if not sizes.sum():
        raise UserError("there is no text to predict")
    longest = model.context or LONGEST_WINDOW
    window = min(context or LONGEST_WINDOW, longest, LONGEST_WINDOW if context is None else context)
    if window < 2:
        raise UserError(f"--context {window}: at least 2 tokens are needed to predict one from another")
    nats, tokens = np.zeros(len(texts)), 0
    for ids, documents in _batches(model, texts, window):
        np.add.at(nats, documents, _summed_losses(model, ids))
        tokens += int((ids[:, 1:] >= 0).sum())
    bits = ratio_interval(nats / math.log(2), sizes)
    interval = None if bits.low is None or bits.high is None else (bits.low, bits.high)
    loss = float(nats.sum() / max(tokens, 1))
    return TextLoss(bits.value, interval, loss, len(texts), tokens, int(sizes.sum()))


def _batches(model: Model, texts: Sequence[str], window: int) -> Iterator[tuple[Tensor, Array]]:
    """Windows of similar length together: ids (B, T), filled up with -1, and their documents (B,)."""
    tokenizer = model.tokenizer
    first_id = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first_id is None:
        raise UserError("this model's tokenizer has no token that begins a text")
    encoder, windows = TextEncoder(tokenizer), list[tuple[int, list[int]]]()
    for document, text in enumerate(texts):
        ids = [first_id, *encoder.text_ids(text)]
        windows += [(document, ids[start : start + window]) for start in range(0, len(ids) - 1, window - 1)]
    windows.sort(key=lambda item: -len(item[1]))
    first = 0
    while first < len(windows):
        longest = len(windows[first][1])
        group = windows[first : first + max(1, BATCH_TOKENS // longest)]
        batch = torch.full((len(group), longest), -1)
        for row, (_, ids) in enumerate(group):
            batch[row, : len(ids)] = torch.tensor(ids)
        yield batch, np.array([document for document, _ in group])
        first += len(group)


@torch.no_grad()
def _summed_losses(model: Model, ids: Tensor) -> Float64[Array, "B"]:
    """The nats of each row (B, T) of ids, where -1 is padding."""
    ids = ids.to(model.device)
    real, targets = ids >= 0, ids[:, 1:]
    logits = model.hf(input_ids=ids.clamp_min(0), attention_mask=real.long(), use_cache=False).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.float().mT, targets, ignore_index=-1, reduction="none")
    return np.asarray(each.sum(1).double().cpu())
