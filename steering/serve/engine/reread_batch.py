"""Rows of a model whose state is not keys and values (recurrent ones, or positions that no slot takes): as a
`DecodeBatch`, but every step reads the whole texts once more. Slow, right for any causal decoder, and without
prefixes and graphs.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from personatlas.persona.sampling.next_token import draw
from personatlas.persona.sampling.sampler import PlainDecoder, Prompt, batch_end, pad
from personatlas.steering.serve.engine.batch import BatchRow, DecodeBatch
from personatlas.steering.serve.engine.prefix_cache import CachedPrefix


class RereadBatch(DecodeBatch):
    """A `DecodeBatch` without a cache. What a step counts is what it finds in the whole texts, so it counts
    anew.
    """

    decoder_type = PlainDecoder
    captures = False

    def reset(self) -> None:
        """Clears what a failed forward left half done."""
        self.steering.hooks.discard_forward()
        self.projection_hook.take()

    def open(self, row: BatchRow, prefix: CachedPrefix | None, tokens: int) -> None:
        """Its prompt is read whole when its turn comes."""
        assert prefix is None
        self.callbacks.assign_slots([self.slots], [row.prompt])
        row.slot = self.slots

    def prefill_chunk(self, row: BatchRow, max_tokens: int) -> bool:
        """Reads all of an opened row; it decodes from now on."""
        self.prefill([row])
        return True

    def _read_prompts(self, prompts: Sequence[tuple[int, ...]], slots: Sequence[int]) -> None:
        self.decoder.prefill(prompts, slots)
        lengths, device, first = [len(ids) for ids in prompts], self.model.device, 0
        while first < len(prompts):  # for their projections
            stop = batch_end(lengths, first, self.max_prefill_tokens)
            read = torch.tensor(lengths[first:stop], device=device) - 1
            self.callbacks.before_prefill(torch.tensor(slots[first:stop], device=device), read)
            self.model.base(
                input_ids=pad([ids[:-1] or ids for ids in prompts[first:stop]], device), use_cache=False
            )
            first = stop

    def _text_logits(self, prompt: Prompt, slot: int) -> Iterator[Tensor]:
        """Logits (T, V) of a text's tokens but the last, all from one forward."""
        device = self.model.device
        self.callbacks.assign_slots([slot], [prompt])
        self.steering.restrict_layers(self._steered_layers([prompt]))
        length = torch.tensor([len(prompt.ids)], device=device)
        self.callbacks.before_prefill(torch.tensor([slot], device=device), length)
        logits = self.model.hf(input_ids=pad([prompt.ids], device), use_cache=False).logits[0, :-1]
        self.projection_hook.take()
        yield from logits.split(self.scored_at_once)

    def _advance(self, n: int, visible: int) -> None:
        self.logits = self.decoder.step(self.tokens[:n], self.positions[:n])
        self.tokens[:n] = draw(
            self.logits, self.seeds[:n], self.steps[:n], self.temperature[:n], self.top_p[:n]
        )
        self.positions[:n] += 1
        self.steps[:n] += 1
