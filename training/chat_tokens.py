"""Conversations as token ids, written as the tokenizer's chat template writes them, with the assistant's tokens marked.

    encoder = ChatEncoder.load(Path("tokenizer"))
    encoder.encode([messages])[0]          # ids (T,), marked (T,): what the assistant says and the <|im_end|> after it

On text without markup the ids and marks are those of `apply_chat_template(..., return_assistant_tokens_mask=True)`. Two things differ on
purpose. Text that spells a special token stays text. And an answer is tokenised by itself: the model begins it after the ids of a
prompt, so a newline in front of it must not join the newline that ends the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64
from numpy import ndarray as Array
from tokenizers import Tokenizer

from personaxis.persona.errors import KnownError
from personaxis.persona.rollouts import Message
from personaxis.training.conversations import Conversation, Faults
from personaxis.training.tokenizer import BOS, END, PAD, START, TEMPLATE, batches, encode, load_tokenizer

BATCH = 256  # conversations encoded at once, over all cores


@dataclass(frozen=True)
class ChatEncoder:
    """A tokenizer of `personaxis train tokenizer`, for conversations."""

    tokenizer: Tokenizer

    @staticmethod
    def load(folder: Path) -> "ChatEncoder":
        """Raises `KnownError` for a folder without such a tokenizer, or with another chat template."""
        tokenizer = load_tokenizer(folder)
        missing = [mark for mark in (START, END, PAD) if tokenizer.token_to_id(mark) is None]
        path = folder / "chat_template.jinja"
        if missing or not path.is_file() or path.read_text(encoding="utf-8") != TEMPLATE:
            raise KnownError(
                f"{folder} has {f'no token {missing[0]}' if missing else 'another chat template'}; conversations are "
                "written as the template of `personaxis train tokenizer` writes them, so only its tokenizers can be used"
            )
        return ChatEncoder(tokenizer)

    @cached_property
    def marks(self) -> dict[str, int]:
        """Ids of the special tokens."""
        return {
            mark: int(self.tokenizer.token_to_id(mark) or 0) for mark in (BOS, START, END, PAD)
        }  # `load` has seen them

    @cached_property
    def _opening(self) -> list[int]:
        return encode(self.tokenizer, ["assistant\n"])[0]

    @cached_property
    def _newline(self) -> list[int]:
        return encode(self.tokenizer, ["\n"])[0]

    def encode(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], list[bool]]]:
        """Ids of whole conversations and which of them are the assistant's."""
        spoken = [message for messages in conversations for message in messages]
        texts = iter(encode(self.tokenizer, [_text(message) for message in spoken]))
        return [self._joined(messages, [next(texts) for _ in messages]) for messages in conversations]

    def _joined(self, messages: Sequence[Message], texts: Sequence[list[int]]) -> tuple[list[int], list[bool]]:
        ids, marked = [self.marks[BOS]], [False]
        for message, text in zip(messages, texts, strict=True):
            answers = message["role"] == "assistant"
            front = [self.marks[START], *(self._opening if answers else ())]
            ids += [*front, *text, self.marks[END], *self._newline]
            marked += [False] * len(front) + [answers] * (len(text) + 1) + [False] * len(self._newline)
        return ids, marked

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """What the model reads before it answers."""
        return [*self.encode([messages])[0][0], self.marks[START], *self._opening]


def _text(message: Message) -> str:
    return message["content"] if message["role"] == "assistant" else f"{message['role']}\n{message['content']}"


@dataclass(frozen=True)
class Encoded:
    """Conversations one after the other, N of them. Each ends with its last marked token: what follows teaches nothing."""

    ids: Int32[Array, "T"]
    marked: Bool[Array, "T"]
    ends: Int64[Array, "N"]

    def __len__(self) -> int:
        return len(self.ends)

    @cached_property
    def starts(self) -> Int64[Array, "N"]:
        """Where each begins."""
        return np.concatenate([np.zeros(1, np.int64), self.ends])[: len(self.ends)]

    @cached_property
    def lengths(self) -> Int64[Array, "N"]:
        """Inputs of each: all tokens but the last, which is only a target."""
        return self.ends - self.starts - 1

    @cached_property
    def counted(self) -> Int64[Array, "N"]:
        """Targets of each."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.marked, dtype=np.int64)])
        return before[self.ends] - before[self.starts]

    def one(self, number: int) -> tuple[Int64[Array, "L"], Int64[Array, "L"]]:
        """Inputs and targets of a conversation, -100 where the assistant does not speak next."""
        part = slice(self.starts[number], self.ends[number])
        ids, marked = self.ids[part].astype(np.int64), self.marked[part]
        return ids[:-1], np.where(marked[1:], ids[1:], -100)


def encoded(
    conversations: Sequence[Conversation], encoder: ChatEncoder, context: int, faults: Faults
) -> tuple[Encoded, list[Conversation]]:
    """Tokenise; the conversations that fit into `context` tokens, and which they are. Longer ones go into `faults`."""
    ids: list[Array] = []
    marked: list[Array] = []
    kept = []
    for batch in batches(conversations, BATCH):
        for one, (tokens, marks) in zip(batch, encoder.encode([one.messages for one in batch]), strict=True):
            last = len(marks) - 1 - marks[::-1].index(True)
            if last > context:
                faults.add(f"longer than the context of {context:,} tokens", one.where)
                continue
            kept.append(one)
            ids.append(np.array(tokens[: last + 1], np.int32))
            marked.append(np.array(marks[: last + 1], bool))
    ends = np.cumsum([len(part) for part in ids], dtype=np.int64)
    nothing = [np.empty(0, np.int32)], [np.empty(0, bool)]
    return Encoded(np.concatenate(ids or nothing[0]), np.concatenate(marked or nothing[1]), ends), kept
