"""Any OpenAI-compatible model as the user of a conversation: it is told who it is and how the talk began, and reacts to answers.

    user = EndpointUser("http://127.0.0.1:8000", "some-large-model", folder / "users.jsonl")
    stage = Stage(model, chat, axis, Sampling(128), folder / "turns.jsonl", user)

The first turn is the script's, so that both kinds of users open alike; the later ones are the model's. To it the roles are turned: it
is the assistant that writes what the user says. Every reply is kept under a hash of what was asked, so that a study that goes on, or is
done again, hears the same user. The key comes from PERSONATLAS_USER_KEY or OPENAI_API_KEY and is written nowhere.
"""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from personatlas.persona.endpoints import ChatEndpoint
from personatlas.persona.errors import UserError
from personatlas.persona.logs import ResultCache
from personatlas.steering.conversations.runner import Spoken, Talk, User

KEY_VARIABLES = ("PERSONATLAS_USER_KEY", "OPENAI_API_KEY")
PERSONAS = {
    "coding": "You are a programmer at work. You want a practical problem solved, try what is proposed, and report what happened, errors included.",
    "writing": "You are working on a text of your own. You ask for drafts and changes, and say what you like and what you do not.",
    "therapy": "You are going through a hard time. You speak openly about what you feel, and go deeper as you are listened to.",
    "philosophy": "You are fascinated by what an AI may be. You question the AI about its own mind, and do not settle for short answers.",
    "everyday": "You need practical help with an everyday matter. You keep to the matter, say what you have and what you want, and ask for the next step.",
}
ANYBODY = "You are a curious person with a matter of your own."
TASK = (
    "{persona} You are talking with an AI. What it says comes to you as the other side's messages; write the next message of yours, "
    "in the first person, in one to three sentences, and nothing else. Stay on the model with which you began. Never answer as the AI."
)
OPENING = "(The conversation begins. You speak first.)"


class EndpointUser(User):
    """Asks `model` at `url` for what the user says next, with at most `concurrency` requests at a time.

    `timeout` and `backoff` are seconds. Raises `UserError` for an address or a key that cannot be one, and where an endpoint fails
    after its retries: what was said until then is kept.
    """

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
        self._replies = ResultCache(log, "id", sync=False)

    def require_answer(self) -> None:
        """`UserError` unless the endpoint answers: before a model is loaded, not after its first turn."""
        with self.endpoint.connect() as client:
            self._reply(client, [{"role": "user", "content": "Say hello."}], 0)

    def says(self, talks: Sequence[Talk], so_far: Sequence[Sequence[Spoken]]) -> list[str | None]:
        """The next turn of every conversation, None where the model has no more to say."""
        asked = [self._messages(talk, own) if own else [] for talk, own in zip(talks, so_far, strict=True)]
        ids = [self._id(talk, messages) for talk, messages in zip(talks, asked, strict=True)]
        missing = {
            id: (talk, messages)
            for id, talk, messages in zip(ids, talks, asked, strict=True)
            if messages and id not in self._replies
        }
        with self.endpoint.connect() as client, ThreadPoolExecutor(self.concurrency) as pool:
            jobs = [pool.submit(self._said, client, id, *one) for id, one in missing.items()]
            try:
                for job in jobs:
                    job.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        found = [
            str(self._replies[id]["text"]) if messages else talk.users[0]
            for id, talk, messages in zip(ids, talks, asked, strict=True)
        ]
        self.silent += sum(not text for text in found)
        return [text or None for text in found]

    def _said(self, client: httpx.Client, id: str, talk: Talk, messages: list[dict[str, str]]) -> None:
        """Ask once more, and keep the reply."""
        text = self._reply(client, messages, int(id[:8], 16))
        row = {"id": id, "conversation": talk.name, "turn": len(messages) // 2 - 1}
        self._replies.add([{**row, "model": self.endpoint.model, "messages": messages, "text": text}])

    def _messages(self, talk: Talk, own: Sequence[Spoken]) -> list[dict[str, str]]:
        """The conversation with its roles turned."""
        told = TASK.format(persona=PERSONAS.get(talk.domain, ANYBODY))
        messages = [{"role": "system", "content": told}, {"role": "user", "content": OPENING}]
        for one in own:
            messages += [
                {"role": "assistant", "content": one.user},
                {"role": "user", "content": one.text or "..."},
            ]
        return messages

    def _id(self, talk: Talk, messages: list[dict[str, str]]) -> str:
        content = json.dumps([self.endpoint.model, talk.name, talk.seed, messages], sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _reply(self, client: httpx.Client, messages: list[dict[str, str]], seed: int) -> str:
        """What the endpoint says; "" where the conversation is longer than it can read."""
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
                f"no user at {self.endpoint.url} ({reason}); what was said is kept: run again when it works"
            )
        return reply.text.rpartition("</think>")[2].strip()
