"""A terminal conversation as a file: OpenAI's form, with how every answer stood under "personatlas".

    save_chat(Path("chat.json"), chat)         # `personatlas trace` reads it, and so does the page of `personatlas serve`
    told = load_told(Path("chat.json"))        # any conversation that `trace` reads: its answers are read anew

Of a loaded file only roles and texts are taken: how its answers stand is measured again, by the model that is loaded.
"""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import require_writable, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.formats import read_conversations
from personatlas.steering.serve.terminal.session import ChatAnswer, ChatExchange, ChatSession, Transcript

FORMAT = 1


def save_chat(path: Path, chat: ChatSession, *, over: bool = False) -> None:
    """Write a conversation. Raises `UserError` for an empty one and, unless `over`, for a file that is there."""
    if not chat.told.exchanges:
        raise UserError("nothing was said yet, so there is nothing to save")
    if path.exists() and not over:
        raise UserError(f"{path} exists; /save! {path} writes over it")
    require_writable(path, "/save")
    write_json(path, {"messages": chat.told.messages, "personatlas": _standing(chat)})


def load_told(path: Path) -> Transcript:
    """Read the one conversation of a file. Raises `UserError` for several, or one that this chat cannot go on with."""
    found = read_conversations(path)
    if len(found) > 1:
        raise UserError(
            f"{path} holds {len(found)} conversations; a chat goes on with one: take it out into a file"
        )
    messages = list(found[0].messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    exchanges: list[ChatExchange] = []
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "system":
            raise UserError(
                f"{path} has a system message after the beginning, which a chat cannot go on with"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{path} holds half a character (a lone surrogate) in a message of the {role}"
            ) from None
        if role == "user":
            exchanges.append(ChatExchange(text, None))
        elif exchanges and exchanges[-1].answer is None:
            exchanges[-1] = ChatExchange(exchanges[-1].user, ChatAnswer(text))
        else:
            exchanges.append(ChatExchange(None, ChatAnswer(text)))
    return Transcript(system, tuple(exchanges))


def _standing(chat: ChatSession) -> dict[str, Any]:
    axis, model = chat.host.held.axis, chat.host.held.model.describe()
    return {
        "format": FORMAT,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model["id"],
        "fingerprint": model.get("fingerprint"),
        "layer": axis.layer,
        "poles": list(axis.poles),
        "baseline": chat.host.standing.describe()["baseline"],
        "compared": False,
        "system": chat.told.system,
        "turns": [_turn(one) for one in chat.told.exchanges],
    }


def _turn(one: ChatExchange) -> dict[str, Any]:
    answers = [] if one.answer is None else [_answer(one.answer)]
    return {"user": one.user, "kept": None, "run": 0, "answers": answers}


def _answer(answer: ChatAnswer) -> dict[str, Any]:
    names = (
        "cap",
        "mode",
        "acted",
        "seed",
        "projection",
        "z",
        "floor",
        "fired",
        "alarm",
        "raised",
        "drift",
        "ended",
    )
    told = {name: getattr(answer, name) for name in names}
    return {"content": answer.text, **told, "problem": None, "per_token": list(answer.tokens)}
