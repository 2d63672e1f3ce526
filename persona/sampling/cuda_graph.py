"""Sampling on a GPU: one decoding step of all slots, sampler included, captured as a CUDA graph and replayed.

    sampler = fastest_sampler(model, model.chat.end_ids, Sampling(max_new_tokens=64))

A step is about 1,500 small kernels; launched one by one they cost more than they compute. The graph holds the
model's own forward (whatever `transformers` runs, hooks included, so they must be there before the capture),
attention that reads each slot to its own length (`persona/sampling/kernels.py`), and the draw. Finished slots
are refilled from the same chunk every few steps, at moments that depend on the chunk alone, so that a chunk
is reproducible. What the caller does with an answer happens while the GPU works on the next steps.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from personatlas.persona.models.load import Model
from personatlas.persona.progress import Advance, no_advance
from personatlas.persona.sampling.kv_cache import decoding_mask, fitting_tokens
from personatlas.persona.sampling.next_token import draw
from personatlas.persona.sampling.sampler import Answer, Decoder, Prompt, Sampler, SamplerCallback, Sampling

log = logging.getLogger(__name__)

ATTENTION = "personatlas_slots"
POLL = 8  # steps between looks at who has finished: each look waits for the GPU
MOST_SLOTS = 4096
REFILL = 16  # a prefill, launched kernel by kernel, costs as much as two steps: it waits until one slot in 16 is free
MEMORY_SHARE = 0.6  # of the memory that the weights leave, for keys and values


def slot_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`transformers` attention function: the slot kernel for one new token per row, scaled dot product otherwise."""
    state = kwargs.pop("slot_state", None)
    plain = all(kwargs.get(name) is None for name in ("softcap", "s_aux", "position_bias"))
    width = key.shape[-1]
    fits = width >= 16 and width & (width - 1) == 0 and width == value.shape[-1]  # a power of two
    if state is None or state.prefill or query.shape[2] != 1 or not plain or not fits or not query.is_cuda:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    from personatlas.persona.sampling.kernels import attend_on_gpu

    scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    window = kwargs.get("sliding_window") or 0
    out = attend_on_gpu(query[:, :, 0], key, value, state.positions.to(query.device), scale, window)
    return out[:, None], None  # (B, 1, H, D)


@contextmanager
def use_slot_attention(model: Model) -> Iterator[None]:
    """Lets a model that uses scaled dot product attention use the slot kernel inside; others stay as they are."""
    before = model.hf.config._attn_implementation
    if before != "sdpa" or model.device.type != "cuda":
        yield
        return
    AttentionInterface.register(ATTENTION, slot_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.hf.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.hf.set_attn_implementation(before)


def fastest_sampler(
    model: Model, end_ids: frozenset[int], sampling: Sampling, longest: int | None = None
) -> Sampler:
    """The sampler to use on the model's device. `longest` is the longest prompt that will come, in tokens."""
    if model.device.type != "cuda":
        return Sampler(model, end_ids, sampling)
    return GraphSampler(model, end_ids, sampling, longest=longest)


class GraphSampler(Sampler):
    """A `Sampler` that keeps `slots` rows decoding and refills them; on a CPU it does the same without a
    graph.

    `longest` is the longest prompt that will come, in tokens: with it one capture serves all chunks.
    """

    def __init__(
        self,
        model: Model,
        end_ids: frozenset[int],
        sampling: Sampling,
        slots: int | None = None,
        longest: int | None = None,
    ) -> None:
        super().__init__(model, end_ids, sampling)
        self.slots, self.longest = slots, longest or 0
        self._steps: Steps | None = None
        self._no_callback = SamplerCallback()

    @torch.no_grad()
    def answers(
        self,
        prompts: Sequence[Prompt],
        callback: SamplerCallback | None = None,
        advance: Advance = no_advance,
    ) -> Iterator[Answer]:
        """Answers one chunk; answers come as they end. Another callback than the last one's is another capture."""
        if self.decoder is not Decoder:
            yield from super().answers(prompts, callback, advance)
            return
        self._require_room(prompts)
        longest = max(self.longest, *(len(prompt.ids) for prompt in prompts))
        length = -(-(longest + self.sampling.max_new_tokens) // 64) * 64
        with use_slot_attention(self.model):
            slots = min(self.slots or fitting_slots(self.model, length), len(prompts))
            callback = callback or self._no_callback
            callback.start(prompts)
            if self._steps is None or not self._steps.serves(slots, length, callback):
                self._steps = None
                gc.collect()  # steps and their sampler refer to each other, and their cache is of the card's size
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._steps = Steps(self, slots, length, callback)
            yield from self._steps.run(prompts, advance)


class Steps:
    """The state of all slots as fixed tensors, and the step that changes them in place."""

    def __init__(self, sampler: GraphSampler, slots: int, length: int, callback: SamplerCallback) -> None:
        model, device = sampler.model, sampler.model.device
        self.sampler, self.model, self.slots, self.length = sampler, model, slots, length
        self.limit, self.callback = sampler.sampling.max_new_tokens, callback
        self.decoder = Decoder(model, slots, length, callback)
        callback.resize(slots)
        self._callback_state = [id(tensor) for tensor in callback.state()]
        self.tokens = torch.zeros(slots, dtype=torch.long, device=device)
        self.positions, self.seeds, self.steps = (torch.zeros_like(self.tokens) for _ in range(3))
        self.written = torch.zeros(slots, self.limit, dtype=torch.long, device=device)
        self.running = torch.zeros(slots, dtype=torch.bool, device=device)
        self.ended = torch.zeros_like(self.running)  # by an end token, not by the limit
        self.state = self.decoder.cache.state
        self._replay: Callable[[], None] | None = None

    def serves(self, slots: int, length: int, callback: SamplerCallback) -> bool:
        """Whether the captured step does for that many slots of that length, with that callback's tensors."""
        same = (
            callback is self.callback and [id(tensor) for tensor in callback.state()] == self._callback_state
        )
        return same and self.slots == slots and self.length >= length

    def run(self, prompts: Sequence[Prompt], advance: Advance = no_advance) -> Iterator[Answer]:
        """Answers the prompts, refilling slots in order of the prompts."""
        waiting = list(range(len(prompts)))[::-1]
        rows: list[int | None] = [None] * self.slots
        told = [0] * self.slots  # tokens of each slot's answer that `advance` was told of
        done: list[Answer] = []
        self.running.zero_()
        while waiting or any(row is not None for row in rows):
            free = [slot for slot, row in enumerate(rows) if row is None]
            if waiting and len(free) >= min(max(self.slots // REFILL, 1), len(waiting)):
                filled = {slot: waiting.pop() for slot in free[: len(waiting)]}
                for slot, row in filled.items():
                    rows[slot], told[slot] = row, 0
                self._fill(list(filled), [prompts[row] for row in filled.values()])
            for _ in range(POLL):
                self._step()
            yield from done  # of the round before: the GPU is busy with this one
            done = self._finished(prompts, rows, told, advance)
        yield from done

    def _fill(self, slots: list[int], prompts: list[Prompt]) -> None:
        self.callback.assign_slots(slots, prompts)
        self.decoder.prefill([prompt.ids for prompt in prompts], slots)
        index = torch.tensor(slots, device=self.tokens.device)
        for target, values in (
            (self.tokens, [prompt.ids[-1] for prompt in prompts]),
            (self.positions, [len(prompt.ids) - 1 for prompt in prompts]),
            (self.seeds, [prompt.seed for prompt in prompts]),
            (self.steps, [0] * len(prompts)),
            (self.running, [1] * len(prompts)),
            (self.ended, [0] * len(prompts)),
        ):
            target[index] = torch.tensor(values, device=target.device, dtype=target.dtype)

    def _finished(
        self, prompts: Sequence[Prompt], rows: list[int | None], told: list[int], advance: Advance
    ) -> list[Answer]:
        """Takes the answers out of the slots that came to rest; this waits for the GPU."""
        running, ended, steps = self.running.tolist(), self.ended.tolist(), self.steps.tolist()
        now = [count if on else self.limit for count, on in zip(steps, running, strict=True)]
        busy = [slot for slot, row in enumerate(rows) if row is not None]
        advance(sum(now[slot] - told[slot] for slot in busy) / self.limit)
        told[:] = now
        done = {slot: row for slot, row in enumerate(rows) if row is not None and not running[slot]}
        written = self.written[
            torch.tensor(list(done), dtype=torch.long, device=self.written.device)
        ].tolist()
        answers = [
            Answer(row, tuple(ids[: steps[slot]]), "end" if ended[slot] else "length")
            for (slot, row), ids in zip(done.items(), written, strict=True)
        ]
        for slot in done:
            rows[slot] = None
        self.callback.finish(list(done), prompts, answers)
        return answers

    def _step(self) -> None:
        if self._replay is None:
            self._replay = self._advance
            if self.model.device.type == "cuda":
                self._replay = capture_step(self._advance, self._state(), self.model.id)
        self._replay()

    def _advance(self) -> None:
        """Feeds one token a slot, draws the next, notes who ended. A slot at rest feeds its last token once more."""
        config, state = self.decoder.config, self.state
        state.positions, state.visible = self.positions, self.length
        mask = decoding_mask(config, self.positions, self.length, self.model.dtype)
        self.callback.before_decode(self.running, self.steps == 0, self.positions == 0)
        logits = self.model.hf(
            input_ids=self.tokens[:, None],
            position_ids=self.positions[:, None],
            attention_mask=mask,
            past_key_values=self.decoder.cache,
            use_cache=True,
            slot_state=state,
        ).logits[:, -1]
        sampling = self.sampler.sampling
        tokens = draw(logits, self.seeds, self.steps, sampling.temperature, sampling.top_p)
        index = self.steps.clamp(max=self.limit - 1)[:, None]
        written = self.written.gather(1, index)[:, 0]
        self.written.scatter_(1, index, torch.where(self.running, tokens, written)[:, None])
        # not torch.isin: with many end tokens it sorts and waits, which no capture allows
        ends = (tokens[:, None] == self.sampler.end_ids).any(1) & self.running
        self.ended.logical_or_(ends)
        self.steps.add_((self.running & ~ends).long())  # an end token is not part of the answer
        self.running.logical_and_(~ends & (self.steps < self.limit))
        self.tokens.copy_(torch.where(self.running, tokens, self.tokens))
        self.positions.add_(self.running.long())

    def _state(self) -> list[Tensor]:
        own = [self.tokens, self.positions, self.seeds, self.steps, self.written, self.running, self.ended]
        return own + self.callback.state()


def capture_step(step: Callable[[], None], state: Sequence[Tensor], model_id: str) -> Callable[[], None]:
    """Captures a decoding step as a CUDA graph and returns its replay, or the step itself where it cannot be
    captured.

    `state` are all tensors that the step changes in place: two steps on a side stream warm it up, as a
    capture demands, and the tensors are put back afterwards. Some forwards wait for the GPU (Falcon's list
    indices, a mixture of experts in fp32) and cannot be captured: they stay slower, which the log says.
    """
    saved = [tensor.clone() for tensor in state]
    replay: Callable[[], None] = step
    device = state[0].device
    with torch.cuda.device(device):  # streams and captures are those of the current device
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, stream=side
            ):  # torch's own stream of captures is on the first card used
                step()

            def replay() -> None:
                with torch.cuda.device(device):
                    graph.replay()

        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            log.warning("%s: a decoding step cannot be captured (%s); sampling is slower", model_id, reason)
        for tensor, value in zip(state, saved, strict=True):
            tensor.copy_(value)
    return replay


def fitting_slots(model: Model, length: int) -> int:
    """How many slots of that length the GPU holds beside the weights, at most `MOST_SLOTS`.

    From the card's whole memory, not the free part: the same card always gives the same batches, so a resumed
    run gives the same answers.
    """
    if model.device.type != "cuda":
        return 64
    return max(1, min(MOST_SLOTS, fitting_tokens(model, MEMORY_SHARE) // length))
