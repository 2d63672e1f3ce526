"""Sampling answers to many prompts at once, from any causal decoder that `transformers` loads.

    sampler = Sampler(model, end_ids, Sampling(max_new_tokens=64))
    for answer in sampler.answers(prompts):        # as they finish, not in order
        answer.index, answer.ids, answer.stopped

A chunk of prompts starts together. All but the last prompt token is prefilled through the base model; the
last one is the first decoding step, so logits come from one place. A row that ends is yielded at once and the
last row moves into its slot, so finished rows cost nothing. The work on a chunk is a function of the chunk
alone: the same chunk gives the same answers in a resumed run and under any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from personatlas.persona.errors import UserError
from personatlas.persona.models.hooks import without_hooks
from personatlas.persona.models.load import Model
from personatlas.persona.models.parity import relative_error
from personatlas.persona.progress import Advance, no_advance
from personatlas.persona.sampling.kv_cache import SlotCache, decoding_mask
from personatlas.persona.sampling.next_token import draw

CPU_TOKENS, GPU_TOKENS = 2048, 65536  # most padded tokens of one prefill; a CPU batch of 8192 was 30% slower
SLOW = (
    "this model does not take a key-value cache as it should: every step reads the whole text again, slowly"
)
ACTIVATION_SHARE = 0.1  # of a GPU's memory, for what one batch needs inside a block


@dataclass(frozen=True)
class Sampling:
    """How to sample; the defaults are the paper's but for the length (arXiv 2601.10387: 512 new tokens)."""

    max_new_tokens: int = 128
    temperature: float = 0.7
    top_p: float = 0.9

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens {self.max_new_tokens} is below 1")
        if not 0 <= self.temperature < 100:
            raise UserError(f"temperature {self.temperature} is outside [0, 100)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p {self.top_p} is outside (0, 1]")


@dataclass(frozen=True)
class Prompt:
    """Token ids to answer, the seed to do it with, and which plan of a callback's (steering's) acts on the
    row.
    """

    ids: tuple[int, ...]
    seed: int
    plan: int = 0


@dataclass(frozen=True)
class Answer:
    """The answer to prompt number `index`: ids before the end token, and why it stopped."""

    index: int
    ids: tuple[int, ...]
    stopped: Literal["end", "length"]


class SamplerCallback:
    """Something inside the forwards, such as steering, that must know which rows and tokens each of them is
    about.

    A sampler calls these methods; here they do nothing. A row's index in a batch is its *slot*.
    """

    def start(self, prompts: Sequence[Prompt]) -> None:
        """A chunk of prompts begins."""

    def resize(self, slots: int) -> None:
        """The number of slots from now on."""

    def assign_slots(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """These prompts take these slots."""

    def before_prefill(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        """The next forward reads `lengths` (n,) tokens of prompts into `slots` (n,); the rest is padding.

        `opening` is false where it goes on with prompts that are read in part.
        """

    def before_decode(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        """The next forward feeds one token to slots 0..n-1, described by masks (n,).

        `running` is false where a row is at rest, `first` true where the token is the prompt's last and not
        yet the answer's, `opening` true where nothing is before it.
        """

    def before_reread(self, lengths: Tensor, starts: Tensor) -> None:
        """The next forward reads slots 0..n-1 again from the beginning: `lengths` (n,), answers from `starts`
        (n,).
        """

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes on in slot `target`."""

    def finish(self, slots: Sequence[int], prompts: Sequence[Prompt], answers: Sequence["Answer"]) -> None:
        """The rows in these slots are answered."""

    def state(self) -> list[Tensor]:
        """What a forward changes, to be put back after forwards that do not count."""
        return []


def _forwarded(name: str) -> Callable[..., None]:
    def call(self: "SamplerCallbacks", *args: Any, **kwargs: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, name)(*args, **kwargs)

    return call


class SamplerCallbacks(SamplerCallback):
    """Several callbacks of one decoder, each called in turn."""

    def __init__(self, *callbacks: SamplerCallback) -> None:
        self.callbacks = callbacks

    start, resize, assign_slots = map(_forwarded, ("start", "resize", "assign_slots"))
    before_prefill, before_decode = map(_forwarded, ("before_prefill", "before_decode"))
    before_reread, move, finish = map(_forwarded, ("before_reread", "move", "finish"))

    def state(self) -> list[Tensor]:
        """What a forward changes in any of them."""
        return [tensor for callback in self.callbacks for tensor in callback.state()]


class Decoder:
    """One chunk's forward passes on a slot cache: `prefill` once, then `step` token by token."""

    name = "slots"

    def __init__(
        self, model: Model, slots: int, length: int, callback: SamplerCallback | None = None
    ) -> None:
        self.model, self.callback = model, callback or SamplerCallback()
        self.config = model.hf.config.get_text_config(decoder=True)
        self.cache = SlotCache(model.n_layers, slots, length)
        self.steps = 0

    def prefill(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int] | None = None) -> None:
        """Fills slots (0.. unless given) with all but the last token of each prompt, in batches."""
        slots, state, device, first = slots or range(len(prompts)), self.cache.state, self.model.device, 0
        lengths, tokens = [len(ids) for ids in prompts], batch_tokens(self.model, CPU_TOKENS, GPU_TOKENS)
        state.prefill, state.resumed = True, None
        while first < len(prompts):
            stop = batch_end(lengths, first, tokens)
            batch = pad([ids[:-1] or ids for ids in prompts[first:stop]], device)
            state.rows = torch.tensor(slots[first:stop], device=device)
            self.callback.before_prefill(state.rows, torch.tensor(lengths[first:stop], device=device) - 1)
            self.model.base(input_ids=batch, past_key_values=self.cache, use_cache=True)
            first = stop
        state.prefill, self.steps = False, 0

    def read_on(self, ids: Sequence[int], slot: int, start: int, *, logits: bool = False) -> Tensor | None:
        """Goes on reading into a slot that holds `start` tokens already; returns logits (T, V) where wanted."""
        state, device = self.cache.state, self.model.device
        positions = torch.arange(start, start + len(ids), device=device)[None]
        mask = decoding_mask(self.config, positions, start + len(ids), self.model.dtype)
        state.prefill, state.resumed = True, (slot, start)
        slots, lengths = torch.tensor([slot], device=device), torch.tensor([len(ids)], device=device)
        self.callback.before_prefill(slots, lengths, opening=start == 0)
        try:
            output = (self.model.hf if logits else self.model.base)(
                input_ids=pad([ids], device),
                position_ids=positions,
                attention_mask=mask,
                past_key_values=self.cache,
                use_cache=True,
            )
            return output.logits[0] if logits else None
        finally:
            state.prefill, state.resumed = False, None

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (n, V) after feeding `tokens` (n,) at `positions` (n,) to slots 0..n-1."""
        state, all_rows = self.cache.state, torch.ones_like(tokens, dtype=torch.bool)
        self.callback.before_decode(all_rows, all_rows if self.steps == 0 else ~all_rows, positions == 0)
        self.steps += 1
        state.positions, state.visible = positions, int(positions.max()) + 1
        mask = decoding_mask(self.config, positions, state.visible, self.model.dtype)
        return self.model.hf(
            input_ids=tokens[:, None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def move(self, source: int, target: int, columns: int | None = None) -> None:
        """Continues the row of slot `source` in slot `target`; `columns` are all that it has written, if
        given.
        """
        self.cache.move(source, target, columns)


class PlainDecoder:
    """The same without a cache: every step reads the whole text again. Slow, and right for any causal
    decoder.
    """

    name = "no cache"

    def __init__(
        self, model: Model, slots: int, length: int, callback: SamplerCallback | None = None
    ) -> None:
        self.model, self.callback = model, callback or SamplerCallback()
        self.text = torch.zeros(slots, length, dtype=torch.long, device=model.device)
        self.starts = torch.zeros(slots, dtype=torch.long, device=model.device)

    def prefill(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int] | None = None) -> None:
        """Keeps the prompts in slots (0.. unless given)."""
        for row, ids in zip(slots or range(len(prompts)), prompts, strict=True):
            self.text[row, : len(ids)], self.starts[row] = torch.tensor(ids), len(ids)

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits (n, V) after `tokens` (n,) at `positions` (n,) of rows 0..n-1."""
        rows = torch.arange(len(tokens), device=tokens.device)
        self.text[rows, positions] = tokens
        text = self.text[: len(tokens), : int(positions.max()) + 1]
        self.callback.before_reread(positions + 1, self.starts[: len(tokens)])
        return self.model.hf(input_ids=text, use_cache=False).logits[rows, positions]

    def move(self, source: int, target: int, columns: int | None = None) -> None:
        """Continues row `source` as row `target`."""
        self.text[target], self.starts[target] = self.text[source], self.starts[source]


class Sampler:
    """Answers chunks of prompts. Building one proves the cached decoder on this model, or falls back to
    none.
    """

    def __init__(self, model: Model, end_ids: frozenset[int], sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        self.end_ids = torch.tensor(sorted(end_ids), dtype=torch.long, device=model.device)
        self.decoder: type[Any] = Decoder if decodes_from_cache(model) else PlainDecoder

    def _require_room(self, prompts: Sequence[Prompt]) -> None:
        """`UserError` for answers that may grow beyond the context, where positions are not what they were."""
        longest, most = max(len(prompt.ids) for prompt in prompts), self.sampling.max_new_tokens
        if self.model.context is not None and longest + most > self.model.context:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of up to {most} do not fit into the "
                f"{self.model.context} that {self.model.id} holds; shorten the prompt or --max-new-tokens"
            )

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Prompt],
        callback: SamplerCallback | None = None,
        advance: Advance = no_advance,
    ) -> Iterator[Answer]:
        """Answers one chunk; answers come as they end. `callback` is told what every forward is about,
        `advance` of every token, as a part of the longest answer: all prompts are `len(prompts)`.
        """
        limit, device = self.sampling.max_new_tokens, self.model.device
        self._require_room(prompts)
        callback = callback or SamplerCallback()
        length = max(len(prompt.ids) for prompt in prompts) + limit
        decoder = self.decoder(self.model, len(prompts), length, callback)
        callback.start(prompts)
        callback.resize(len(prompts))
        callback.assign_slots(range(len(prompts)), prompts)
        decoder.prefill([prompt.ids for prompt in prompts])
        rows = list(range(len(prompts)))  # which prompt is in which slot
        tokens = torch.tensor([prompt.ids[-1] for prompt in prompts], device=device)
        positions = torch.tensor([len(prompt.ids) - 1 for prompt in prompts], device=device)
        seeds = torch.tensor([prompt.seed for prompt in prompts], device=device)
        written = torch.zeros(len(prompts), limit, dtype=torch.long, device=device)
        for step in range(limit):
            logits, steps = decoder.step(tokens, positions), torch.full_like(tokens, step)
            tokens = draw(logits, seeds, steps, self.sampling.temperature, self.sampling.top_p)
            written[: len(rows), step] = tokens
            ended = torch.isin(tokens, self.end_ids).nonzero()[:, 0].tolist()
            advance((len(rows) - len(ended)) / limit + len(ended) * (limit - step) / limit)
            for slot in reversed(ended):  # from the back: the row that moves in has not ended
                answer = Answer(rows[slot], tuple(written[slot, :step].tolist()), "end")
                callback.finish([slot], prompts, [answer])
                yield answer
                last = len(rows) - 1
                if slot != last:
                    decoder.move(last, slot)
                    callback.move(last, slot)
                    for values in (rows, tokens, positions, seeds, written):
                        values[slot] = values[last]
                rows.pop()
                tokens, positions, seeds = tokens[:last], positions[:last], seeds[:last]
            if not rows:
                return
            positions = positions + 1
        left = [Answer(row, tuple(written[slot].tolist()), "length") for slot, row in enumerate(rows)]
        callback.finish(range(len(rows)), prompts, left)
        yield from left


def decodes_from_cache(model: Model) -> bool:
    """Whether decoding on a slot cache gives the logits of reading the whole text, up to rounding.

    Hooks that are on the model's blocks are off meanwhile: they would be told of rows that are not theirs.
    """
    with without_hooks(model):
        return decoding_error(model, Decoder) < (1e-3 if model.dtype == torch.float32 else 5e-2)


@torch.no_grad()
def decoding_error(
    model: Model, decoder_type: type[Decoder] | type[PlainDecoder], lengths: Sequence[int] = (9, 12, 6)
) -> float:
    """Relative error of a decoder's logits against reading one whole text at a time, over rows of uneven
    lengths.

    Infinite when the model does not take the decoder's cache at all (recurrent state, say).
    """
    n_fed, device = 3, model.device  # tokens that are decoded after the prompt
    texts = [
        [(i * 37 + row * 11 + 5) % model.vocab_size for i in range(length)]
        for row, length in enumerate(lengths)
    ]
    decoder = decoder_type(model, len(texts), max(lengths))
    try:
        decoder.prefill([tuple(text[:-n_fed]) for text in texts])
        for step in range(-1, n_fed):  # the decoder's first step feeds the last prompt token
            at = [length - n_fed + step for length in lengths]
            tokens = torch.tensor([text[i] for text, i in zip(texts, at, strict=True)], device=device)
            cached = decoder.step(tokens, torch.tensor(at, device=device))
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError):
        return float("inf")
    errors = []
    for row, text in enumerate(texts):
        whole = model.hf(input_ids=torch.tensor([text], device=device), use_cache=False).logits[0, -1]
        errors.append(relative_error(cached[row], whole))
    return float(torch.tensor(errors).max())  # NaN, which Python's max would drop, stays


def pad(
    rows: Sequence[Sequence[int]], device: torch.device, multiple: int = 1, most: int | None = None
) -> Tensor:
    """Right-padded ids (B, T) with T a multiple of `multiple`, but at most `most`; the padding is token 0 and
    nothing ever looks at it.
    """
    longest = max(map(len, rows))
    length = -(-longest // multiple) * multiple
    length = length if most is None else max(longest, min(length, most))
    batch = torch.zeros(len(rows), length, dtype=torch.long)
    for row, ids in enumerate(rows):
        batch[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return to_device(batch, device)


def to_device(value: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on the device. A copy from ordinary memory would wait for all that the GPU still has to
    do.
    """
    return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)


def batch_tokens(model: Model, on_cpu: int, on_gpu: int) -> int:
    """Padded tokens a batch: `on_cpu`, or up to `on_gpu` as the GPU's memory and the model's width allow."""
    if model.device.type != "cuda":
        return on_cpu
    config = model.hf.config.get_text_config(decoder=True)
    inner = getattr(config, "intermediate_size", None) or 4 * model.d_model
    # residual, norm, query, key, value, output and their fp32 copies; gate, up and their product
    token = (12 * model.d_model + 3 * inner) * model.dtype.itemsize
    memory = torch.cuda.get_device_properties(model.device).total_memory
    return max(1024, min(on_gpu, int(ACTIVATION_SHARE * memory / token)))


def batch_end(lengths: Sequence[int], first: int, tokens: int) -> int:
    """The end of the longest batch from `first` on whose padded size stays within `tokens` (at least one
    row).
    """
    stop, longest = first + 1, lengths[first]
    while stop < len(lengths) and max(longest, lengths[stop]) * (stop + 1 - first) <= tokens:
        longest = max(longest, lengths[stop])
        stop += 1
    return stop
