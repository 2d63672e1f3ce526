"""Samples of what a model answers to held-out questions while it is tuned.

Replies(run, encoder, conversations).write(model, step)      # {"step": 512, "prompt": ..., "text": ...}, four lines
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.rollout import spread
from personatlas.training.chat.conversations import Conversation
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.data.corpus import share_of
from personatlas.training.data.tokenizer import END
from personatlas.training.loop.run_log import cut_after
from personatlas.training.loop.samples import LENGTH, PROMPTS, SAMPLES, TEMPERATURE
from personatlas.training.model.gpt import GPT


class Replies:
    """Writes samples.jsonl in the run folder, once for every step that asks for it."""

    def __init__(self, folder: Path, encoder: ChatEncoder, conversations: Sequence[Conversation]) -> None:
        self.path, self.encoder = folder / SAMPLES, encoder
        self.asked = one_of_each(conversations, PROMPTS)
        self._written = {row["step"] for row in read_lines(self.path)}

    def write(self, model: GPT, step: int) -> None:
        """Answer the same few prompts with the same draws as ever; nothing where this step's answers are there."""
        if step in self._written:
            return
        length = min(LENGTH, model.shape.context // 4)
        fronts = [before_answer(one) for one in self.asked]
        written = replied(
            model, [self.encoder.prompt(front) for front in fronts], length, self.encoder.marks[END]
        )
        rows = []
        for front, ids in zip(fronts, written, strict=True):
            said = "\n".join(f"{message['role']}: {message['content']}" for message in front)
            rows.append({"step": step, "prompt": said, "text": self.encoder.tokenizer.decode(ids)})
        append_lines(self.path, rows, sync=False)
        self._written.add(step)

    def cut_after(self, step: int) -> None:
        """Forget later steps: the run goes on from this one."""
        cut_after(self.path, step)
        self._written = {row["step"] for row in read_lines(self.path)}


@torch.no_grad()
def replied(model: GPT, prompts: Sequence[Sequence[int]], length: int, end: int) -> list[list[int]]:
    """At most `length` more ids of each prompt, up to `end`, by draws that are the same at every step and on every device.

    Rows grow at their own ends, and what is behind those no token sees. Without a cache: for samples, not serving.
    """
    if not prompts:
        return []
    prompts = [prompt[-(model.shape.context - length) :] for prompt in prompts]
    ends = torch.tensor([len(prompt) for prompt in prompts])  # on the CPU
    ids = torch.zeros(len(prompts), int(ends.max()) + length, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    starts, rows, generator = ends.clone(), torch.arange(len(prompts)), torch.Generator().manual_seed(0)
    ended = torch.zeros(len(prompts), dtype=torch.bool)
    for _ in range(length):
        h = model.residuals(ids[:, : int(ends.max())].to(model.lm_head.weight.device))[
            rows, ends - 1
        ]  # (B, D)
        logits = model.lm_head(h.float()).cpu()  # (B, V)
        new = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)[:, 0]
        ended |= new == end
        ids[rows, ends] = new
        ends = torch.where(ended, ends, ends + 1)
        if ended.all():
            break
    return [ids[row, starts[row] : ends[row]].tolist() for row in range(len(prompts))]


def before_answer(one: Conversation) -> list[dict[str, str]]:
    """The messages before the last answer."""
    last = max(place for place, message in enumerate(one.messages) if message["role"] == "assistant")
    return list(one.messages[:last])


def one_of_each(conversations: Sequence[Conversation], count: int) -> list[Conversation]:
    """So many conversations, shared out evenly over the labels as far as they have them; by the hash of what is asked."""
    by_label: dict[str, list[Conversation]] = defaultdict(list)
    for one in sorted(conversations, key=lambda one: (share_of(one.question), one.label, one.where)):
        by_label[one.label].append(one)
    order = [by_label[label] for label in spread(sorted(by_label), count)]
    turn = [
        listed[
            (place + number) % len(listed)
        ]  # labels that are asked the same questions begin with different ones
        for place in range(max(map(len, order), default=0))
        for number, listed in enumerate(order)
        if place < len(listed)
    ]
    return turn[:count]
