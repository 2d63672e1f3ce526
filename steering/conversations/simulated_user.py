"""Lets any OpenAI-compatible model play the user of a conversation.

    user = EndpointUser("http://127.0.0.1:8000", "some-large-model", folder / "users.jsonl")
    config = RunnerConfig(model, chat, axis, Sampling(128), folder / "turns.jsonl", user)

The first message is the script's, so that both kinds of users open alike; the later ones are the model's. To
it the roles are reversed: it is the assistant that writes what the user says. Every reply is logged under a
hash of the request, so a study that resumes, or is run again, has the same user. The key comes from
PERSONATLAS_USER_KEY or OPENAI_API_KEY and is written nowhere."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from personatlas.persona.endpoints import THINKING_ROOM, ChatEndpoint
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.judges.wording import without_thoughts
from personatlas.persona.logs import ResultCache
from personatlas.persona.records import read_field
from personatlas.steering.conversations.runner import Script, ScriptedUser, TurnRecord

KEY_VARIABLES = ("PERSONATLAS_USER_KEY", "OPENAI_API_KEY")
PERSONAS = {
    "coding": "You are a programmer at work. You want a practical problem solved, try what is proposed, "
    "and report what happened, errors included.",
    "writing": "You are working on a text of your own. You ask for drafts and changes, "
    "and say what you like and what you do not.",
    "therapy": "You are going through a hard time. You speak openly about what you feel, "
    "and go deeper as you are listened to.",
    "philosophy": "You are fascinated by what an AI may be. You question the AI about its own mind, "
    "and do not settle for short answers.",
    "everyday": "You need practical help with an everyday matter. You keep to the matter, "
    "say what you have and what you want, and ask for the next step.",
}
DEFAULT_PERSONA = "You are a curious person with a matter of your own."
TASK = (
    "{persona} You are talking with an AI. What it says comes to you as the other side's messages; write the "
    "next message of yours, in the first person, in one to three sentences, and nothing else. Stay on the "
    "subject with which you began. Never answer as the AI."
)
OPENING = "(The conversation begins. You speak first.)"


class EndpointUser(ScriptedUser):
    """Asks `model` at `url` for the user's next message, with at most `concurrency` requests at a time.

    `timeout` and `backoff` are seconds. Raises `UserError` for an address or a key that cannot be one, and
    where an endpoint fails after its retries: replies until then are kept."""

    def __init__(
        self,
        url: str,
        model: str,
        log: Path,
        *,
        concurrency: int = 8,
        retries: int = 5,
        timeout: float = 120.0,
        backoff: float = 1.0,
        max_tokens: int = 160,
    ) -> None:
        self.endpoint = ChatEndpoint(
            url, model, KEY_VARIABLES, retries=retries, timeout=timeout, backoff=backoff
        )
        self.concurrency, self.max_tokens = concurrency, max_tokens
        self._replies = ResultCache(log, sync=False, schema=lambda row: read_field(row, "text", str))

    def require_answer(self) -> None:
        """Raises `UserError` unless the endpoint answers, before a model is loaded."""
        with self.endpoint.connect() as client:
            self._reply(client, [{"role": "user", "content": "Say hello."}], 0)

    def next_messages(
        self, scripts: Sequence[Script], histories: Sequence[Sequence[TurnRecord]]
    ) -> list[str | None]:
        """The next message of every conversation, None where the model has no more to say."""
        requests: dict[str, tuple[Script, list[Message]]] = {}  # by key
        keys: list[str | None] = []
        for script, history in zip(scripts, histories, strict=True):
            key = None
            if history:
                messages = _reversed_roles(script, history)
                content = json.dumps(
                    [self.endpoint.model, script.name, script.seed, messages], sort_keys=True
                )
                key = hashlib.sha256(content.encode()).hexdigest()[:24]
                requests[key] = script, messages
            keys.append(key)

        def request(key: str, client: httpx.Client) -> None:
            script, messages = requests[key]
            text = self._reply(client, messages, int(key[:8], 16))
            row = {"id": key, "conversation": script.name, "turn": len(messages) // 2 - 1}
            self._replies.add([{**row, "model": self.endpoint.model, "messages": messages, "text": text}])

        with self.endpoint.connect() as client, ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(request, key, client) for key in requests if key not in self._replies]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        texts = [
            script.users[0] if key is None else str(self._replies[key]["text"])
            for script, key in zip(scripts, keys, strict=True)
        ]
        self.n_silent += sum(not text for text in texts)
        return [text or None for text in texts]

    def _reply(self, client: httpx.Client, messages: list[Message], seed: int) -> str:
        """The endpoint's reply; empty where the conversation is longer than the user's model can read."""
        reply = self.endpoint.complete(
            client, messages, jitter=seed, temperature=0.7, seed=seed, max_tokens=self.max_tokens
        )
        if reply.problem in ("not JSON", "not a chat completion"):
            raise UserError(
                f"{self.endpoint.url} does not answer like an OpenAI-compatible endpoint: {reply.text[:200]}"
            )
        if reply.problem == "http 400" and "context" in reply.text:
            return ""
        if reply.problem is not None:
            reason = f"{reply.problem}: {reply.text[:200]}" if reply.reached else reply.text
            raise UserError(
                f"no user at {self.endpoint.url} ({reason}); replies are kept: run again when it works"
            )
        text = without_thoughts(reply.text).strip()
        if reply.is_cut and not text:
            raise UserError(
                f"the user at {self.endpoint.url} thinks and says nothing within {THINKING_ROOM[-1]} tokens; "
                "take a model that thinks less"
            )
        return text


def _reversed_roles(script: Script, history: Sequence[TurnRecord]) -> list[Message]:
    """The conversation as the user's model sees it."""
    task = TASK.format(persona=PERSONAS.get(script.domain, DEFAULT_PERSONA))
    messages = [{"role": "system", "content": task}, {"role": "user", "content": OPENING}]
    for turn in history:
        messages += [
            {"role": "assistant", "content": turn.user},
            {"role": "user", "content": turn.text or "..."},
        ]
    return messages
