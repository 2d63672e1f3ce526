"""OpenAI's answer objects and stream lines, with the extra `persona` object."""

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from personatlas.persona.errors import UserError
from personatlas.steering.serve.answer_stream import UNFINISHED, EngineFailure, StreamedAnswer

DONE = b"data: [DONE]\n\n"


def line(content: dict[str, Any]) -> bytes:
    """A data line of a stream. What is half a character is written as an escape, so that the line is always valid UTF-8."""
    return b"data: " + json.dumps(content, allow_nan=False).encode() + b"\n\n"


def error_body(
    message: str, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's error object."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def broken(choice: StreamedAnswer) -> bytes:
    """The line that ends a stream whose answer ended in an error."""
    try:
        choice.require_whole()
    except UserError as error:
        return line(error_body(str(error), "server_error"))
    except EngineFailure as error:
        return line(error_body(f"the engine failed: {error}", "server_error"))
    raise AssertionError("there is no error to tell of")


class ResponseEnvelope:
    """What all objects of one answer have in common: id, time, model."""

    def __init__(self, prefix: str, kind: str, model: str, fingerprint: str) -> None:
        self.told = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def of(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """An object with these choices."""
        return {**self.told, "choices": choices, **more}


def usage(choices: Sequence[StreamedAnswer], prompts: Sequence[int]) -> dict[str, Any]:
    """Tokens read and written. `prompts` are the lengths of the different prompts: n answers to one prompt read it once."""
    written = sum(len(choice.ids) for choice in choices)
    kept = max((choice.read.kept for choice in choices if choice.read is not None), default=0)
    return {
        "prompt_tokens": sum(prompts),
        "completion_tokens": written,
        "total_tokens": sum(prompts) + written,
        "prompt_tokens_details": {"cached_tokens": kept},
    }


def merged(personas: list[dict[str, Any]]) -> dict[str, Any]:
    """The `persona` object of one answer, or of several: the first one's, and all of them under `choices`."""
    return personas[0] if len(personas) == 1 else {**personas[0], "choices": personas}


def chat_likely(choice: StreamedAnswer, first: int, last: int) -> dict[str, Any] | None:
    """Log-probabilities of answer tokens [first, last) as chat completions tell them; None where none were asked for."""
    if choice.ticket.ask.logprobs is None:
        return None
    content = []
    for at in range(first, min(last, len(choice.likely))):
        own, best = choice.likely[at]
        top = [_token(choice, id, value) for id, value in best.items()]
        content.append({**_token(choice, choice.ids[at], own), "top_logprobs": top})
    return {"content": content, "refusal": None}


def text_likely(
    tokenizer: Any,
    ids: Sequence[int],
    likely: Sequence[tuple[float | None, dict[int, float]]],
    offset: int = 0,
) -> dict[str, Any]:
    """Log-probabilities as completions tell them."""
    tokens = [tokenizer.decode([id]) for id in ids]
    offsets, at = [], offset
    for token in tokens:
        offsets.append(at)
        at += len(token)
    return {
        "tokens": tokens,
        "token_logprobs": [own for own, _ in likely],
        "top_logprobs": [_by_text(tokenizer, best) if own is not None else None for own, best in likely],
        "text_offset": offsets,
    }


def _by_text(tokenizer: Any, best: dict[int, float]) -> dict[str, float]:
    """The likeliest tokens by their texts; of several with one text (parts of characters are all "\ufffd") the likeliest."""
    found: dict[str, float] = {}
    for id, value in best.items():
        found.setdefault(tokenizer.decode([id]), value)
    return found


def _token(choice: StreamedAnswer, id: int, value: float) -> dict[str, Any]:
    text = choice.spoken.tokenizer.decode([id])
    whole = UNFINISHED not in text  # of part of a character the bytes are not known
    return {
        "token": text,
        "logprob": value,
        "bytes": list(text.encode("utf-8", "surrogatepass")) if whole else None,
    }
