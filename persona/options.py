"""Options that several commands share, as plain dataclasses; the string under a field is its help.

selection, max_new_tokens = selection_of(PlanOptions(plan="demo", questions=8))
"""

from dataclasses import dataclass, fields
from pathlib import Path

from personatlas.persona.errors import UserError, did_you_mean, not_one_of
from personatlas.persona.judges.base import SCORE_FILTERS
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.rollout import Selection

DTYPE_NAMES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class ModelOptions:
    """How to load the model."""

    device: str | None = None
    "cpu, cuda, cuda:1, ...; the first GPU unless given, else the CPU"
    dtype: str | None = None
    """float32, bfloat16, float16 or auto (the checkpoint's own); bfloat16 on a GPU and the faster one on a
    CPU unless given"""
    chat_template: Path | None = None
    "a Jinja file in place of the tokenizer's chat template"

    def check(self) -> None:
        """Raises `UserError` for a dtype that there is not."""
        if self.dtype is not None and self.dtype not in (names := (*DTYPE_NAMES, "auto")):
            raise UserError(f"--dtype {not_one_of(self.dtype, names)}")


@dataclass(frozen=True)
class PlanOptions:
    """Which rollouts to make; what is not given comes from the plan."""

    plan: str | None = None
    """demo (48 roles, 1 prompt, 16 questions, 32 tokens), standard (all, 2, 12, 128) or paper (all, 5, all,
    512); that of the run, else demo on a CPU and standard on a GPU unless given"""
    roles: str | None = None
    "role names with commas between, or a number of roles spread over the bank"
    traits: bool = False
    "roll out traits beside the roles, with the same prompts and questions"
    trait_names: str | None = None
    "trait names with commas between, or a number of traits spread over the bank; all unless given"
    no_controls: bool = False
    "leave out the prompts that ask for no character: facts, a style, an assistant, a plain human"
    prompts: int | None = None
    "prompts a role"
    questions: int | None = None
    "questions, the first of the bank"
    samples: int = 1
    "answers to each question"
    max_new_tokens: int | None = None
    "longest answer"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "every rollout's seed is made from this and its key"
    bank: Path | None = None
    "a folder with roles.jsonl, questions.jsonl and maybe traits.jsonl, or in the paper repository's form"
    chunk: int | None = None
    "rollouts that start together; 64 on a CPU, 16384 on a GPU unless given"

    def check(self) -> None:
        """Raises `UserError` for what makes no plan, and for names that the bank has not."""
        selection, bank = selection_of(self)[0], load_bank(self.bank)
        selection.roles(bank)
        selection.traits(bank)


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample one answer."""

    max_new_tokens: int = 128
    "longest answer"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "all arms sample with it"


@dataclass(frozen=True)
class JudgeOptions:
    """What decides whether an answer plays its role."""

    judge: str = "rules"
    """rules (offline), none, local:MODEL, or the URL of an OpenAI-compatible endpoint (key in
    PERSONATLAS_JUDGE_KEY)"""
    judge_model: str | None = None
    "the model to ask for at that URL"
    judge_tokens: int | None = None
    "the longest reply of that model, with its thoughts; unless given as long as it needs"

    @property
    def is_url(self) -> bool:
        """Whether the judge is a model at an address."""
        return self.judge.startswith(("http://", "https://"))

    def check(self) -> None:
        """Raises `UserError` for a judge that there is not, and for options that do not go with it."""
        if self.judge not in ("rules", "none") and not self.judge.startswith("local:") and not self.is_url:
            hint = did_you_mean(self.judge, ("rules", "none", "local:MODEL"))
            raise UserError(f"--judge {self.judge!r} is not rules, none, local:MODEL or a http(s) URL{hint}")
        if self.is_url and not self.judge_model:
            raise UserError(f"--judge {self.judge} needs --judge-model NAME")
        for option in ("judge_model", "judge_tokens"):
            if not self.is_url and getattr(self, option) is not None:
                raise UserError(
                    f"--{option.replace('_', '-')} is about a model at an address: give --judge URL with it"
                )


@dataclass(frozen=True)
class FitOptions:
    """What to fit."""

    keep: str = "small"
    """which scores count: small (1-3, at least 3 answers a role), paper (3, at least 50), paper-soft (2-3,
    10), all"""
    positive: str | None = None
    "the role at the positive pole; the default role unless given"
    layer: int | None = None
    "the layer to use, 0-based; chosen by stability and agreement unless given"
    replicates: int = 100
    "bootstrap replicates, random splits and shuffles"
    compare: Path | None = None
    "another run or axis, or smollm2-135m for the one that comes with it, to compare with"

    def check(self) -> None:
        """Raises `UserError` for what no run allows."""
        if self.keep not in SCORE_FILTERS:
            raise UserError(f"--keep {not_one_of(self.keep, SCORE_FILTERS)}")
        if self.replicates < 0:
            raise UserError(f"--replicates {self.replicates} is below 0")
        if self.replicates == 1:
            raise UserError("--replicates 1 makes no interval; give 0 for none, or as many as 100")


# Roles, prompts, questions and longest answer of a plan; None means all there are. Few answers leave noise in PC1,
# not roles: 96 roles x 4 questions x 48 tokens gave cos(PC1, axis) 0.36 on the packaged model, half the roles x 16
# questions x 32 tokens gives the figures in the README in the same time.
PLANS: dict[str, tuple[int | None, int | None, int | None, int]] = {
    "demo": (48, 1, 16, 32),
    "standard": (None, 2, 12, 128),
    "paper": (None, 5, None, 512),
}


def selection_of(options: PlanOptions) -> tuple[Selection, int]:
    """The selection and the longest answer that the options ask for. `UserError` for values that make no plan."""
    if (plan := options.plan or "standard") not in PLANS:
        raise UserError(f"--plan {not_one_of(plan, PLANS)}")
    roles, prompts, questions, max_new_tokens = PLANS[plan]
    for name in ("prompts", "questions", "samples", "max_new_tokens", "chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is below 1")
    if options.samples > 1 and options.temperature == 0:
        raise UserError(
            f"--samples {options.samples} at --temperature 0 are one answer {options.samples} times"
        )
    role_names, n_roles = _names_or_count(options.roles, "role", "roles", "besides the default")
    trait_names, n_traits = _names_or_count(options.trait_names, "trait", "trait-names", "")
    selection = Selection(
        role_names=role_names,
        n_roles=roles if options.roles is None else n_roles,
        prompts=options.prompts or prompts,
        questions=options.questions or questions,
        samples=options.samples,
        with_traits=options.traits or options.trait_names is not None,
        trait_names=trait_names,
        n_traits=n_traits,
        with_controls=not options.no_controls,
    )
    return selection, options.max_new_tokens or max_new_tokens


def recorded_plan(asked: JsonObject) -> str | None:
    """The plan of a run by what its run.json says was asked for; None where it says nothing.

    Runs of earlier versions do not name it: it is the one with their limits, else "paper", which has none.
    """
    if "max_new_tokens" not in asked:
        return None
    limits = tuple(asked.get(name) for name in ("prompts", "questions", "max_new_tokens"))
    return str(asked.get("plan") or next((name for name in PLANS if PLANS[name][1:] == limits), "paper"))


def require_in_bank(options: PlanOptions, bank: Bank) -> None:
    """`UserError` for more than the bank has of what is asked for by number."""
    others = [role for role in bank.roles if not role.is_default]
    there = {
        "roles": len(others),
        "trait_names": len(bank.traits),
        "prompts": max((len(role.prompts) for role in others), default=0),
        "questions": len(bank.questions),
    }
    for name, most in there.items():
        value = getattr(options, name)
        if value is not None and str(value).strip().isdigit() and int(value) > most:
            what = {"trait_names": "traits", "prompts": "prompts a role"}.get(name, name)
            raise UserError(
                f"--{name.replace('_', '-')} {value}: this bank has {most} {what}; give that or fewer"
            )
    fewer = sum(len(role.prompts) < (options.prompts or 0) for role in others)
    if fewer:
        say(f"{fewer} roles of the bank have fewer than {options.prompts} prompts: all of theirs are used")


def _names_or_count(
    text: str | None, kind: str, option: str, besides: str
) -> tuple[tuple[str, ...] | None, int | None]:
    """Names with commas between, or a number, at least three; neither when nothing is given."""
    if text is None:
        return None, None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    is_count = text.strip().isdigit()
    if not names:
        raise UserError(f"--{option} {text!r} names nothing")
    if len(set(names)) != len(names):
        raise UserError(f"--{option} names {next(n for n in names if names.count(n) > 1)!r} twice")
    if (int(text) if is_count else len(names)) < 3:
        space = "persona" if kind == "role" else "trait"
        needed = " ".join(("at least 3", f"{kind}s", besides)).strip()
        raise UserError(f"a {space} space needs {needed}; give more with --{option}")
    return (None, int(text)) if is_count else (names, None)


def option_values(options: object) -> dict[str, object]:
    """The fields of an options dataclass as plain values, paths as text."""
    values = {field.name: getattr(options, field.name) for field in fields(options)}  # type: ignore[arg-type]
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
