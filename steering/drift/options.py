"""Options of a drift study, checked before a model is loaded, and the scripts that they select."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import Conversation, read_conversations
from personatlas.persona.records import JsonRecord
from personatlas.persona.rollout import spread
from personatlas.steering.conversations.scripts import SCRIPTS

if TYPE_CHECKING:  # they need torch, which --help does not
    from personatlas.persona.sampling.sampler import Sampling
    from personatlas.steering.conversations.runner import Script, ScriptedUser


@dataclass(frozen=True)
class DriftOptions(JsonRecord):
    """Which conversations to run, how often, and who plays the user."""

    domains: str | None = None
    "domains with commas between (coding, writing, therapy, philosophy, everyday); all unless given"
    conversations: int | None = None
    "scripts per domain, spread over them; all unless given"
    turns: int | None = None
    "maximum turns per conversation; those of the scripts unless given"
    seeds: int = 1
    "samples of each script; one of each packaged script calibrates an alarm, more make it surer"
    user: str = "scripts"
    "scripts, or the URL of an OpenAI-compatible endpoint that plays the user (key: PERSONATLAS_USER_KEY)"
    user_model: str | None = None
    "the model to ask for at that URL"
    scripts: Path | None = None
    "stored conversations whose users are asked again, in place of our scripts, beside the stored answers"
    reference_domains: str = "coding,everyday"
    "domains without drift: their baseline becomes reference.json, on which an alarm is calibrated"
    rule: Literal["cusum", "two_of_three"] = "cusum"
    "what raises an alarm: cusum (a small drift that lasts) or two_of_three (two of three turns far below)"
    false_alarms: float = 0.05
    "share of reference conversations that may raise an alarm"
    embedding: str | None = None
    "a sentence-embedding model for the regression on users' messages; hashed words unless given"
    max_new_tokens: int = 128
    "maximum tokens per answer"
    temperature: float = 0.7
    "sampling temperature; 0 is greedy"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "sampling seed of all arms"

    json_names: ClassVar = {"reference_domains": "calm_domains"}

    @property
    def sampling(self) -> "Sampling":
        """The sampling of answers. Raises `UserError` for numbers out of range."""
        from personatlas.persona.sampling.sampler import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def references(self) -> tuple[str, ...]:
        """The names in `reference_domains`."""
        return _names(self.reference_domains)

    def select_conversations(self) -> list[Conversation]:
        """The conversations to run.

        Raises `UserError` for numbers out of range and for domains that no script has.
        """
        for name in ("conversations", "turns", "seeds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} {value} is below 1")
        if not 0 < self.false_alarms < 1:
            raise UserError(
                f"--false-alarms {self.false_alarms} is outside 0..1: it is a share of conversations"
            )
        _ = self.sampling
        if self.seeds > 1 and self.temperature == 0 and self.user == "scripts":
            raise UserError(
                f"--seeds {self.seeds} at --temperature 0 are one conversation {self.seeds} times"
            )
        conversations = read_conversations(self.scripts or SCRIPTS)
        known = tuple(dict.fromkeys(conversation.domain for conversation in conversations))
        domains = known if self.domains is None else _names(self.domains)
        if unknown := next((domain for domain in domains if domain not in known), None):
            raise UserError(f"--domains: {not_one_of(unknown, known)}")
        if not domains:
            raise UserError(f"--domains {self.domains!r} names none")
        by_domain = [[one for one in conversations if one.domain == domain] for domain in domains]
        if (wanted := self.conversations) is not None and wanted > (most := max(map(len, by_domain))):
            raise UserError(
                f"--conversations {wanted}: a domain has {most} scripts at most; give that or fewer"
            )
        longest = max(sum(m["role"] == "user" for m in one.messages) for own in by_domain for one in own)
        if self.user == "scripts" and self.turns is not None and self.turns > longest:
            raise UserError(f"--turns {self.turns}: the longest script has {longest}; give that or fewer")
        return [one for own in by_domain for one in spread(own, self.conversations)]

    def scripts_of(self, conversations: Sequence[Conversation]) -> "list[Script]":
        """The users' messages of conversations as scripts, each in `seeds` samples."""
        from personatlas.steering.conversations.runner import Script

        scripts = []
        for conversation in conversations:
            first, messages = conversation.messages[0], conversation.messages
            users = tuple(message["content"] for message in messages if message["role"] == "user")
            opening = (first,) if first["role"] == "system" else ()
            for sample in range(self.seeds):
                name = f"{conversation.name}/{sample}"
                scripts.append(Script(name, conversation.domain, users, opening, self.seed))
        return scripts

    def make_user(self, folder: Path) -> "ScriptedUser":
        """Who plays the user.

        Raises `UserError` for an endpoint that is named in part, or does not answer.
        """
        from personatlas.steering.conversations.runner import ScriptedUser
        from personatlas.steering.conversations.simulated_user import EndpointUser

        if self.user == "scripts":
            if self.user_model is not None:
                raise UserError("--user-model names a model at an address: give --user URL with it")
            return ScriptedUser()
        if self.user_model is None:
            raise UserError(f"--user {self.user} needs --user-model NAME, the model to ask for there")
        user = EndpointUser(self.user, self.user_model, folder / "users.jsonl")
        user.require_answer()
        return user


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
