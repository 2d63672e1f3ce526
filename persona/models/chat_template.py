"""Messages to token ids, through the chat template that came with the tokenizer.

    format = chat_format(model.tokenizer, model.hf.generation_config.eos_token_id)
    format.prompt_ids([{"role": "user", "content": "Who are you?"}])
    format.system, format.injected             # "native", "You are a helpful AI assistant named SmolLM, ..."

What a template does with a system message is found out by probing it, never by the model's name: private-use
characters stand for the contents, and what comes back shows whether the system message survives and what the
template adds unasked. Contents are strings, or typed parts (`[{"type": "text", "text": ...}]`) for the roles
whose strings the template does not read. That every role's text survives is proved with long texts when the
format is made, and for the very text of each message whenever a conversation is rendered.

Text is rendered first and tokenised once, without special tokens (the template writes its own BOS), so that
the ids, the text and the character offsets of `token_spans.py` always belong together. What a message says is
text: `control_tokens.py` keeps the tokens that steer a conversation apart from their spelling in a content.
Thinking is off wherever the template knows the switch `enable_thinking`, and `strftime_now` gives one date
for all renderings.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cache, cached_property, lru_cache
from itertools import combinations
from os.path import commonprefix
from typing import Any, Literal

from personatlas.persona.errors import UserError
from personatlas.persona.models.content_regions import Region, SpanError, content_regions, template_marks
from personatlas.persona.models.control_tokens import TextEncoder, Tokenized
from personatlas.persona.models.template_process import TemplateRefusal, render_template
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject

ROLES = ("system", "user", "assistant", "tool")

Messages = Sequence[Mapping[str, str]]

# Private-use characters: no template, no corpus and no user has them, and nothing trims or splits them.
SYSTEM, USER, ANSWER, AGAIN = "\U0010f000", "\U0010f001", "\U0010f002", "\U0010f003"


# What a template might change: case, blanks, marks, braces, other scripts, and length.
PROBE = (
    """{0} Says: MIXED case, two  blanks,\n\n\ta line & <b>"marks"</b>, """
    """it's {{{{ x }}}}, {{% if %}}, C:\\n, é 世界 😀, """ + " ".join(f"word {i}" for i in range(500))
)


@cache
def process_date() -> datetime:
    """When this process first needed a date, to the second: its templates are given no other one."""
    return datetime.now().replace(microsecond=0)


@dataclass(frozen=True)
class ChatFormat:
    """How one tokenizer writes conversations down. Build it with `chat_format`.

    `system` is "merged" when the template refuses a system message or drops it silently; its text then goes
    before the first user message, with a blank line between. `injected` is system text that the template adds
    by itself when no system message is given. `end_ids` are the tokens that end an answer. `parts` are the
    roles whose contents the template reads as typed parts only. `now` is the local time that a template is
    given.
    """

    tokenizer: Any
    system: Literal["native", "merged"]
    injected: str | None
    end_ids: frozenset[int]
    parts: frozenset[str] = frozenset()
    now: datetime = field(default_factory=process_date)

    @cached_property
    def template(self) -> str:
        """The Jinja source, without a byte order mark."""
        return self.tokenizer.get_chat_template().removeprefix("\ufeff")

    def describe_date(self) -> JsonObject:
        """What a run records of the date in its prompts: nothing where the template does not ask for one."""
        return {"template_date": self.now.isoformat()} if "strftime_now" in self.template else {}

    @cached_property
    def encoder(self) -> TextEncoder:
        """Text to ids; what contents spell as control tokens is text."""
        return TextEncoder(self.tokenizer, self.template, self.end_ids)

    @cached_property
    def prompt_is_prefix(self) -> bool:
        """Whether a one-turn chat with its answer starts with the very prompt that asked for the answer.

        False for templates whose prompt opens a think block that a finished answer does not have
        (DeepSeek-R1): the spans of a rendered conversation are then not those of a prompt and its generated
        answer. This is about text; the ids follow it unless the tokenizer joins the end of the prompt to the
        answer, as it may do with newlines.
        """
        question = {"role": "user", "content": USER}
        whole = self.write([question, {"role": "assistant", "content": ANSWER}], generation=False)
        prompt = self.write([question], generation=True)
        return whole.startswith(
            (prompt + ANSWER, prompt + " " + ANSWER)
        )  # a blank goes into the answer's first token

    def render(self, messages: Messages, *, generation: bool) -> str:
        """The conversation as text; with `generation`, also the opening of the answer to come.

        Raises `UserError` for messages that are malformed, that the template refuses, or whose text it
        changes or leaves out. Blanks and line breaks are the template's to change, and so is the thinking
        before an answer.
        """
        text = self.write(messages, generation=generation)
        _require_texts(messages, text, self.template)
        return text

    def write(self, messages: Messages, *, generation: bool) -> str:
        """What the template makes of the messages, without looking for their texts in it."""
        plain = _checked(messages)
        plain = _merge(plain) if self.system == "merged" else plain
        typed = [
            one | {"content": [{"type": "text", "text": one["content"]}]}
            if one["role"] in self.parts
            else one
            for one in plain
        ]
        variables = {
            "tools": None,
            "documents": None,
            **self.tokenizer.special_tokens_map,
            "messages": typed,
            "add_generation_prompt": generation,
            "enable_thinking": False,
        }
        try:
            return render_template(self.template, variables, self.now)
        except TemplateRefusal as error:
            roles = ", ".join(message["role"] for message in plain)
            raise TemplateRefusal(f"the chat template refuses the messages ({roles}): {error}") from None

    def prompt_text(self, messages: Messages) -> str:
        """What the model reads before it answers, as text. Raises `UserError` like `render`."""
        return self.render(messages, generation=True)

    def prompt_ids(self, messages: Messages, opening: str = "") -> list[int]:
        """What the model reads before it answers: the ids of `prompt_text`, with at most the template's own
        BOS.

        `opening` is the beginning of the answer. Control tokens that a message spells are text in them.
        Raises `UserError` where that cannot be had.
        """
        text = self.prompt_text(messages) + opening
        ids = self.encoder.ids(text)
        contents = [message["content"] for message in messages]
        shape = tuple((one["role"], bool(one["content"].strip())) for one in messages)
        if self.encoder.controls(ids) == self._markup(shape) and not any(map(self.encoder.spells, contents)):
            return ids
        try:
            return list(self.tokenize(messages, generation=True, opening=opening)[0].ids)
        except SpanError as error:
            for number, content in enumerate([*contents, opening]):
                if self.encoder.spells_control(content):
                    raise SpanError(
                        f"message {number} spells a control token, and its place is not known: {error}"
                    ) from None
            return ids

    def tokenize(
        self, messages: Messages, *, generation: bool, opening: str = ""
    ) -> tuple[Tokenized, dict[int, Region]]:
        """Ids of the conversation, and where in its text the content of each message stands.

        Raises `SpanError` where that cannot be told, and `UserError` like `render`.
        """

        def write(contents: Sequence[str]) -> str:
            replaced = [
                {"role": one["role"], "content": content}
                for one, content in zip(messages, contents, strict=True)
            ]
            return self.write(replaced, generation=generation)

        regions = content_regions(write, [message["content"] for message in messages], self.template)
        text = self.render(messages, generation=generation) + opening
        owned = [(region, messages[number]["role"]) for number, region in regions.items()]
        owned.append(((len(text) - len(opening), len(text)), "assistant"))
        return self.encoder.encode(text, owned), regions

    @cached_property
    def _markup(self) -> Callable[[tuple[tuple[str, bool], ...]], tuple[int, ...] | None]:
        """The control tokens that the template itself writes around contents of these roles, blank or not."""

        @lru_cache(1024)
        def markup(shape: tuple[tuple[str, bool], ...]) -> tuple[int, ...] | None:
            messages = [{"role": role, "content": USER if filled else ""} for role, filled in shape]
            try:
                return self.encoder.controls(self.encoder.ids(self.write(messages, generation=True)))
            except TemplateRefusal:  # it asks for something in a content
                return None

        return markup


def chat_format(
    tokenizer: Any, generation_eos: int | Sequence[int] | None = None, now: datetime | None = None
) -> ChatFormat:
    """Probe a tokenizer's chat template. `generation_eos` is `model.generation_config.eos_token_id`.

    Raises `UserError` for a tokenizer without a template, or with one that refuses a single user message,
    changes texts or leaves them out.
    """
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        named = ", ".join(tokenizer.chat_template or ())
        reason = "several chat templates and no default" if named else "no chat template"
        names = f" (it has {named})" if named else ""
        raise UserError(f"the tokenizer has {reason}; pass --chat-template FILE.jinja{names}") from None
    if not isinstance(template, str):
        kind = type(template).__name__
        raise UserError(
            f"the tokenizer's chat template is a {kind}, no text; pass --chat-template FILE.jinja"
        )
    bare = ChatFormat(tokenizer, "native", None, frozenset(), now=now or process_date())
    bare.write([{"role": "user", "content": USER}], generation=True)
    bare = replace(bare, parts=_typed_roles(bare))
    chosen = replace(bare, system="native" if _keeps_system(bare) else "merged")
    format = replace(chosen, injected=_injected(chosen), end_ids=_end_ids(chosen, generation_eos))
    _require_survival(format)
    return format


def _checked(messages: Messages) -> list[dict[str, str]]:
    """Plain copies. Anything but a known role with text is refused: a template would drop it or crash on
    it."""
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


def _require_texts(messages: Messages, text: str, template: str) -> None:
    """Raises `UserError` unless the text of each message stands in the rendering, in order but for system
    texts.

    Blanks do not count. Templates leave the thinking out of answers, up to a mark of theirs, and write what
    tools say as JSON.
    """
    squeezed, start = "".join(text.split()), 0
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        forms = [content]
        if role == "assistant":
            forms += [content.rpartition(mark)[2] for mark in template_marks(template) if mark in content]
        elif role == "tool":
            forms.append(json.dumps(content)[1:-1])
            forms.append(json.dumps(content, ensure_ascii=False)[1:-1])
        for form in forms:
            wanted = "".join(form.split())
            at = squeezed.find(wanted, 0 if role == "system" else start)
            if at >= 0:
                start = start if role == "system" else at + len(wanted)
                break
        else:
            raise UserError(
                f"the chat template changes or leaves out the text of message {number} ({role}): "
                f"{content.strip()[:40]!r}; pass --chat-template FILE.jinja"
            )


def _require_survival(format: ChatFormat) -> None:
    """Raises `UserError` for a template that changes texts; says so where it changes blanks within them."""

    def messages(*roles: str) -> list[dict[str, str]]:
        return [{"role": role, "content": PROBE.format(f"{role} {i}")} for i, role in enumerate(roles)]

    changes_blanks = False
    for system in ((), ("system",)):
        for roles in (("user",), ("user", "assistant", "user"), ("user", "assistant")):
            chat = messages(*system, *roles)
            try:
                text = format.render(chat, generation=roles[-1] == "user")
            except TemplateRefusal:  # such conversations get its own reason when they come
                continue
            changes_blanks |= any(message["content"].strip() not in text for message in chat)
    if changes_blanks:
        say("the chat template changes blanks and line breaks in messages: they are read as it writes them")


def _try(format: ChatFormat, *contents: str) -> str | None:
    """A probe conversation written, None if refused. It asks for an answer when it does not end in one."""
    roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant", AGAIN: "user"}
    try:
        return format.write(
            [{"role": roles[c], "content": c} for c in contents], generation=contents[-1] != ANSWER
        )
    except TemplateRefusal:
        return None


def _typed_roles(bare: ChatFormat) -> frozenset[str]:
    """The fewest roles whose contents must be typed parts for the template to write them."""
    roles = {SYSTEM: "system", USER: "user", ANSWER: "assistant"}
    chats = [
        chat for chat in ((USER,), (USER, ANSWER, AGAIN), (SYSTEM, USER)) if _try(bare, *chat) is not None
    ]

    def written(parts: frozenset[str]) -> int:
        texts = [(chat, _try(replace(bare, parts=parts), *chat) or "") for chat in chats]
        return sum(content in text for chat, text in texts for content in chat)

    choices = [frozenset(some) for n in range(4) for some in combinations(roles.values(), n)]
    if written(choices[0]) == sum(map(len, chats)):
        return choices[0]
    return max(choices, key=written)  # the first, and so the fewest, of those that write most


def _keeps_system(bare: ChatFormat) -> bool:
    """Whether a system message survives in a prompt, in a finished chat and in a second turn.

    All three, because Mistral v0.3's template shows it only while a user message is the last one: merging
    keeps it in the same place from turn to turn.
    """
    chats = [
        chat for chat in ((USER,), (USER, ANSWER), (USER, ANSWER, AGAIN)) if _try(bare, *chat) is not None
    ]
    return all(SYSTEM in (_try(bare, SYSTEM, *chat) or "") for chat in chats)


def _injected(format: ChatFormat) -> str | None:
    """System text that the template writes unasked before the first user message."""
    opening = format.write([{"role": "user", "content": USER}], generation=True).partition(USER)[0]
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
    """Visible added tokens. Not only those flagged special: some fine-tunes forget the flag on their end of
    turn."""
    return {
        token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.content.strip()
    }
