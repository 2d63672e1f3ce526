"""What a drift study is asked: the options of `personatlas drift`, checked before a model is loaded, and the conversations they make."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cyclopts import Parameter

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, read_conversations
from personatlas.persona.rollout import spread
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.conversations.runner import Script, ScriptedUser
from personatlas.steering.conversations.scripts import SCRIPTS
from personatlas.steering.conversations.simulated_user import EndpointUser


@Parameter(name="*")
@dataclass(frozen=True)
class DriftOptions:
    """Which conversations to have, how often, and who plays the user."""

    domains: str | None = None
    "domains of the scripts with commas between (coding, writing, therapy, philosophy, everyday); all unless given"
    conversations: int | None = None
    "scripts a domain, spread over them; all unless given"
    turns: int = 8
    "most turns a conversation"
    seeds: int = 1
    "samples of each script; an alarm can be calibrated on one of each of our own, more make it surer"
    user: str = "scripts"
    "scripts (offline), or the URL of an OpenAI-compatible endpoint that plays the user (key in PERSONATLAS_USER_KEY)"
    user_model: str | None = None
    "the model to ask for at that URL"
    scripts: Path | None = None
    "conversations whose user turns are asked, in any form that `personatlas trace` reads, in place of our own; their domains count"
    calm_domains: str = "coding,everyday"
    "domains that are known to hold: their conversations, as the model is, become reference.json, on which an alarm is calibrated"
    rule: Literal["cusum", "two_of_three"] = "cusum"
    "what raises an alarm: cusum (a small drift that lasts) or two_of_three (two of three turns far below)"
    false_alarms: float = 0.05
    "the share of calm conversations that may raise one"
    embedding: str | None = None
    "a sentence-embedding model that transformers loads, for the ridge regression on users' messages; hashed words unless given"
    max_new_tokens: int = 128
    "longest answer"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "all arms sample with it"

    @property
    def sampling(self) -> Sampling:
        """How to sample. Raises `UserError` for what cannot be."""
        return Sampling(self.max_new_tokens, self.temperature, self.top_p)

    @property
    def calm(self) -> tuple[str, ...]:
        """The domains that hold."""
        return names_in(self.calm_domains)


def names_in(text: str) -> tuple[str, ...]:
    """Names with commas between."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def chosen_talks(asked: DriftOptions) -> list[Script]:
    """The conversations to have. `UserError` for numbers that cannot be, and for domains that no script has."""
    for name in ("conversations", "turns", "seeds"):
        value = getattr(asked, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} is below 1")
    if not 0 < asked.false_alarms < 1:
        raise UserError(
            f"--false-alarms {asked.false_alarms} is outside 0..1: it is a share of conversations"
        )
    _ = asked.sampling
    told = read_conversations(asked.scripts or SCRIPTS)
    known = tuple(dict.fromkeys(one.domain for one in told))
    domains = known if asked.domains is None else names_in(asked.domains)
    for domain in domains:
        if domain not in known:
            raise UserError(f"--domains: {domain!r} is not one of {', '.join(map(repr, known))}")
    if not domains:
        raise UserError(f"--domains {asked.domains!r} names none")
    scripts = [
        one
        for domain in domains
        for one in spread([one for one in told if one.domain == domain], asked.conversations)
    ]
    return [talk_of(one, sample, asked.seed) for one in scripts for sample in range(asked.seeds)]


def talk_of(one: Conversation, sample: int = 0, seed: int = 0) -> Script:
    """A conversation's user turns, to be asked again."""
    users = tuple(message["content"] for message in one.messages if message["role"] == "user")
    opening = tuple(one.messages[:1]) if one.messages[0]["role"] == "system" else ()
    return Script(f"{one.name}/{sample}", one.domain, users, opening, seed)


def user_of(asked: DriftOptions, folder: Path) -> ScriptedUser:
    """Who plays the user. `UserError` for an endpoint that is not named whole, or does not answer."""
    if asked.user == "scripts":
        if asked.user_model is not None:
            raise UserError("--user-model names a model at an address: give --user URL with it")
        return ScriptedUser()
    if asked.user_model is None:
        raise UserError(f"--user {asked.user} needs --user-model NAME, the model to ask for there")
    user = EndpointUser(asked.user, asked.user_model, folder / "users.jsonl")
    user.require_answer()
    return user
