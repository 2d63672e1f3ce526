"""What a model in training writes: held-out documents begun by their authors and continued by it, at every evaluation.

    samples = Samples(run, load_tokenizer(folder), tokens.held_out)
    samples.write(model, step=512)                 # {"step": 512, "prompt": ..., "text": ...}, four lines

The prompts are the first tokens of documents that the model never trains on, spread evenly over them, and the draws are the same
at every step, so what changes from checkpoint to checkpoint is the model.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import Tokenizer
from torch import Tensor

from personatlas.persona.logs import append_lines, read_lines
from personatlas.training.data.token_shards import Stream
from personatlas.training.loop.run_log import cut_after
from personatlas.training.model.gpt import GPT

SAMPLES = "samples.jsonl"
PROMPTS = 4
BEGUN = 16  # tokens of a document after its mark
LENGTH = 64  # tokens that are written
TEMPERATURE = 0.8


class Samples:
    """Writes samples.jsonl in a run folder, once for every step that asks for it. Without long enough documents, nothing."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, stream: Stream, *, count: int = PROMPTS) -> None:
        self.path, self.tokenizer = folder / SAMPLES, tokenizer
        self.prompts = beginnings(stream, count)
        self._written = {row["step"] for row in read_lines(self.path)}

    def write(self, model: GPT, step: int, length: int | None = None) -> None:
        """Sample `length` tokens (LENGTH) and append; nothing where this step's are there. `model` is the GPT itself: compiled, every length is another."""
        if step in self._written or not self.prompts:
            return
        texts = sample_texts(
            model,
            self.tokenizer,
            self.prompts,
            LENGTH if length is None else length,
            torch.Generator().manual_seed(0),
        )
        append_lines(
            self.path, [{"step": step, "prompt": prompt, "text": text} for prompt, text in texts], sync=False
        )
        self._written.add(step)

    def cut_after(self, step: int) -> None:
        """Forget later steps: the run goes on from this one."""
        cut_after(self.path, step)
        self._written = {row["step"] for row in read_lines(self.path)}


def beginnings(stream: Stream, count: int, length: int = BEGUN) -> list[list[int]]:
    """The first ids (the mark and `length` more) of up to `count` documents, spread evenly over those that are longer."""
    starts = stream.starts().tolist()
    ends = [*starts[1:], len(stream)]
    long = [start for start, end in zip(starts, ends, strict=True) if end - start > 2 * length]
    chosen = [long[i * len(long) // count] for i in range(count)] if len(long) > count else long
    return [stream.read(start, start + 1 + length).tolist() for start in chosen]


def sample_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    length: int,
    generator: torch.Generator,
    temperature: float = TEMPERATURE,
) -> list[tuple[str, str]]:
    """(prompt, what the model writes) for prompts of one length; a text ends before its first special token.

    The draws are on the CPU, so a generator gives the same ones on every device.
    """
    ids = torch.tensor(prompts, device=model.lm_head.weight.device)  # (B, T)
    written = _continued(model, ids, length, generator, temperature)[:, ids.shape[1] :].tolist()
    special = set(tokenizer.get_added_tokens_decoder())
    found = []
    for prompt, new in zip(prompts, written, strict=True):
        end = next((i for i, id in enumerate(new) if id in special), len(new))
        found.append((tokenizer.decode(list(prompt)), tokenizer.decode(new[:end])))
    return found


@torch.no_grad()
def _continued(
    model: GPT, ids: Int64[Tensor, "B T"], length: int, generator: torch.Generator, temperature: float
) -> Int64[Tensor, "B N"]:
    """`GPT.continued` with the head at the last place only: its products over all places would be most of the work."""
    for _ in range(length):
        last = model.residuals(ids[:, -model.shape.context :])[:, -1]  # (B, D)
        logits = model.lm_head(last).float().cpu()  # (B, V)
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        ids = torch.cat([ids, new.to(ids.device)], dim=1)
    return ids
