"""Recording: one prefill of prompt + answer through the base model, reduced to (L, D) a rollout inside the
hooks.

    mean[l] = 1/|span| * sum over the answer's tokens of the output of block l,   summed in fp32 on the device

Rows are padded on the right (padding on the left costs 6e-3 in bf16), so causal attention needs no mask and
no real token ever sees padding. Memory is O(layers x batch x D): no hidden state outlives its block. The
answer's last token is fed too; its activation does not exist in a generation, which never forwards it.
Position 0, the attention sink, is never in a span.

A batch is read while the GPU works on the next one: padding and reading cost as long as the forward does
otherwise.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor

from personatlas.persona.errors import UserError
from personatlas.persona.models.hooks import capture
from personatlas.persona.models.load import Model
from personatlas.persona.rollout import Rollout, check_vocabulary
from personatlas.persona.sampling.sampler import batch_end, batch_tokens, pad, to_device

CPU_TOKENS, GPU_TOKENS = (
    2048,
    131072,
)  # most padded tokens a batch; a CPU batch of 8192 was 30% slower than one of 2048
COMPILE_FROM = 15_000_000  # tokens: compiling took 10 s on an H200 and saved 0.8 s a million
GPU_MULTIPLE = 32  # fewer distinct lengths, fewer compiled shapes


def span_sum(
    h: Float[Tensor, "B T D"], start: Int[Tensor, " B"], stop: Int[Tensor, " B"]
) -> Float[Tensor, "B D"]:
    """The sum over tokens start <= t < stop of each row, in fp32 whatever h's dtype."""
    if h.is_cuda:
        from personatlas.persona.sampling.kernels import span_sum_on_gpu

        return span_sum_on_gpu(h, start, stop)
    return span_sum_plainly(h, start, stop)


def span_sum_plainly(
    h: Float[Tensor, "B T D"], start: Int[Tensor, " B"], stop: Int[Tensor, " B"]
) -> Float[Tensor, "B D"]:
    """The same in plain torch, for CPUs and as the kernel's reference."""
    at = torch.arange(h.shape[1], device=h.device)
    inside = (at >= start[:, None]) & (at < stop[:, None])  # (B, T)
    first = int(start.min())
    return torch.einsum("btd,bt->bd", h[:, first:].float(), inside[:, first:].float())


class SpanMeans:
    """Sums of one batch's spans, added up in hooks on every block; `read` proves that each of them fired once."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.sums: dict[int, Float[Tensor, "B D"]] = {}
        self.spans: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def begin(self, start: Int[Tensor, " B"], stop: Int[Tensor, " B"]) -> None:
        """Set the spans, CPU tensors, of the batch that is forwarded next."""
        if int(start.min()) < 1 or bool((stop <= start).any()):
            raise ValueError("a span must start after position 0 and hold at least one token")
        device = self.model.device
        self.sums, self.spans = {}, {device: (to_device(start, device), to_device(stop, device))}

    def add(self, layer: int, h: Float[Tensor, "B T D"]) -> Float[Tensor, "B D"]:
        """The spans' sums of one block's output, which are kept."""
        if h.device not in self.spans:  # layers spread over devices
            start, stop = self.spans[self.model.device]
            self.spans[h.device] = (start.to(h.device), stop.to(h.device))
        if layer in self.sums:
            raise RuntimeError(f"block {layer} ran twice in one forward")
        self.sums[layer] = span_sum(h, *self.spans[h.device])
        return self.sums[layer]

    def read(self) -> Float[Tensor, "B L D"]:
        """Means of the batch that was forwarded, fp32, on the model's device."""
        silent = [layer for layer in range(self.model.n_layers) if layer not in self.sums]
        if silent:
            raise RuntimeError(f"the hooks of layers {silent} did not fire: nothing was recorded")
        start, stop = self.spans[self.model.device]
        sums = torch.stack([self.sums[layer].to(start.device) for layer in range(self.model.n_layers)], dim=1)
        return sums / (stop - start)[:, None, None]  # (B, L, D)


@contextmanager
def record_spans(model: Model) -> Iterator[SpanMeans]:
    """Hooks for the length of the context; the model is left as it was found, also after an exception."""
    means = SpanMeans(model)
    with capture(model, range(model.n_layers), means.add):
        yield means


@contextmanager
def compiled(model: Model, *, enabled: bool) -> Iterator[None]:
    """Blocks whose forward is compiled, one graph for all alike, for the length of the context.

    The hooks stay outside the compiled forward, so they fire; `SpanMeans.read` would say so if they did not.
    """
    if not enabled:
        yield
        return
    try:
        for block in model.blocks:
            block.forward = torch.compile(block.forward, dynamic=True)
        yield
    finally:
        for block in model.blocks:
            block.__dict__.pop("forward", None)


@torch.no_grad()
def record(
    model: Model, rollouts: Sequence[Rollout], *, tokens: int | None = None, compile: bool | None = None
) -> Iterator[tuple[list[int], Float[Tensor, "B L D"]]]:
    """Yield batches of (indices into `rollouts`, their means on the CPU), sorted by length, about `tokens`
    padded tokens each.

    `compile` None compiles the blocks on a GPU when there is enough to record to pay for it. Raises
    `UserError` for an empty answer, or a rollout longer than the model's context.
    """
    whole = _lengths(model, rollouts)
    order = sorted(range(len(rollouts)), key=whole.__getitem__, reverse=True)
    lengths = [whole[i] for i in order]
    tokens = tokens or batch_tokens(model, CPU_TOKENS, GPU_TOKENS)
    compile = worth_compiling(model, sum(lengths)) if compile is None else compile
    first, before, reader = 0, None, Reader(model.device)
    with compiled(model, enabled=compile), record_spans(model) as means:
        while first < len(order):
            stop = batch_end(lengths, first, tokens)
            chosen = order[first:stop]
            batch = [rollouts[i] for i in chosen]
            multiple = GPU_MULTIPLE if model.device.type == "cuda" else 1
            texts = [rollout.prompt_ids + rollout.answer_ids for rollout in batch]
            ids = pad(texts, model.device, multiple, model.context)
            means.begin(torch.tensor([len(r.prompt_ids) for r in batch]), torch.tensor(lengths[first:stop]))
            model.base(input_ids=ids, use_cache=False)
            now = chosen, reader.start(means.read())
            if before is not None:
                yield before[0], before[1]()
            first, before = stop, now
        if before is not None:
            yield before[0], before[1]()


def worth_compiling(model: Model, tokens: int) -> bool:
    """Whether compiling the blocks is paid back by that many tokens to record."""
    return model.device.type == "cuda" and tokens > COMPILE_FROM


class Reader:
    """Copies means to the CPU on a stream of its own, beside the next batch's forward."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, value: Tensor) -> Callable[[], Tensor]:
        """Start copying; the result waits for the copy and gives it."""
        if self.stream is None:
            return lambda: value
        host = torch.empty(
            value.shape, dtype=value.dtype, pin_memory=True
        )  # a copy to other memory waits for the GPU
        self.stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self.stream):
            host.copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        value.record_stream(self.stream)

        def wait() -> Tensor:
            copied.synchronize()
            return host

        return wait


def require_known_ids(model: Model, rollouts: Sequence[Rollout]) -> None:
    """`UserError` for a rollout with a token that the model has not."""
    for rollout in rollouts:
        try:
            check_vocabulary(rollout.prompt_ids, model.vocab_size)
            check_vocabulary(rollout.answer_ids, model.vocab_size)
        except ValueError as error:
            raise UserError(
                f"rollout {rollout.key}: {error}; the file it is in is damaged or another model's: delete it"
            ) from None


def _lengths(model: Model, rollouts: Sequence[Rollout]) -> list[int]:
    """Tokens of prompt and answer together, checked against what can be recorded."""
    limit = model.context
    require_known_ids(model, rollouts)
    lengths = [len(rollout.prompt_ids) + len(rollout.answer_ids) for rollout in rollouts]
    for rollout, length in zip(rollouts, lengths, strict=True):
        if not rollout.answer_ids:
            raise UserError(f"rollout {rollout.key} has an empty answer: nothing to record")
        if limit and length > limit:
            raise UserError(f"rollout {rollout.key} has {length} tokens; {model.id} holds {limit}")
    return lengths
