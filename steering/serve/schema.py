"""OpenAI's requests with the extra `persona` object, strictly typed; unknown fields are accepted.

Field names and limits are those of OpenAI's API reference. What this engine cannot do (tools, images, JSON
schemas, penalties) is refused where a request asks for it, not ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from personatlas.steering.serve.options import ArmMode

MAX_STOPS, MAX_CHOICES, MAX_LOGPROBS = 16, 16, 20
MAX_ANSWERS = 512  # prompts times answers of one request
MAX_STOP_LENGTH = 200  # characters
SEEDS = 2**62

Finite = Annotated[float, Field(allow_inf_nan=False)]
Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
FITTING = -1  # as `max_tokens`: as long an answer as fits


def _refuse(value: object) -> object:
    if any(value.values()) if isinstance(value, dict) else value:
        raise ValueError("not supported; leave it out")
    return value


Refused = AfterValidator(_refuse)
Count = Literal[-1] | Annotated[int, Field(ge=1, le=2**31)]


class TextPart(BaseModel):
    """A part of a message; only text is supported."""

    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; the role `developer` is read as `system`."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None

    @property
    def plain(self) -> dict[str, str]:
        """Role and text."""
        role = "system" if self.role == "developer" else self.role
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content or [])
        return {"role": role, "content": text}


class CapByLevel(BaseModel):
    """A cap whose floor is a quantile of a population's projections: level p50 at layers "18-23"."""

    model_config = ConfigDict(strict=True, extra="forbid")
    level: Annotated[str, Field(pattern=r"^p\d{1,3}(\.\d{1,6})?$")]
    layers: Annotated[str, Field(max_length=200)]
    population: Literal["default", "roles"] = "default"


class CapByName(BaseModel):
    """A loaded cap, its floors moved by `shift` interquartile ranges of the default role's answers."""

    model_config = ConfigDict(strict=True, extra="forbid")
    name: Annotated[str, Field(max_length=200)]
    shift: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 0.0


class PersonaRequest(BaseModel):
    """The `persona` object of a request: what acts (null: nothing, absent: the server's default) and when.

    `arm` is any arm, as `--arm` takes it; `cap` a cap alone.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    cap: Annotated[str, Field(max_length=200)] | CapByLevel | CapByName | None = None
    arm: Annotated[str, Field(max_length=200)] | None = None
    mode: ArmMode | None = None
    per_token: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "PersonaRequest":
        if {"arm", "cap"} <= self.model_fields_set:
            raise ValueError("arm and cap say the same: leave one out")
        return self


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="allow")
    include_usage: bool | None = None


class SamplingRequest(BaseModel):
    """What both kinds of requests have in common. null means absent, as OpenAI's clients write it."""

    model_config = ConfigDict(strict=True, extra="allow")
    model: Annotated[str, Field(max_length=500)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    max_tokens: Count | None = None
    presence_penalty: Annotated[Finite | None, Refused] = None
    frequency_penalty: Annotated[Finite | None, Refused] = None
    logit_bias: Annotated[dict[str, Finite] | None, Refused] = None
    persona: PersonaRequest | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _no_empty_stop(cls, value: Any) -> Any:
        if isinstance(value, list):  # clients send "" for none
            return [stop for stop in value if stop != ""] or None
        return value if value != "" else None

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def choices(self) -> int:
        """Number of answers to each prompt."""
        return self.n or 1

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def per_token(self) -> bool:
        """Whether the projection of every token is returned."""
        return self.persona is not None and bool(self.persona.per_token)

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return, None for no log-probabilities."""
        return None


class ChatRequest(SamplingRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=10000)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Any] | None, Refused] = None
    tool_choice: Annotated[Any, Refused] = None
    functions: Annotated[list[Any] | None, Refused] = None
    response_format: Annotated[dict[str, Any] | None, Refused] = None

    @field_validator("tool_choice", "response_format", mode="before")
    @classmethod
    def _nothing_asked(cls, value: Any) -> Any:
        return None if value in ("none", "auto", {"type": "text"}, {}) else value

    @property
    def max_new_tokens(self) -> int | None:
        """Longest answer in tokens, -1 for what fits, None for the server's default."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return, None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1, max_length=10**6)]


class CompletionRequest(SamplingRequest):
    """POST /v1/completions. `max_tokens` 0 with `echo` and `logprobs` scores the prompt."""

    prompt: str | Ids | Annotated[list[str | Ids], Field(min_length=1, max_length=256)]
    max_tokens: Annotated[int, Field(ge=FITTING, le=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: Annotated[str | None, Refused] = None
    best_of: int | None = None

    @model_validator(mode="after")
    def _possible(self) -> "CompletionRequest":
        if self.stream and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs does not stream; leave stream out")
        if self.best_of is not None and self.best_of != self.choices:
            raise ValueError("best_of is not supported; leave it out")
        if len(self.prompts) * self.choices > MAX_ANSWERS:
            raise ValueError(f"prompts times n are {len(self.prompts) * self.choices}, at most {MAX_ANSWERS}")
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """Longest answer in tokens, -1 for what fits; OpenAI's default is 16."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def n_logprobs(self) -> int | None:
        """How many of the likeliest tokens to return, None for no log-probabilities."""
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each text or token ids."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """The body of every refused request."""

    error: ErrorBody
