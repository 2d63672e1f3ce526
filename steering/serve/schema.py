"""What goes over the wire: OpenAI's requests with the extra `persona` object, strictly typed, unknown fields accepted.

The field names and limits are those of OpenAI's API reference; what this engine cannot do (tools, images, JSON schemas, penalties)
is refused when asked for, not ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MOST_STOPS, MOST_CHOICES, MOST_LIKELY = 16, 16, 20
MOST_ANSWERS = 512
LONGEST_STOP = 200  # characters
SEEDS = 2**62

Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
Count = Annotated[int, Field(ge=1, le=2**31)]


class TextPart(BaseModel):
    """A piece of a message; only text is taken."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. `developer` is `system`."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """Role and text alone."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        return {"role": role, "content": text}


class CapByLevel(BaseModel):
    """A floor at a quantile of a population's projections, at layers in words."""

    model_config = ConfigDict(strict=True, extra="forbid")
    level: Annotated[str, Field(pattern=r"^p\d{1,3}(\.\d{1,6})?$")]
    layers: Annotated[str, Field(max_length=200)]
    population: Literal["default", "roles"] = "default"


class CapByName(BaseModel):
    """A loaded cap, its floors moved by so many interquartile ranges of the default's answers."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(max_length=200)]
    shift: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 0.0


class PersonaRequest(BaseModel):
    """What a request asks of the persona: the cap (null: none; absent: the server's own), when it acts, and what to tell."""

    model_config = ConfigDict(strict=True, extra="forbid")
    cap: Annotated[str, Field(max_length=200)] | CapByLevel | CapByName | None = None
    mode: Literal["always", "adaptive"] | None = None
    per_token: bool | None = None

    @property
    def asked(self) -> Any:
        """The cap as `CapSlots.wanted` takes it."""
        return self.cap.model_dump() if isinstance(self.cap, BaseModel) else self.cap


class StreamOptions(BaseModel):
    """Whether a stream ends with its usage."""

    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What both kinds of request have in common. null is as good as absent, as OpenAI's clients write it."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: Annotated[str, Field(max_length=500)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Count | None = None
    presence_penalty: Finite | None = None
    frequency_penalty: Finite | None = None
    logit_bias: dict[str, Finite] | None = None
    persona: PersonaRequest | None = None

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise ValueError("penalties are not supported; leave it out or give 0")
        return value

    @field_validator("stop", mode="before")
    @classmethod
    def _no_empty_stop(cls, value: Any) -> Any:
        """Clients send "" for none."""
        if isinstance(value, list):
            return [one for one in value if one != ""] or None
        return value if value != "" else None

    @field_validator("logit_bias")
    @classmethod
    def _no_bias(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        if value and any(value.values()):
            raise ValueError("logit_bias is not supported; leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """How many answers."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def per_token(self) -> bool:
        """Whether every token's projection is told."""
        return self.persona is not None and bool(self.persona.per_token)


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _plain_text(self) -> "ChatRequest":
        if self.tools or self.functions or self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tools are not supported; leave them out")
        if self.response_format is not None and self.response_format.get("type", "text") != "text":
            raise ValueError("response_format other than text is not supported; leave it out")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens to tell, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=10**6)]


class CompletionRequest(SamplingRequest):
    """POST /v1/completions. `max_tokens` 0 with `echo` scores the prompt."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    suffix: str | None = None
    best_of: int | None = None

    @field_validator("suffix")
    @classmethod
    def _no_suffix(cls, value: str | None) -> str | None:
        if value:
            raise ValueError("suffix is not supported; leave it out")
        return value

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs does not stream; leave stream out")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of is not supported; leave it out")
        if len(self.prompts) * self.choices > MOST_ANSWERS:
            raise ValueError(f"prompts times n are more than {MOST_ANSWERS}")
        return self

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; OpenAI's default."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens to tell, None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        given: Any = self.prompt
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]
        return list(given)


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """What every refused request gets."""

    error: ErrorBody
