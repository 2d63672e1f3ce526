"""What an evaluation is asked: the options of `personatlas eval`, checked before a model is loaded, and the suites that they make."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from personatlas.persona.errors import UserError
from personatlas.persona.formats import Conversation, read_conversations
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import spread
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.conversations.scripts import EVERYDAY, SCRIPTS
from personatlas.steering.evals.capability import read_text
from personatlas.steering.evals.suites import build as suites
from personatlas.steering.evals.suites.build import Suite
from personatlas.steering.evals.suites.requests import read_requests, read_templates

NEEDS = {  # the option whose file a suite is made of; drift has scripts of its own, which it takes only when it is named
    "persona-jailbreak": "requests",
    "harm": "requests",
    "over-refusal": "over_refusal",
    "susceptibility": None,
    "drift": "transcripts",
    "benign": None,
}
ROLE_SUITES = {
    "persona-jailbreak",
    "susceptibility",
}  # they need a persona space, whose lowest roles they take


@Parameter(name="*")
@dataclass(frozen=True)
class EvalOptions:
    """What to ask, how often, and who judges."""

    suite: str | None = None
    "suites with commas between: persona-jailbreak, harm, over-refusal, susceptibility, drift, benign; all that there is material for unless given"
    requests: Path | None = None
    "harmful requests: HarmBench, AdvBench, StrongREJECT, JailbreakBench, or any CSV, JSON or JSONL with a column for them"
    column: str | None = None
    "the column of the requests, if it has a name of its own"
    templates: Path | None = None
    "jailbreak templates with [INSERT PROMPT HERE] or {request}, for the suite harm"
    over_refusal: Path | None = None
    "requests that only look harmful, in XSTest's form; those labelled unsafe are a suite of their own, contrast"
    transcripts: Path | None = None
    "stored conversations (JSON or JSONL, OpenAI's or ShareGPT's form), whose user turns are asked again; --suite drift takes our own scripts without them"
    pairs: int = 300
    "most cases a suite; benign has --answers"
    roles: int = 50
    "the lowest roles on the axis"
    tag: Annotated[list[str] | None, Parameter(negative=())] = None
    "only roles with this tag; may be given several times"
    prompts: int = 2
    "prompts a role in susceptibility"
    answers: int = 60
    "everyday questions, on which loss and KL are measured"
    text: Path | None = None
    "a text file, for bits per byte"
    text_bytes: int = 200_000
    "most bytes of it"
    tasks: str | None = None
    "tasks of the lm-eval harness with commas between, such as ifeval,gsm8k"
    data: Annotated[list[str] | None, Parameter(negative=())] = None
    "TASK=FILE.jsonl: rows of a task from a file, without a hub; may be given several times"
    task_limit: int | None = None
    "most samples a task"
    task_tokens: int | None = None
    "longest answer in a task; the task's own unless given"
    random: int = 1
    "random directions that fire as often as the first cap, as a control"
    max_new_tokens: int = 128
    "longest answer; 48 in susceptibility"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "all arms sample with it"
    margin: float = 0.05
    "a change within this much of zero is no loss"
    judge: str = "rules"
    "rules, a file of `personatlas tools harm-judge fit`, local:MODEL, or the URL of an OpenAI-compatible endpoint: who says what is harmful"
    judge_model: str | None = None
    "the model to ask for at that URL"
    rubric: str = "yes-no"
    "what a model that judges is asked: yes-no, or scale (refused, convincing, specific)"


def chosen(asked: EvalOptions) -> tuple[str, ...]:
    """The names of the suites. `UserError` for one that is unknown or has no material, and for numbers that cannot be."""
    for name, least in (
        ("pairs", 1),
        ("roles", 4),
        ("prompts", 1),
        ("answers", 2),
        ("random", 0),
        ("max_new_tokens", 1),
    ):
        if getattr(asked, name) < least:
            raise UserError(f"--{name.replace('_', '-')} {getattr(asked, name)} is below {least}")
    if not 0 < asked.margin < 1:
        raise UserError(f"--margin {asked.margin} is outside 0..1: it is a share")
    if asked.suite is None:
        return tuple(name for name, file in NEEDS.items() if file is None or getattr(asked, file) is not None)
    names = tuple(dict.fromkeys(name.strip() for name in asked.suite.split(",") if name.strip()))
    for name in names:
        if name not in NEEDS:
            raise UserError(f"suite {name!r} is not one of {', '.join(NEEDS)}")
        file = NEEDS[name]
        if name != "drift" and file is not None and getattr(asked, file) is None:
            raise UserError(f"suite {name} needs --{file.replace('_', '-')} FILE")
    if not names:
        raise UserError(f"--suite {asked.suite!r} names none")
    return names


def require_material(asked: EvalOptions, bank: Bank) -> None:
    """Read every file, and look at every number and tag, before a model is loaded. `UserError` for what cannot be."""
    Sampling(asked.max_new_tokens, asked.temperature, asked.top_p)
    if asked.requests is not None:
        read_requests(asked.requests, asked.column)
    if asked.templates is not None:
        read_templates(asked.templates)
    if asked.over_refusal is not None:
        read_requests(asked.over_refusal)
    if asked.transcripts is not None:
        read_conversations(asked.transcripts)
    if asked.text is not None:
        read_text(asked.text, asked.text_bytes)
    tags = {tag for role in bank.roles for tag in role.tags}
    unknown = sorted(set(asked.tag or ()) - tags)
    if unknown:
        raise UserError(f"--tag {unknown[0]!r} is not one of {', '.join(sorted(tags))}")


def made(
    asked: EvalOptions, names: Sequence[str], bank: Bank, roles: Sequence[str], model_name: str
) -> list[Suite]:
    """The suites, from the user's files and the bank. `roles` are those to play."""
    tokens, seed = asked.max_new_tokens, asked.seed
    asks = read_requests(asked.requests, asked.column) if asked.requests is not None else []
    found: list[Suite] = []
    for name in names:
        if name == "persona-jailbreak":
            found.append(suites.persona_jailbreaks(bank, roles, asks, asked.pairs, seed, tokens))
        elif name == "harm":
            templates = read_templates(asked.templates) if asked.templates is not None else []
            found.append(suites.harmful_requests(asks, templates, asked.pairs, seed, tokens))
        elif name == "over-refusal" and asked.over_refusal is not None:
            found += suites.over_refusal(read_requests(asked.over_refusal), asked.pairs, seed, tokens)
        elif name == "susceptibility":
            whole = suites.susceptibility(bank, roles, asked.prompts, model_name, seed, min(tokens, 48))
            found.append(replace(whole, cases=tuple(spread(whole.cases, asked.pairs))))
        elif name == "drift":
            found.append(suites.drift(spread(_conversations(asked.transcripts), asked.pairs), seed, tokens))
        elif name == "benign":
            found.append(suites.benign(bank, asked.answers, model_name, seed, tokens))
    return found


def _conversations(transcripts: Path | None) -> list[Conversation]:
    """The user's, or our own but for everyday help, which is there to calibrate alarms on and would outnumber the rest."""
    if transcripts is not None:
        return read_conversations(transcripts)
    return [one for one in read_conversations(SCRIPTS) if one.domain != EVERYDAY]
