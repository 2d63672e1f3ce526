"""Samples of what a model answers to held-out questions while it is tuned.

ReplySamples(run, encoder, examples).write(model, step)      # {"step": 512, "prompt": ..., "text": ...}, four
lines
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from personatlas.persona.formats import Message
from personatlas.persona.rollout import spread
from personatlas.training.chat.conversations import ChatExample
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.data.split import hash_share
from personatlas.training.data.tokenizer import END
from personatlas.training.loop.run_log import SampleWriter
from personatlas.training.loop.samples import LENGTH, PROMPTS, TEMPERATURE
from personatlas.training.model.gpt import GPT


class ReplySamples(SampleWriter):
    """Answers the same few held-out questions with the same draws every time."""

    def __init__(self, folder: Path, encoder: ChatEncoder, examples: Sequence[ChatExample]) -> None:
        super().__init__(folder)
        self.encoder = encoder
        self.prompts = [prompt_messages(example) for example in select_per_label(examples, PROMPTS)]

    def sample(self, model: GPT) -> list[tuple[str, str]]:
        length = min(LENGTH, model.shape.context // 4)
        ids = [self.encoder.prompt(messages) for messages in self.prompts]
        replies = sample_replies(model, ids, length, self.encoder.marks[END])
        return [
            (
                "\n".join(f"{message['role']}: {message['content']}" for message in messages),
                self.encoder.tokenizer.decode(reply),
            )
            for messages, reply in zip(self.prompts, replies, strict=True)
        ]


@torch.no_grad()
def sample_replies(model: GPT, prompts: Sequence[Sequence[int]], length: int, end: int) -> list[list[int]]:
    """At most `length` more ids of each prompt, up to `end`; the draws are the same at every step and on
    every device.

    Rows grow at their own ends, and what is behind those no token sees. It has no cache: for samples, not
    serving.
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
        h = model.hidden_states(ids[:, : int(ends.max())].to(model.lm_head.weight.device))
        logits = model.lm_head(h[rows, ends - 1].float()).cpu()  # (B, V)
        new = torch.multinomial((logits / TEMPERATURE).softmax(-1), 1, generator=generator)[:, 0]
        ended |= new == end
        ids[rows, ends] = new
        ends = torch.where(ended, ends, ends + 1)
        if ended.all():
            break
    return [ids[row, starts[row] : ends[row]].tolist() for row in range(len(prompts))]


def prompt_messages(example: ChatExample) -> list[Message]:
    """The messages before the last answer."""
    roles = [message["role"] for message in example.messages]
    return list(example.messages[: len(roles) - 1 - roles[::-1].index("assistant")])


def select_per_label(examples: Sequence[ChatExample], count: int) -> list[ChatExample]:
    """So many examples, evenly over the labels as far as they have them; by the hash of their questions."""
    by_label: dict[str, list[ChatExample]] = defaultdict(list)
    for example in sorted(examples, key=lambda item: (hash_share(item.question), item.label, item.place)):
        by_label[example.label].append(example)
    order = [by_label[label] for label in spread(sorted(by_label), count)]
    selected = [
        listed[(turn + number) % len(listed)]  # labels that share their questions begin with different ones
        for turn in range(max(map(len, order), default=0))
        for number, listed in enumerate(order)
        if turn < len(listed)
    ]
    return selected[:count]
