"""A key-value cache of slots: rows of one batch that stand at different positions of different conversations.

Prompts are right-padded and written at position 0; each decoding step writes one token per row at the row's
own position. Nothing is concatenated or copied from step to step, and a finished row's slot is taken by
another row. It is an ordinary `transformers` cache, so every model that takes one runs on it unchanged.
"""

import contextlib
import math
import mmap
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

if TYPE_CHECKING:
    from personatlas.persona.models.load import Model

CPU_BYTES = 4 * 2**30  # for keys and values on a CPU


class SlotState:
    """What one forward is about: which slots, at which positions, and how many cache columns it may see."""

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.prefill = True
        self.rows = torch.zeros(0, dtype=torch.long)  # (n,) slots of a prefill
        self.positions = torch.zeros(0, dtype=torch.long)  # (n,) of a decoding step
        self.visible = length
        self.resumed: tuple[int, int] | None = None  # (slot, column): a prefill that continues what is there


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, length, head_dim), allocated at the first write."""

    is_sliding = False

    def __init__(self, state: SlotState) -> None:
        super().__init__()
        self.state = state

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the heads, width, dtype and device that the model turned out to have."""
        shape = (self.state.slots, key_states.shape[1], self.state.length)
        self.keys = _zeros((*shape, key_states.shape[-1]), key_states)
        self.values = _zeros((*shape, value_states.shape[-1]), value_states)
        self.rows = torch.arange(self.state.slots, device=key_states.device)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values (n, heads, T, head_dim) and return what the queries may look at."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        state, (n, _, length, _) = self.state, key_states.shape
        if state.prefill and state.resumed is not None:
            slot, start = state.resumed
            self.keys[slot, :, start : start + length] = key_states[0]
            self.values[slot, :, start : start + length] = value_states[0]
            stop = start + length
            return self.keys[slot : slot + 1, :, :stop], self.values[slot : slot + 1, :, :stop]
        if state.prefill:  # causal among themselves: right padding is never seen by a real token
            rows = state.rows.to(self.rows.device)
            self.keys[rows, :, :length] = key_states
            self.values[rows, :, :length] = value_states
            return key_states, value_states
        positions = state.positions.to(self.rows.device)
        self.keys[self.rows[:n], :, positions] = key_states[:, :, 0]
        self.values[self.rows[:n], :, positions] = value_states[:, :, 0]
        return self.keys[:n, :, : state.visible], self.values[:n, :, : state.visible]

    def move(self, source: int, target: int, columns: int | None = None) -> None:
        """Copy a slot over another: all of it, or its first columns."""
        if self.keys is not None and self.values is not None:
            self.keys[target, :, :columns].copy_(self.keys[source, :, :columns])
            self.values[target, :, :columns].copy_(self.values[source, :, :columns])

    def saved(self, slot: int, columns: int) -> tuple[Tensor, Tensor]:
        """Copies of a slot's first columns."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys[slot, :, :columns].clone(), self.values[slot, :, :columns].clone()

    def restore(self, slot: int, columns: int, saved: tuple[Tensor, Tensor]) -> None:
        """Put the first columns of what was saved into a slot."""
        if not self.is_initialized:
            self.lazy_initialization(saved[0][None], saved[1][None])
        assert self.keys is not None
        assert self.values is not None
        self.keys[slot, :, :columns] = saved[0][:, :columns]
        self.values[slot, :, :columns] = saved[1][:, :columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Key length and offset for masks that the model builds itself, which it does only in a prefill."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """0: positions are given explicitly."""
        return 0

    def get_max_length(self) -> int:
        """Columns of a slot."""
        return self.state.length


class SlotCache(Cache):
    """One `SlotLayer` per block, sharing a `SlotState`."""

    def __init__(self, n_layers: int, slots: int, length: int) -> None:
        self.state = SlotState(slots, length)
        super().__init__(layers=[SlotLayer(self.state) for _ in range(n_layers)])

    def move(self, source: int, target: int, columns: int | None = None) -> None:
        """Let the row in slot `source` continue in slot `target`; `columns` are all that it has written, if
        given.
        """
        for layer in self.layers:
            assert isinstance(layer, SlotLayer)
            layer.move(source, target, columns)

    def saved(self, slot: int, columns: int) -> list[tuple[Tensor, Tensor]]:
        """Copies of a slot's first columns, layer by layer."""
        return [layer.saved(slot, columns) for layer in self.layers if isinstance(layer, SlotLayer)]

    def restore(self, slot: int, columns: int, saved: list[tuple[Tensor, Tensor]]) -> None:
        """Put the first columns of what was saved into a slot."""
        for layer, own in zip(self.layers, saved, strict=True):
            assert isinstance(layer, SlotLayer)
            layer.restore(slot, columns, own)


def decoding_mask(
    config: Any, positions: Tensor, visible: int, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """What new tokens at `positions` (n, T) may attend to: (n, 1, T, visible), or one such mask a layer type.

    `positions` (n,) is one token per row. `config` is the text configuration. Raises ValueError for a layer
    type that is not attention over a cache.
    """
    at = (positions if positions.dim() == 2 else positions[:, None])[..., None]  # (n, T, 1)
    columns = torch.arange(visible, device=positions.device)
    full = columns <= at  # (n, T, visible)
    window = getattr(config, "sliding_window", None)
    near = full & (columns > at - window) if window else full
    chunk = getattr(config, "attention_chunk_size", None)
    same = full & (columns // chunk == at // chunk) if chunk else full
    kinds = {"full_attention": full, "sliding_attention": near, "chunked_attention": same}
    types = getattr(config, "layer_types", None)
    unknown = set(types or ()) - set(kinds)
    if unknown:
        raise ValueError(
            f"layers of type {', '.join(sorted(unknown))} keep another state than keys and values"
        )
    shaped = {name: _shape(mask, config, dtype) for name, mask in kinds.items()}
    if types and len(set(types)) > 1:
        return shaped
    if types:
        return shaped[types[0]]
    return shaped["sliding_attention"]


def fitting_tokens(model: "Model", share: float) -> int:
    """Tokens whose keys and values fit in a share of the card's memory beside the weights (on a CPU in
    `CPU_BYTES`); of a model without attention, what one of its width would have.

    Of the card's whole memory, not the free part: the same card always gives the same number.
    """
    config = model.hf.config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or model.d_model // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    memory: float = CPU_BYTES
    if model.device.type == "cuda":
        weights = sum(parameter.numel() * parameter.element_size() for parameter in model.hf.parameters())
        memory = share * (torch.cuda.get_device_properties(model.device).total_memory - weights)
    return int(memory / (2 * model.n_layers * heads * width * model.dtype.itemsize))


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Zeros of that dtype and device. On a CPU they take memory only where they are written: slots are made
    for the longest conversation, not for the usual one, and torch's own zeros are written at once. They must
    be zeros: what a mask hides is still multiplied. Huge pages are declined, since one token of a slot would
    take 2 MiB.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, math.prod(shape) * like.dtype.itemsize)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


def _shape(mask: Tensor, config: Any, dtype: torch.dtype) -> Tensor:
    mask = mask[:, None]  # (n, 1, T, visible)
    if config._attn_implementation == "eager":  # adds its mask to the scores
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask
