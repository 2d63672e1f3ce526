"""Rows that decode together and come and go one by one: what a server's engine steps, on a CPU or as CUDA graphs.

    rows = Rows(model, slots=32, length=2048, watching=watching, steering=steering)
    rows.read([row])                       # a prompt into the cache; the row decodes from now on
    for row, step in rows.step(): ...      # one token for each of them
    rows.finish(row)                        # at any moment: the last row moves into its slot

Rows 0..n-1 are decoding. A long prompt is read piece by piece in a slot of its own, the last, while others decode. Every row
has its own seed, temperature, top-p and plan, and what it draws depends on the others through rounding alone.
On a GPU a step is captured for some numbers of rows and the layers at which any of them is steered, at first use.

The projection of every token that a forward feeds, taken on its way: no forward of its own.

watching = Watching(model, axis.layer, axis.at(axis.layer))
with watching.on(), steering.on():          # before the steering's hooks, and so before any step at the layer
    ...                                     # forwards of a decoder that tells `watching` what they are about
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.kv_cache import decoding_mask
from personatlas.persona.sampling.next_token import draw
from personatlas.persona.sampling.sampler import (
    Decoder,
    Prompt,
    SamplerCallback,
    SamplerCallbacks,
    batch_end,
    batch_tokens,
)
from personatlas.steering.hooks.steering import Steering
from personatlas.steering.serve.engine.prefix_cache import CachedPrefix


class ProjectionHook(SamplerCallback):
    """<h, v> at one layer, fp32: of the token that each slot was fed last, and of the texts that were read last."""

    def __init__(self, model: Model, layer: int, vector: Float[Tensor, " D"]) -> None:
        self.block, self.device = model.blocks[layer], next(model.blocks[layer].parameters()).device
        self.vector = vector.detach().to(self.device, torch.float32)
        self.latest = torch.zeros(0, device=self.device)  # (slots,)
        self.read: list[Float[Tensor, "B T"]] = []  # of each forward that reads, until they are taken
        self._reading = False

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hook is on the block inside."""
        handle = self.block.register_forward_hook(self._keep)
        try:
            yield
        finally:
            handle.remove()

    def resize(self, slots: int) -> None:
        """There are so many slots from now on."""
        self.latest = torch.zeros(slots, device=self.device)

    def before_prefill(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        """The next forward reads prompts."""
        self._reading = True

    def before_decode(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        """The next forward feeds one token to each of the first slots."""
        self._reading = False

    def state(self) -> list[Tensor]:
        """The latest projections."""
        return [self.latest]

    def taken(self) -> list[Float[Tensor, "B T"]]:
        """What was read since the last call."""
        taken, self.read = self.read, []
        return taken

    def _keep(self, _module: Any, _args: Any, output: Any) -> None:
        h = residual(output)
        # not a matrix product, whose precision is the user's choice on a GPU
        projection = (h.float() * self.vector).sum(-1)  # (B, T)
        if self._reading:
            self.read.append(projection)
        else:
            self.latest[: len(h)].copy_(projection[:, 0])


log = logging.getLogger(__name__)
CPU_TOKENS, GPU_TOKENS = 2048, 32768  # most padded tokens read at once


@dataclass(eq=False)
class BatchRow:
    """A prompt and how to answer it; then, what was fed so far. `projections[i]` is that of `fed` token i."""

    prompt: Prompt
    temperature: float
    top_p: float
    logprobs: int | None = None  # so many of the likeliest tokens, None for no log-probabilities
    fed: int = 0
    kept: int = 0  # of them from a prefix
    drawn: list[int] = field(default_factory=list)
    projections: list[float] = field(default_factory=list)
    fired: int = 0  # tokens times layers, so far
    read_fired: int = 0  # of them in the prompt but its last token
    slot: int = -1

    @property
    def ids(self) -> list[int]:
        """All tokens, prompt and answer."""
        return [*self.prompt.ids, *self.drawn]


@dataclass(frozen=True)
class TokenEvent:
    """One step of a row: the token that was drawn, and of the one that was fed its projection and at how many layers it was
    changed. `likely` are log-probabilities: of the drawn token, and of the likeliest ones by id."""

    token: int
    projection: float
    fired: int
    likely: tuple[float, dict[int, float]] | None = None


class DecodeBatch:
    """The slots and all tensors that a step changes in place."""

    def __init__(
        self, model: Model, slots: int, length: int, watching: ProjectionHook, steering: Steering
    ) -> None:
        self.model, self.slots, self.length = model, slots, length
        self.watching, self.steering = watching, steering
        followers = SamplerCallbacks(steering, watching)
        self.decoder = Decoder(model, slots + 1, length, followers)
        followers.resize(slots + 2)  # one for the reading slot, one for texts that are scored
        self.followers, self.rows = followers, list[BatchRow]()
        device = model.device
        self.tokens, self.positions, self.seeds, self.steps = (
            torch.zeros(slots, dtype=torch.long, device=device) for _ in range(4)
        )
        self.temperature, self.top_p = (torch.ones(slots, device=device) for _ in range(2))
        self.running = torch.zeros(slots, dtype=torch.bool, device=device)
        self.logits = torch.zeros(0)
        self.reads_at_once = batch_tokens(model, CPU_TOKENS, GPU_TOKENS)
        self._graphs: dict[tuple[int, tuple[int, ...]], tuple[Callable[[], None], Tensor]] = {}
        self.usual: set[tuple[int, ...]] = {()}  # layers that have graphs of their own
        self._sizes = sorted({1, 2, 4, *range(8, slots, 8), slots})

    def forget(self) -> None:
        """A forward failed half-way: nothing of it goes on."""
        state = self.decoder.cache.state
        state.prefill, state.going_on = False, None
        self.steering.forget()
        self.watching.taken()

    @property
    def free(self) -> int:
        """Slots that no decoding row has."""
        return self.slots - len(self.rows)

    def read(self, rows: Sequence[BatchRow]) -> None:
        """Read whole prompts from their beginning; the rows decode from now on."""
        taken = list(range(len(self.rows), len(self.rows) + len(rows)))
        prompts = [row.prompt for row in rows]
        self.followers.assign_slots(taken, prompts)
        self.steering.restrict_layers(self._acting(rows))
        self.decoder.prefill([prompt.ids for prompt in prompts], taken)
        projections = self._read_projections([len(prompt.ids) - 1 for prompt in prompts])
        for row, slot, own in zip(rows, taken, projections, strict=True):
            row.slot, row.fed, row.projections = slot, len(own), own
        self._begin(rows)

    def open(self, row: BatchRow, prefix: CachedPrefix | None, tokens: int) -> None:
        """Take the reading slot, with the first `tokens` of a prefix in it."""
        self.followers.assign_slots([self.slots], [row.prompt])
        row.slot = self.slots
        if prefix is not None:
            self.decoder.cache.restore(self.slots, tokens, prefix.saved)
            row.fed = row.kept = tokens
            row.projections = list(prefix.projections[:tokens])

    def read_part(self, row: BatchRow, most: int) -> bool:
        """Read the next tokens of the row in the reading slot; whether that was all, and it decodes from now on."""
        last = len(row.prompt.ids) - 1
        ids = row.prompt.ids[row.fed : min(row.fed + most, last)]
        if ids:
            self.steering.restrict_layers(self._acting([row]))
            self.decoder.read_on(ids, row.slot, row.fed)
            row.projections += self._read_projections([len(ids)])[0]
            row.fed += len(ids)
        if row.fed < last:
            return False
        self._move(row, len(self.rows))
        self._begin([row])
        return True

    def step(self) -> list[tuple[BatchRow, TokenEvent]]:
        """One token more for every row."""
        n, acting = len(self.rows), self._acting(self.rows)
        self.steering.restrict_layers(acting)
        if self.model.device.type == "cuda":
            if acting not in self.usual:
                acting = (
                    self.steering.layers
                )  # one graph for all caps that requests describe: idle plans change nothing
                self.steering.restrict_layers(acting)
            size = next(size for size in self._sizes if size >= n)
            if (size, acting) not in self._graphs:
                self._graphs[size, acting] = self._captured(size)
            advance, self.logits = self._graphs[size, acting]
            advance()
        else:
            self._advance(n, max(row.fed for row in self.rows) + 1)
        found = [self.tokens[:n].double(), self.watching.latest[:n].to(self.tokens.device).double()]
        fired = (
            self.steering.fired_of(n).to(self.tokens.device).double()
            if acting
            else torch.zeros_like(found[0])
        )
        told = torch.stack([*found, fired]).tolist()  # the one place that waits for a GPU
        likely = self._likely(told[0])
        return [
            (row, self._stepped(row, int(told[0][at]), told[1][at], int(told[2][at]), likely.get(at)))
            for at, row in enumerate(self.rows)
        ]

    def scored(self, prompt: Prompt, most: int) -> list[tuple[float | None, dict[int, float]]]:
        """Log-probabilities of a text's own tokens and the likeliest at each place, with the plan on. The first has none."""
        slot, device = self.slots + 1, self.model.device
        self.followers.assign_slots([slot], [prompt])
        self.steering.restrict_layers(self._acting([BatchRow(prompt, 1.0, 1.0)]))
        ids = torch.tensor([prompt.ids], device=device)
        self.followers.before_prefill(
            torch.tensor([slot], device=device), torch.tensor([len(prompt.ids)], device=device)
        )
        logits = self.model.hf(input_ids=ids, use_cache=False).logits[0, :-1]
        self.watching.taken()
        found: list[tuple[float | None, dict[int, float]]] = [(None, {})]
        for first in range(0, len(logits), 256):
            scores = logits[first : first + 256].float().log_softmax(-1)
            own = scores.gather(1, ids[0, first + 1 : first + 1 + len(scores), None])[:, 0].tolist()
            values, places = scores.topk(most)
            best = [
                dict(zip(*pair, strict=True)) for pair in zip(places.tolist(), values.tolist(), strict=True)
            ]
            found += zip(own, best, strict=True)
        return found

    def finish(self, row: BatchRow) -> None:
        """The row is through, or given up: the last one moves into its slot."""
        if row not in self.rows:  # still being read
            return
        last = self.rows[-1]
        if last is not row:
            self._move(last, row.slot)
            at, source = row.slot, len(self.rows) - 1
            for values in (self.tokens, self.positions, self.seeds, self.steps, self.temperature, self.top_p):
                values[at] = values[source]
            self.rows[at] = last
        self.rows.pop()
        self.running[len(self.rows)] = False
        self.positions[len(self.rows)] = 0

    def saved(self, row: BatchRow, digest: str, columns: int) -> CachedPrefix:
        """The first tokens that were fed to a row, to go on from later."""
        ids = np.asarray(row.ids[:columns], dtype=np.int64)
        return CachedPrefix(
            digest, ids, tuple(row.projections[:columns]), self.decoder.cache.saved(row.slot, columns)
        )

    def require_steered(self, row: BatchRow) -> None:
        """`HookDidNotFire` unless every token that was fed to a row was met by its plan, layer by layer."""
        read = len(row.prompt.ids) if row.fed >= len(row.prompt.ids) else row.fed
        opening = int(row.kept == 0 and row.fed > 0)
        fed = (read - row.kept - opening, row.fed - read, opening)
        self.steering.require_seen(row.slot, row.prompt.plan, fed)

    def _acting(self, rows: Sequence[BatchRow]) -> tuple[int, ...]:
        """Layers at which any of the rows is steered."""
        plans = {row.prompt.plan for row in rows if row.prompt.plan >= 0}
        layers = {layer for plan in plans for one in self.steering.plans[plan] for layer in one.layers}
        return tuple(sorted(layers))

    def _stepped(
        self, row: BatchRow, token: int, projection: float, fired: int, likely: object
    ) -> TokenEvent:
        step = TokenEvent(token, projection, fired - row.fired, likely)  # type: ignore[arg-type]
        row.fired, row.fed = fired, row.fed + 1
        row.projections.append(projection)
        row.drawn.append(token)
        return step

    def _begin(self, rows: Sequence[BatchRow]) -> None:
        """Rows whose prompts are read but for the last token take the next slots."""
        first = len(self.rows)
        at = slice(first, first + len(rows))
        fired = self.steering.fired_of(at.stop)[first:].tolist()
        for row, own in zip(rows, fired, strict=True):
            row.fired = row.read_fired = int(own)
        prompts = [row.prompt for row in rows]
        self.tokens[at] = self._of([prompt.ids[-1] for prompt in prompts])
        self.positions[at] = self._of([len(prompt.ids) - 1 for prompt in prompts])
        self.seeds[at] = self._of([prompt.seed for prompt in prompts])
        self.temperature[at] = self._of([row.temperature for row in rows])
        self.top_p[at] = self._of([row.top_p for row in rows])
        self.steps[at], self.running[at] = 0, True
        self.rows += rows

    def _of(self, values: Sequence[float] | Sequence[int]) -> Tensor:
        return torch.tensor(values, device=self.model.device)

    def _move(self, row: BatchRow, slot: int) -> None:
        self.decoder.move(row.slot, slot, row.fed)
        self.followers.move(row.slot, slot)
        row.slot = slot

    def _read_projections(self, lengths: Sequence[int]) -> list[list[float]]:
        """Of the texts that were just read, in their order."""
        read = [line for batch in self.watching.taken() for line in batch.cpu()]
        return [line[:length].tolist() for line, length in zip(read, lengths, strict=True)]

    def _likely(self, tokens: list[float]) -> dict[int, tuple[float, dict[int, float]]]:
        asked = [at for at, row in enumerate(self.rows) if row.logprobs is not None]
        if not asked:
            return {}
        scores = self.logits[torch.tensor(asked, device=self.logits.device)].float().log_softmax(-1)
        most = max(self.rows[at].logprobs or 1 for at in asked)
        values, ids = scores.topk(most)
        found = {}
        for line, at in enumerate(asked):
            best = dict(zip(ids[line].tolist(), values[line].tolist(), strict=True))
            shown = dict(list(best.items())[: self.rows[at].logprobs])
            found[at] = (float(scores[line, int(tokens[at])]), shown)
        return found

    def _advance(self, n: int, visible: int) -> None:
        """Feed one token to slots 0..n-1 and draw the next; slots at rest among them feed theirs to their first column."""
        state, positions, running = self.decoder.cache.state, self.positions[:n], self.running[:n]
        state.prefill, state.positions, state.visible = False, positions, visible
        mask = decoding_mask(self.decoder.config, positions, visible, self.model.dtype)
        self.followers.before_decode(running, self.steps[:n] == 0, positions == 0)
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

    def _captured(self, size: int) -> tuple[Callable[[], None], Tensor]:
        """A step of so many slots as a CUDA graph, the state left as it was; the step itself where it cannot be captured."""
        state = [self.tokens, self.positions, self.steps, *self.followers.state()]
        before = [tensor.clone() for tensor in state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self._advance(size, self.length)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        replay: Callable[[], None] = graph.replay
        try:
            with torch.cuda.graph(graph):
                self._advance(size, self.length)
        except RuntimeError as error:
            log.warning(
                "a decoding step cannot be captured (%s): serving is slower", str(error).splitlines()[0]
            )

            def replay() -> None:
                self._advance(size, self.length)

        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        return replay, self.logits


def fitting(rows: Sequence[BatchRow], tokens: int) -> int:
    """How many of the rows, from the first on, can be read together."""
    return batch_end([len(row.prompt.ids) for row in rows], 0, tokens)
