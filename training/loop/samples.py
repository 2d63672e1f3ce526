"""What a model in training writes: held-out documents begun by their authors and continued by it.

    samples = TextSamples(run, load_corpus_tokenizer(folder), tokens.held_out)
    samples.write(model, step=512)                 # {"step": 512, "prompt": ..., "text": ...}, four lines

The prompts are the first tokens of documents that the model never trains on, spread evenly over them, and the
draws are the same at every step, so what changes from checkpoint to checkpoint is the model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from personatlas.training.data.token_shards import Stream
from personatlas.training.loop.run_log import SampleWriter
from personatlas.training.model.gpt import GPT

PROMPTS = 4
PROMPT_LENGTH = 16  # tokens of a document after its mark
LENGTH = 64  # tokens that are written
TEMPERATURE = 0.8


class TextSamples(SampleWriter):
    """Continues the beginnings of held-out documents; without long enough documents it writes nothing."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        stream: Stream,
        *,
        count: int = PROMPTS,
        length: int | None = None,
    ) -> None:
        super().__init__(folder)
        self.tokenizer, self.length = tokenizer, LENGTH if length is None else length
        self.prompts = document_beginnings(stream, count)

    def sample(self, model: GPT) -> list[tuple[str, str]]:
        if not self.prompts:
            return []
        generator = torch.Generator().manual_seed(0)
        return sample_texts(model, self.tokenizer, self.prompts, self.length, generator)


def document_beginnings(stream: Stream, count: int, length: int = PROMPT_LENGTH) -> list[list[int]]:
    """The mark and first `length` ids of up to `count` documents, evenly over those of twice the length."""
    starts = stream.starts().tolist()
    ends = [*starts[1:], len(stream)]
    long = [start for start, end in zip(starts, ends, strict=True) if end - start > 2 * length]
    selected = [long[i * len(long) // count] for i in range(count)] if len(long) > count else long
    return [stream.read(start, start + 1 + length).tolist() for start in selected]


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator,
    temperature: float = TEMPERATURE,
) -> list[tuple[str, str]]:
    """(prompt, continuation) for prompts of one length; a text ends before its first special token.

    The draws are on the CPU, so a generator gives the same ones on every device.
    """
    ids = torch.tensor(prompts, device=model.lm_head.weight.device)  # (B, T)
    written = _continued(model, ids, length, generator, temperature)[:, ids.shape[1] :].tolist()
    special = set(tokenizer.get_added_tokens_decoder())
    texts = []
    for prompt, new in zip(prompts, written, strict=True):
        end = next((i for i, id in enumerate(new) if id in special), len(new))
        texts.append((tokenizer.decode(list(prompt)), tokenizer.decode(new[:end])))
    return texts


@torch.no_grad()
def _continued(
    model: GPT, ids: Int64[Tensor, "B T"], length: int, generator: torch.Generator, temperature: float
) -> Int64[Tensor, "B N"]:
    """`GPT.generate` with the head at the last position only: at all of them it would be most of the work."""
    for _ in range(length):
        last = model.hidden_states(ids[:, -model.shape.context :])[:, -1]  # (B, D)
        logits = model.lm_head(last).float().cpu()  # (B, V)
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new.to(ids.device)], dim=1)
    return ids
