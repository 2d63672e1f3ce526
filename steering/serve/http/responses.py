"""OpenAI's response objects and stream lines, with the extra `persona` object."""

import json
import secrets
import time
from codecs import getincrementaldecoder
from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

from personatlas.persona.errors import UserError
from personatlas.persona.models.detokenizer import token_bytes
from personatlas.persona.records import JsonObject
from personatlas.steering.serve.answer_stream import StreamedAnswer
from personatlas.steering.serve.engine.batch import TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DONE = b"data: [DONE]\n\n"


def stream_line(content: JsonObject) -> bytes:
    """A data line of a stream, in ASCII: even half a character is then valid UTF-8."""
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"


def error_object(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> JsonObject:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_line(answer: StreamedAnswer) -> bytes:
    """The last line of a stream whose answer ended in an error."""
    is_known = isinstance(answer.failure, UserError)
    message = str(answer.failure) if is_known else f"the engine failed: {answer.failure}"
    return stream_line(error_object(message, "server_error"))


def response_fields(prefix: str, kind: str, model: str, fingerprint: str) -> JsonObject:
    """The fields that all objects of one response share."""
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": fingerprint,
    }


def usage_object(answers: Sequence[StreamedAnswer], prompt_lengths: Sequence[int]) -> JsonObject:
    """Tokens read and written. Each prompt counts once, however many answers it has."""
    read, written = sum(prompt_lengths), sum(len(answer.ids) for answer in answers)
    cached = max((answer.prefill.cached for answer in answers if answer.prefill is not None), default=0)
    return {
        "prompt_tokens": read,
        "completion_tokens": written,
        "total_tokens": read + written,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def persona_object(personas: list[JsonObject]) -> JsonObject:
    """The `persona` object of a response: that of its first answer, with `choices` where it has several."""
    return personas[0] if len(personas) == 1 else {**personas[0], "choices": personas}


def chat_logprobs(answer: StreamedAnswer, start: int, stop: int) -> JsonObject | None:
    """Log-probabilities of answer tokens [start, stop) as in chat completions, if they were asked for."""
    if answer.handle.request.logprobs is None:
        return None
    tokenizer = answer.detokenizer.tokenizer

    def entry(token: int, value: float | None, *, first: bool) -> JsonObject:
        own = token_bytes(tokenizer, token, first=first)
        return {"token": _token_name(own), "logprob": value, "bytes": list(own)}

    content = []
    for i in range(start, min(stop, len(answer.logprobs))):
        own, likeliest = answer.logprobs[i]
        top = [entry(token, value, first=i == 0) for token, value in likeliest.items()]
        content.append({**entry(answer.ids[i], own, first=i == 0), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_logprobs(
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    logprobs: Sequence[TokenLogprobs],
    *,
    offset: int = 0,
    begins: bool = False,
) -> JsonObject:
    """Log-probabilities as in text completions, of tokens at `offset`; `begins`: a text begins with them."""
    own_bytes = [token_bytes(tokenizer, token, first=begins and i == 0) for i, token in enumerate(ids)]
    top: list[dict[str, float] | None] = []
    for i, (own, likeliest) in enumerate(logprobs):
        by_name: dict[str, float] = {}
        for token, value in likeliest.items():
            # of several with one name the likeliest, which comes first
            by_name.setdefault(_token_name(token_bytes(tokenizer, token, first=begins and i == 0)), value)
        top.append(by_name if own is not None else None)
    decoder = getincrementaldecoder("utf-8")("replace")
    lengths = [len(decoder.decode(own)) for own in own_bytes]
    return {
        "tokens": list(map(_token_name, own_bytes)),
        "token_logprobs": [own for own, _ in logprobs],
        "top_logprobs": top,
        "text_offset": [*accumulate(lengths, initial=offset)][:-1],
    }


def _token_name(own: bytes) -> str:
    """A token's text; bytes that are no whole character as OpenAI writes them: \\xe4\\xbd."""
    return own.decode("utf-8", "backslashreplace")
