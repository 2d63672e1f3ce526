"""What a tuned model says to held-out questions: samples while it is tuned, and answers to judge its style by at the end.

Replies(run, encoder, conversations).write(model, step)      # {"step": 512, "prompt": ..., "text": ...}, four lines
style_of(data, encoder, {"before": parent, "after": run / "model"}, count=200, seed=0)
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import load_model
from personatlas.persona.progress import say
from personatlas.persona.rollout import seed_of, spread
from personatlas.persona.sampling.sampler import Prompt, Sampler, Sampling
from personatlas.training.chat.conversations import Conversation
from personatlas.training.chat.mixture import ChatData
from personatlas.training.chat.packing import ChatEncoder
from personatlas.training.chat.style import STYLES, Answer, compare, recogniser_of
from personatlas.training.data.corpus import share_of
from personatlas.training.data.tokenizer import END
from personatlas.training.loop.run_log import cut_after
from personatlas.training.loop.samples import LENGTH, PROMPTS, SAMPLES, TEMPERATURE
from personatlas.training.model.gpt import GPT

LONGEST = 192  # tokens of an answer whose style is looked at, and never more than a quarter of the context
CHUNK = 64  # answers that are generated at once


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


def of_every_group(conversations: Sequence[Conversation], count: int, labels: int) -> list[Conversation]:
    """So many conversations, shared out evenly over their groups (sources, held-out roles apart), whatever the groups' sizes.

    They are under at most so many labels, shared out alike, as long as those have enough."""
    by_group: dict[str, list[Conversation]] = defaultdict(list)
    for one in conversations:
        by_group[one.group].append(one)
    groups = [by_group[name] for name in sorted(by_group)]
    known = [sorted({one.label for one in group}) for group in groups]
    shares, found = dealt([len(group) for group in groups], count), []
    for group, names, some, share in zip(
        groups, known, dealt([len(one) for one in known], labels), shares, strict=True
    ):
        first = set(spread(names, some))
        chosen = one_of_each([one for one in group if one.label in first], share)
        found += [
            *chosen,
            *one_of_each([one for one in group if one.label not in first], share - len(chosen)),
        ]
    return found


def dealt(sizes: Sequence[int], total: int) -> list[int]:
    """`total` dealt in turn, one at a time, to those that have room for more."""
    given = [0] * len(sizes)
    while total > 0 and given != list(sizes):
        for place in [place for place, size in enumerate(sizes) if given[place] < size][:total]:
            given[place] += 1
            total -= 1
    return given


def style_of(
    data: ChatData,
    encoder: ChatEncoder,
    models: Mapping[str, Path],
    *,
    count: int,
    seed: int,
    device: str | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The record of `training/style.py` over `count` questions that no conversation in training asks, and every answer.

    They come evenly from all sources and from held-out roles. The classifier learns their styles, from the conversations in training and from what held-out roles say to questions of theirs.
    """
    context = data.source.context
    length = min(LONGEST, context // 4)
    kept = {
        one.where for one in data.held_out.conversations
    }  # what is too long as a whole has been left out of these
    fits = [
        one
        for one in data.sides.unmet
        if one.where in kept and len(encoder.prompt(before_answer(one))) + length <= context
    ]
    chosen = of_every_group(fits, count, STYLES)
    if not chosen:
        say(f"no style to look at: no held-out question leaves {length} tokens of the context for an answer")
        models = {}
    recogniser = recogniser_of([*data.train, *data.sides.of_held_out_roles], [one.label for one in chosen])
    answers = {"teacher": [_answer(one, one.answers[-1], True) for one in chosen]}
    for who, folder in models.items():
        answers[who] = _generated(folder, chosen, encoder, length, seed, device)
    known = frozenset(text.strip() for one in data.train for text in one.answers)
    record = {
        "questions": len(chosen),
        "new_tokens": length,
        "styles": len(recogniser.labels) if recogniser else 0,
        "fitted_texts": recogniser.texts if recogniser else 0,
        "measures": compare(answers, recogniser, known),
    }
    rows = [
        {"where": one.where, "label": one.label, "prompt": before_answer(one)}
        | {who: listed[place].text for who, listed in answers.items()}
        for place, one in enumerate(chosen)
    ]
    return record, rows


def _answer(one: Conversation, text: str, ended: bool) -> Answer:
    return Answer(text, one.label, one.source, one.question, ended, one.apart)


def _generated(
    folder: Path,
    chosen: Sequence[Conversation],
    encoder: ChatEncoder,
    length: int,
    seed: int,
    device: str | None,
) -> list[Answer]:
    """A model's answers, sampled as rollouts are."""
    model = load_model(str(folder), device=device)
    chat = chat_format(model.tokenizer, model.hf.generation_config.eos_token_id)
    sampler = Sampler(model, chat.end_ids, Sampling(max_new_tokens=length))
    found: list[Answer] = []
    for start in range(0, len(chosen), CHUNK):
        group = chosen[start : start + CHUNK]
        prompts = [
            Prompt(tuple(encoder.prompt(before_answer(one))), seed_of(one.where, seed)) for one in group
        ]
        made = {answer.index: answer for answer in sampler.answers(prompts)}
        for place, one in enumerate(group):
            text = encoder.tokenizer.decode(list(made[place].ids))
            found.append(_answer(one, text, made[place].stopped == "end"))
    return found
