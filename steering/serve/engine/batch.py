"""Rows that decode together and start and end one by one, on a CPU or as CUDA graphs.

    batch = DecodeBatch(model, slots=32, length=2048, projection_hook=hook, steering=steering)
    batch.prefill([row])                       # reads a prompt into the cache; the row decodes from now on
    for row, event in batch.step(): ...        # decodes one token of every row
    batch.remove(row)                          # at any time; the last row moves into its slot

Slots 0..n-1 decode. A long prompt is read in chunks into the slot behind them, while the others go on. Every
row has its own seed, temperature, top-p and arm, and its tokens depend on the other rows only through
rounding. On a GPU a step is captured at first use, for some numbers of rows and for the layers that are
steered.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from personatlas.persona.models.load import Model
from personatlas.persona.models.parity import bounded_log_probs
from personatlas.persona.sampling.cuda_graph import capture_step
from personatlas.persona.sampling.kv_cache import decoding_mask
from personatlas.persona.sampling.next_token import draw
from personatlas.persona.sampling.sampler import Decoder, Prompt, SamplerCallbacks, batch_tokens
from personatlas.steering.hooks.steering import SlotSteering
from personatlas.steering.serve.engine.prefix_cache import CachedPrefix
from personatlas.steering.serve.engine.projection_hook import ProjectionHook

CPU_TOKENS, GPU_TOKENS = 2048, 32768  # most padded tokens of one prefill
SCORED_CPU, SCORED_GPU = 64, 512  # tokens of a text that are scored between two decoding steps

TokenLogprobs = tuple[float | None, dict[int, float]]  # of a token, and of the likeliest ones by id


@dataclass(eq=False)
class BatchRow:
    """A prompt, how to answer it, and its progress. `projections[i]` belongs to token i of `ids`.

    `fired` counts tokens times layers that the arm changed, `prompt_fired` those of the prompt without its
    last token; `cached` of the `fed` tokens came from a prefix.
    """

    prompt: Prompt
    temperature: float
    top_p: float
    logprobs: int | None = None  # so many of the likeliest tokens at each step, None for no log-probabilities
    fed: int = 0
    cached: int = 0
    generated: list[int] = field(default_factory=list)
    projections: list[float] = field(default_factory=list)
    fired: int = 0
    prompt_fired: int = 0
    slot: int = -1

    @property
    def ids(self) -> list[int]:
        """Prompt and answer tokens."""
        return [*self.prompt.ids, *self.generated]


@dataclass(frozen=True)
class TokenEvent:
    """A row's step: the new token, and for the one that was fed its projection and changed layers."""

    token: int
    projection: float
    fired: int
    logprobs: TokenLogprobs | None = None


class DecodeBatch:
    """The slots and all tensors that a step changes in place."""

    decoder_type: type[Any] = Decoder
    captures = True  # steps as CUDA graphs, on a GPU

    def __init__(
        self, model: Model, slots: int, length: int, projection_hook: ProjectionHook, steering: SlotSteering
    ) -> None:
        self.model, self.slots, self.length = model, slots, length
        self.projection_hook, self.steering = projection_hook, steering
        self.callbacks = SamplerCallbacks(steering, projection_hook)
        self.decoder: Any = self.decoder_type(model, slots + 2, length, self.callbacks)
        self.callbacks.resize(slots + 2)  # one for prompts read in chunks, one for texts that are scored
        self.scored_at_once = SCORED_CPU if model.device.type == "cpu" else SCORED_GPU
        self.rows: list[BatchRow] = []
        self.tokens, self.positions, self.seeds, self.steps = (
            torch.zeros(slots, dtype=torch.long, device=model.device) for _ in range(4)
        )
        self.temperature, self.top_p = (torch.ones(slots, device=model.device) for _ in range(2))
        self.running = torch.zeros(slots, dtype=torch.bool, device=model.device)
        self.logits = torch.zeros(0)
        self.max_prefill_tokens = batch_tokens(model, CPU_TOKENS, GPU_TOKENS)
        self.captured_layers: set[tuple[int, ...]] = {()}  # sets of steered layers with graphs of their own
        self._graphs: dict[tuple[int, tuple[int, ...]], tuple[Callable[[], None], Tensor]] = {}
        self._graph_sizes = sorted({1, 2, 4, *range(8, slots, 8), slots})

    @property
    def free_slots(self) -> int:
        """Slots without a decoding row."""
        return self.slots - len(self.rows)

    def reset(self) -> None:
        """Clears what a failed forward left half done."""
        state = self.decoder.cache.state
        state.prefill, state.resumed = False, None
        self.steering.hooks.discard_forward()
        self.projection_hook.take()

    def prefill(self, rows: Sequence[BatchRow]) -> None:
        """Reads whole prompts; the rows decode from now on."""
        slots = list(range(len(self.rows), len(self.rows) + len(rows)))
        prompts = [row.prompt for row in rows]
        self.callbacks.assign_slots(slots, prompts)
        self.steering.restrict_layers(self._steered_layers(prompts))
        self._read_prompts([prompt.ids for prompt in prompts], slots)
        projections = self._prompt_projections([len(prompt.ids) - 1 for prompt in prompts])
        for row, slot, values in zip(rows, slots, projections, strict=True):
            row.slot, row.fed, row.projections = slot, len(values), values
        self._start(rows)

    def open(self, row: BatchRow, prefix: CachedPrefix | None, tokens: int) -> None:
        """Gives a row the slot for chunked prompts, with the first `tokens` of a cached prefix in it."""
        self.callbacks.assign_slots([self.slots], [row.prompt])
        row.slot = self.slots
        if prefix is not None:
            self.decoder.cache.restore(self.slots, tokens, prefix.keys_values)
            row.fed = row.cached = tokens
            row.projections = list(prefix.projections[:tokens])

    def prefill_chunk(self, row: BatchRow, max_tokens: int) -> bool:
        """Reads on in an opened row; True when all is read, and the row decodes from now on."""
        end = len(row.prompt.ids) - 1
        ids = row.prompt.ids[row.fed : min(row.fed + max_tokens, end)]
        if ids:
            self.steering.restrict_layers(self._steered_layers([row.prompt]))
            self.decoder.read_on(ids, row.slot, row.fed)
            row.projections += self._prompt_projections([len(ids)])[0]
            row.fed += len(ids)
        if row.fed < end:
            return False
        self._move(row, len(self.rows))
        self._start([row])
        return True

    def step(self) -> list[tuple[BatchRow, TokenEvent]]:
        """Decodes one token of every row."""
        n, layers = len(self.rows), self._steered_layers([row.prompt for row in self.rows])
        self.steering.restrict_layers(layers)
        if self.model.device.type == "cuda" and self.captures:
            if layers not in self.captured_layers:
                # one graph for all arms that requests describe: those that are not in use change nothing
                layers = self.steering.hooks.layers
                self.steering.restrict_layers(layers)
            size = next(size for size in self._graph_sizes if size >= n)
            if (size, layers) not in self._graphs:
                state = [self.tokens, self.positions, self.steps, *self.callbacks.state()]
                replay = capture_step(partial(self._advance, size, self.length), state, self.model.id)
                self._graphs[size, layers] = replay, self.logits
            replay, self.logits = self._graphs[size, layers]
            replay()
        else:
            self._advance(n, max(row.fed for row in self.rows) + 1)
        device = self.tokens.device
        columns = [self.tokens[:n].double(), self.projection_hook.latest[:n].to(device).double()]
        columns.append(
            self.steering.fired_counts(n).to(device).double() if layers else torch.zeros_like(columns[0])
        )
        tokens, projections, fired = torch.stack(columns).tolist()  # the one place that waits for a GPU
        logprobs = self._logprobs(tokens)
        events = []
        for index, row in enumerate(self.rows):
            token, total = int(tokens[index]), int(fired[index])
            event = TokenEvent(token, projections[index], total - row.fired, logprobs.get(index))
            events.append((row, event))
            row.fired, row.fed = total, row.fed + 1
            row.projections.append(event.projection)
            row.generated.append(token)
        return events

    def score(self, prompt: Prompt, n_likeliest: int) -> Iterator[list[TokenLogprobs]]:
        """Log-probabilities of a text's tokens (the first has none) and of the likeliest ones, in pieces.

        One text at a time: others wait until it is scored.
        """
        yield [(None, {})]
        start = 1
        for logits in self._text_logits(prompt, self.slots + 1):
            logprobs = bounded_log_probs(logits)
            following = torch.tensor(prompt.ids[start : start + len(logits)], device=logits.device)[:, None]
            start += len(logits)
            own = logprobs.gather(1, following)[:, 0].tolist()
            values, tokens = (tensor.tolist() for tensor in logprobs.topk(n_likeliest))
            yield [(a, dict(zip(b, c, strict=True))) for a, b, c in zip(own, tokens, values, strict=True)]

    def _text_logits(self, prompt: Prompt, slot: int) -> Iterator[Tensor]:
        """Logits (T, V) of a text's tokens but the last, some tokens at a time."""
        self.callbacks.assign_slots([slot], [prompt])
        for start in range(0, len(prompt.ids) - 1, self.scored_at_once):
            self.steering.restrict_layers(self._steered_layers([prompt]))
            part = prompt.ids[start : min(start + self.scored_at_once, len(prompt.ids) - 1)]
            logits = self.decoder.read_on(part, slot, start, logits=True)
            self.projection_hook.take()
            yield logits

    def remove(self, row: BatchRow) -> None:
        """Ends a row, whose slot the last one takes; does nothing for one that is still being read."""
        if row not in self.rows:
            return
        last = self.rows[-1]
        if last is not row:
            target, source = row.slot, len(self.rows) - 1
            self._move(last, target)
            for values in (self.tokens, self.positions, self.seeds, self.steps, self.temperature, self.top_p):
                values[target] = values[source]
            self.rows[target] = last
        self.rows.pop()
        self.running[len(self.rows)] = False
        self.positions[len(self.rows)] = 0

    def prefix_of(self, row: BatchRow, digest: str, length: int) -> CachedPrefix:
        """A copy of the first `length` tokens of a row, to continue from later."""
        ids = np.asarray(row.ids[:length], dtype=np.int64)
        keys_values = self.decoder.cache.saved(row.slot, length)
        return CachedPrefix(digest, ids, tuple(row.projections[:length]), keys_values)

    def require_steered(self, row: BatchRow) -> None:
        """Raises `HookDidNotFire` unless every token of a row met its arm at every layer."""
        prompt = len(row.prompt.ids) if row.fed >= len(row.prompt.ids) else row.fed
        opening = int(row.cached == 0 and row.fed > 0)
        fed = (prompt - row.cached - opening, row.fed - prompt, opening)
        self.steering.require_seen(row.slot, row.prompt.plan, fed)

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int]) -> None:
        self.decoder.prefill(prompts, slots)

    def _steered_layers(self, prompts: Iterable[Prompt]) -> tuple[int, ...]:
        """Layers at which any of the prompts' plans acts."""
        plans = {prompt.plan for prompt in prompts if prompt.plan >= 0}
        layers = {layer for plan in plans for act in self.steering.hooks.plans[plan] for layer in act.layers}
        return tuple(sorted(layers))

    def _start(self, rows: Sequence[BatchRow]) -> None:
        """Lets rows decode that are read but for the last token and in the next slots already."""
        first = len(self.rows)
        slots = slice(first, first + len(rows))
        fired = self.steering.fired_counts(slots.stop)[first:].tolist()
        for row, count in zip(rows, fired, strict=True):
            row.fired = row.prompt_fired = int(count)
        for target, values in (
            (self.tokens, [row.prompt.ids[-1] for row in rows]),
            (self.positions, [len(row.prompt.ids) - 1 for row in rows]),
            (self.seeds, [row.prompt.seed for row in rows]),
            (self.temperature, [row.temperature for row in rows]),
            (self.top_p, [row.top_p for row in rows]),
        ):
            target[slots] = torch.tensor(values, device=target.device)
        self.steps[slots], self.running[slots] = 0, True
        self.rows += rows

    def _move(self, row: BatchRow, slot: int) -> None:
        self.decoder.move(row.slot, slot, row.fed)
        self.callbacks.move(row.slot, slot)
        row.slot = slot

    def _prompt_projections(self, lengths: Sequence[int]) -> list[list[float]]:
        """Projections of the prompts that were just read, in their order, without padding."""
        prompts = [values for batch in self.projection_hook.take() for values in batch.cpu()]
        return [values[:length].tolist() for values, length in zip(prompts, lengths, strict=True)]

    def _logprobs(self, tokens: Sequence[float]) -> dict[int, TokenLogprobs]:
        """By row index, for the rows that want them."""
        wanted = {index: row.logprobs for index, row in enumerate(self.rows) if row.logprobs is not None}
        if not wanted:
            return {}
        scores = bounded_log_probs(self.logits[torch.tensor(list(wanted), device=self.logits.device)])
        values, ids = scores.topk(max(count or 1 for count in wanted.values()))
        found: dict[int, TokenLogprobs] = {}
        for line, (index, count) in enumerate(wanted.items()):
            likeliest = dict(zip(ids[line, :count].tolist(), values[line, :count].tolist(), strict=True))
            found[index] = (float(scores[line, int(tokens[index])]), likeliest)
        return found

    def _advance(self, n: int, visible: int) -> None:
        """Feeds and draws a token in slots 0..n-1; slots without a row feed theirs to column 0."""
        state, positions, running = self.decoder.cache.state, self.positions[:n], self.running[:n]
        state.prefill, state.positions, state.visible = False, positions, visible
        mask = decoding_mask(self.decoder.config, positions, visible, self.model.dtype)
        self.callbacks.before_decode(running, self.steps[:n] == 0, positions == 0)
        self.logits = self.model.hf(
            input_ids=self.tokens[:n, None],
            position_ids=positions[:, None],
            attention_mask=mask,
            past_key_values=self.decoder.cache,
            use_cache=True,
            **({"slot_state": state} if self.model.device.type == "cuda" else {}),
        ).logits[:, -1]
        drawn = draw(self.logits, self.seeds[:n], self.steps[:n], self.temperature[:n], self.top_p[:n])
        self.tokens[:n] = torch.where(running, drawn, self.tokens[:n])
        positions.add_(running.long())
        self.steps[:n].add_(running.long())
