"""Messages to token ids, through the chat template that came with the tokenizer.

    format = chat_format(model.tokenizer, model.hf.generation_config.eos_token_id)
    format.prompt_ids([{"role": "user", "content": "Who are you?"}])
    format.system, format.injected             # "native", "You are a helpful AI assistant named SmolLM, ..."

What a template does with a system message is found out by probing it, never by the model's name: private-use
characters stand for the contents, and what comes back shows whether the system message survives and what the template
adds unasked. Text is rendered first and tokenised once, without special tokens (the template writes its own BOS), so
that the ids, the text and the character offsets of `persona/spans.py` always belong together. Thinking is off wherever
the template knows the switch `enable_thinking`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any, Literal

from personatlas.persona.errors import UserError

ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, str]]

# Private-use characters: no template, no corpus and no user has them, and no trimming or splitting touches them.
SYSTEM, USER, ANSWER, AGAIN = "\U0010f000", "\U0010f001", "\U0010f002", "\U0010f003"


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer writes conversations down. Build it with `chat_format`.

    `system` is "merged" when the template refuses a system message or drops it silently; its text then goes before the
    first user message, with a blank line between. `injected` is system text that the template adds by itself when no
    system message is given. `end_ids` are the tokens that end an answer.
    """

    tokenizer: Any
    system: Literal["native", "merged"]
    injected: str | None
    end_ids: frozenset[int]

    @property
    def template(self) -> str:
        """The Jinja source."""
        return self.tokenizer.get_chat_template()

    @cached_property
    def prompt_is_prefix(self) -> bool:
        """Whether a one-turn chat with its answer starts with the very prompt that asked for the answer.

        False for templates whose prompt opens a think block that a finished answer does not have (DeepSeek-R1): the
        spans of a rendered conversation are then not those of a prompt and its generated answer. This is about text;
        the ids follow it unless the tokenizer joins the end of the prompt to the answer, as it may do with newlines.
        """
        question = {"role": "user", "content": USER}
        whole = self.render([question, {"role": "assistant", "content": ANSWER}], generation=False)
        prompt = self.render([question], generation=True)
        return whole.startswith(
            (prompt + ANSWER, prompt + " " + ANSWER)
        )  # a blank goes into the answer's first token

    def render(self, messages: Messages, *, generation: bool) -> str:
        """The conversation as text; with `generation`, also the opening of the answer to come.

        Raises `UserError` for messages that are malformed or that the template refuses.
        """
        plain = _checked(messages)
        return _apply(self.tokenizer, _merge(plain) if self.system == "merged" else plain, generation)

    def prompt_text(self, messages: Messages) -> str:
        """What the model reads before it answers, as text. Raises `UserError` like `render`."""
        return self.render(messages, generation=True)

    def prompt_ids(self, messages: Messages) -> list[int]:
        """What the model reads before it answers: the ids of `prompt_text`, with at most the template's own BOS."""
        return list(
            self.tokenizer(self.prompt_text(messages), add_special_tokens=False, verbose=False)["input_ids"]
        )


def chat_format(tokenizer: Any, generation_eos: int | Sequence[int] | None = None) -> ChatFormat:
    """Probe a tokenizer's chat template. `generation_eos` is `model.generation_config.eos_token_id`.

    Raises `UserError` for a tokenizer without a template, or with one that refuses a single user message.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        reason = "several chat templates and no default" if "multiple" in str(error) else "no chat template"
        raise UserError(f"the tokenizer has {reason}; pass --chat-template FILE.jinja") from None
    bare = ChatFormat(tokenizer, "native", None, frozenset())
    bare.render([{"role": "user", "content": USER}], generation=True)
    chosen = ChatFormat(tokenizer, "native" if _keeps_system(bare) else "merged", None, frozenset())
    return ChatFormat(tokenizer, chosen.system, _injected(chosen), _end_ids(chosen, generation_eos))


def _checked(messages: Messages) -> list[dict[str, str]]:
    """Plain copies. Anything but a known role with text is refused: a template would drop it or crash on it."""
    if not messages:
        raise UserError("a conversation without messages; give at least one user message")
    plain = []
    for number, message in enumerate(messages):
        if set(message) != {"role", "content"}:
            raise UserError(
                f"message {number} has the keys {sorted(message)}; it must have role and content, nothing else"
            )
        if not isinstance(message["content"], str):
            raise UserError(
                f"message {number}: its content is a {type(message['content']).__name__}, not a string"
            )
        if message["role"] not in ROLES:
            raise UserError(
                f"message {number} has the role {message['role']!r}; it must be one of {', '.join(ROLES)}"
            )
        try:
            message["content"].encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"message {number} is not valid Unicode text: {error.reason} at {error.start}"
            ) from None
        plain.append({"role": message["role"], "content": message["content"]})
    return plain


def _merge(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The same conversation with its leading system message put before the first user message."""
    system = messages[0] if messages[0]["role"] == "system" else None
    rest = messages[1:] if system else messages
    if any(message["role"] == "system" for message in rest):
        raise UserError(
            "this chat template has no system role, so only the first message may be a system message"
        )
    if system is None or not system["content"]:
        return rest or messages
    first = next((i for i, message in enumerate(rest) if message["role"] == "user"), None)
    if first is None:
        raise UserError(
            "this chat template has no system role, and there is no user message to put the system text before"
        )
    merged = {"role": "user", "content": f"{system['content']}\n\n{rest[first]['content']}"}
    return [*rest[:first], merged, *rest[first + 1 :]]


def _apply(tokenizer: Any, messages: list[dict[str, str]], generation: bool) -> str:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
        )
    except (TemplateError, TypeError) as error:  # contents are checked, so a TypeError is the template's own
        reason = " ".join(str(error).split()) or type(error).__name__
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the chat template refuses the messages ({roles}): {reason}") from None


def _try(format: ChatFormat, *contents: str) -> str | None:
    """A probe conversation rendered, None if refused. It asks for an answer when it does not end in one."""
    roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant", AGAIN: "user"}
    try:
        return format.render(
            [{"role": roles[c], "content": c} for c in contents], generation=contents[-1] != ANSWER
        )
    except UserError:
        return None


def _keeps_system(bare: ChatFormat) -> bool:
    """Whether a system message survives in a prompt, in a finished chat and in a second turn.

    All three, because Mistral v0.3's template shows it only while a user message is the last one: merging keeps it in
    the same place from turn to turn.
    """
    chats = [
        chat for chat in ((USER,), (USER, ANSWER), (USER, ANSWER, AGAIN)) if _try(bare, *chat) is not None
    ]
    return all(SYSTEM in (_try(bare, SYSTEM, *chat) or "") for chat in chats)


def _injected(format: ChatFormat) -> str | None:
    """System text that the template writes unasked before the first user message."""
    opening = format.render([{"role": "user", "content": USER}], generation=True).partition(USER)[0]
    asked = _try(format, SYSTEM, USER) if format.system == "native" else None
    if (
        asked is not None
    ):  # text that a system message would replace stands exactly between the marks around that message
        before, _, after = asked.partition(USER)[0].partition(SYSTEM)
        if len(opening) > len(before + after) and opening.startswith(before) and opening.endswith(after):
            return opening[len(before) : len(opening) - len(after)].strip() or None
    # Text that is there whatever one gives (Llama 3's dates): the opening less the header that every user message has.
    second = (_try(format, USER, ANSWER, AGAIN) or "").partition(ANSWER)[2].partition(AGAIN)[0]
    if not second:
        return None
    for token in sorted(
        _added_tokens(format.tokenizer), key=len, reverse=True
    ):  # first: "<s>" and "</s>" share an end
        opening, second = opening.replace(token, "\n"), second.replace(token, "\n")
    header = commonprefix([opening[::-1], second[::-1]])  # noqa: RUF071 (characters are meant)
    text = opening.removesuffix(header[::-1])
    return text.strip().removeprefix("system").strip() or None


def _end_ids(format: ChatFormat, generation_eos: int | Sequence[int] | None) -> frozenset[int]:
    ids = {generation_eos} if isinstance(generation_eos, int) else set(generation_eos or ())
    if format.tokenizer.eos_token_id is not None:
        ids.add(format.tokenizer.eos_token_id)
    after = (_try(format, USER, ANSWER) or "").partition(ANSWER)[2].lstrip()
    marks = [token for token in _added_tokens(format.tokenizer) if after.startswith(token)]
    if marks:
        ids.add(_added_tokens(format.tokenizer)[max(marks, key=len)])
    return frozenset(ids)


def _added_tokens(tokenizer: Any) -> dict[str, int]:
    """Visible added tokens. Not only those flagged special: some fine-tunes forget the flag on their end of turn."""
    return {
        token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
