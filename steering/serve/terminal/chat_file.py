"""A terminal conversation as a file: OpenAI's form, with measurements under "personatlas".

    save_chat(Path("chat.json"), session)          # `personatlas trace` and the page of `serve` read it
    transcript = load_chat(Path("chat.json"))      # any conversation that `trace` reads

Only roles and texts of a loaded file are used: its answers are measured again, by the model that is loaded.
"""

from datetime import UTC, datetime
from pathlib import Path

from personatlas.persona.artifacts import require_writable, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.formats import read_conversations
from personatlas.persona.records import JsonObject, json_value
from personatlas.steering.serve.options import ALWAYS
from personatlas.steering.serve.terminal.session import ChatAnswer, ChatExchange, ChatSession, Transcript

FORMAT = 1


def save_chat(path: Path, session: ChatSession, *, overwrite: bool = False) -> None:
    """Writes a conversation. Raises `UserError` for an empty one, or a file that exists."""
    transcript, service = session.transcript, session.service
    if not transcript.exchanges:
        raise UserError("nothing was said yet, so there is nothing to save")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists; /save! {path} writes over it")
    require_writable(path, "/save")
    model = service.model.describe()
    measurements = {
        "format": FORMAT,
        "saved": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model["id"],
        "fingerprint": model.get("fingerprint"),
        "layer": None if service.axis is None else service.axis.layer,
        "poles": [] if service.axis is None else list(service.axis.poles),
        "baseline": None if service.tracker is None else service.tracker.baseline.to_json(),
        "compared": False,
        "system": transcript.system,
        "turns": [
            {
                "user": user,
                "kept": None,
                "run": 0,
                "answers": [] if answer is None else [_answer_json(answer)],
            }
            for user, answer in transcript.exchanges
        ],
    }
    write_json(path, {"messages": transcript.messages, "personatlas": measurements})


def load_chat(path: Path) -> Transcript:
    """Reads the one conversation of a file. Raises `UserError` for one that a chat cannot continue."""
    conversations = read_conversations(path)
    if len(conversations) > 1:
        raise UserError(
            f"{path} holds {len(conversations)} conversations; take the one to continue into a file"
        )
    messages = list(conversations[0].messages)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    exchanges: list[ChatExchange] = []
    for message in messages:
        role, text = message["role"], message["content"]
        if role == "system":
            raise UserError(f"{path} has a system message after the beginning, which a chat cannot continue")
        if role == "user":
            exchanges.append(ChatExchange(text, None))
        else:
            user = exchanges.pop().user if exchanges and exchanges[-1].answer is None else None
            exchanges.append(ChatExchange(user, ChatAnswer(text)))
    return Transcript(system, tuple(exchanges))


def _answer_json(answer: ChatAnswer) -> JsonObject:
    persona = answer.persona
    turn = persona.turn if persona is not None else None
    measured = {name: getattr(persona, name, None) for name in ("projection", "z", "floor", "fired")}
    content: JsonObject = {
        "content": answer.text,
        "cap": answer.arm,
        "mode": persona.mode if persona is not None else ALWAYS,
        "acted": persona is not None and persona.arm is not None,
        "seed": answer.seed,
        **measured,
        "alarm": turn.alarm if turn is not None else None,
        "raised": turn.raised if turn is not None else None,
        "drift": persona.drift if persona is not None else None,
        "ended": answer.ended,
        "problem": None,
        "per_token": (persona.per_token if persona is not None else None) or [],
    }
    return {name: json_value(value) for name, value in content.items()}
