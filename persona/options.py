"""What the verbs may be told, once: options shared between verbs, and how they become a prepared run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from personatlas.persona.errors import UserError
from personatlas.persona.rollout import Selection


@Parameter(name="*")
@dataclass(frozen=True)
class ModelOptions:
    """How to load the model."""

    device: str | None = None
    "cpu, cuda, cuda:1, ...; the first GPU unless given, else the CPU"
    dtype: str | None = None
    "float32, bfloat16, float16 or auto (the checkpoint's own); bfloat16 on a GPU and the faster one on a CPU unless given"
    chat_template: Path | None = None
    "a Jinja file in place of the tokenizer's chat template"


@Parameter(name="*")
@dataclass(frozen=True)
class PlanOptions:
    """Which rollouts to make; what is not given comes from the plan."""

    plan: str = "standard"
    "demo (48 roles, 1 prompt, 16 questions, 32 tokens), standard (all, 2, 12, 128) or paper (all, 5, all, 512)"
    roles: Annotated[str | None, Parameter(allow_leading_hyphen=False)] = None
    "role names with commas between, or a number of roles spread over the bank"
    traits: bool = False
    "roll out traits beside the roles, with the same prompts and questions"
    trait_names: Annotated[str | None, Parameter(allow_leading_hyphen=False)] = None
    "trait names with commas between, or a number of traits spread over the bank; all unless given"
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
    chunk: Annotated[int | None, Parameter(show=False)] = None
    "rollouts that start together; 64 on a CPU, 16384 on a GPU unless given"


@Parameter(name="*")
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


@Parameter(name="*")
@dataclass(frozen=True)
class JudgeOptions:
    """Who decides whether an answer plays its role."""

    judge: str = "rules"
    "rules (offline), none, local:MODEL, or the URL of an OpenAI-compatible endpoint (key in PERSONATLAS_JUDGE_KEY)"
    judge_model: str | None = None
    "the model to ask for at that URL"


@Parameter(name="*")
@dataclass(frozen=True)
class FitOptions:
    """What to fit."""

    keep: str = "small"
    "which scores count: small (1-3, at least 3 answers a role), paper (3, at least 50), paper-soft (2-3, 10), all"
    positive: str | None = None
    "the role at the positive pole; the default role unless given"
    layer: int | None = None
    "the layer to use, 0-based; chosen by stability and agreement unless given"
    replicates: int = 100
    "bootstrap replicates, random splits and shuffles"
    compare: Path | None = None
    "another run or axis, or smollm2-135m for the one that comes with it, to compare with"


@dataclass(frozen=True)
class PlanSize:
    """A named plan; None means all there are."""

    roles: int | None
    prompts: int | None
    questions: int | None
    max_new_tokens: int


PLANS = {
    # Few answers leave noise in PC1, not roles: 96 roles x 4 questions x 48 tokens gave cos(PC1, axis) 0.36 on the
    # packaged model, half the roles x 16 questions x 32 tokens gives the figures in the README in the same time.
    "demo": PlanSize(48, 1, 16, 32),
    "standard": PlanSize(None, 2, 12, 128),
    "paper": PlanSize(None, 5, None, 512),
}


def selection_of(options: PlanOptions) -> tuple[Selection, int]:
    """The selection and the longest answer that the options ask for. `UserError` for values that make no plan."""
    if options.plan not in PLANS:
        raise UserError(f"plan {options.plan!r} is not one of {', '.join(PLANS)}")
    size = PLANS[options.plan]
    for name in ("prompts", "questions", "samples", "max_new_tokens", "chunk"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} is below 1")
    names, count = _names_or_count(options.roles, "--roles")
    count = size.roles if options.roles is None else count
    if options.roles is not None and (len(names) if names is not None else count or 0) < 3:
        raise UserError("a persona space needs at least 3 roles besides the default; give more with --roles")
    trait_names, n_traits = _names_or_count(options.trait_names, "--trait-names")
    if (
        options.trait_names is not None
        and (len(trait_names) if trait_names is not None else n_traits or 0) < 3
    ):
        raise UserError("a trait space needs at least 3 traits; give more with --trait-names")
    selection = Selection(
        role_names=names,
        n_roles=count,
        prompts=options.prompts or size.prompts,
        questions=options.questions or size.questions,
        samples=options.samples,
        with_traits=options.traits or options.trait_names is not None,
        trait_names=trait_names,
        n_traits=n_traits,
    )
    return selection, options.max_new_tokens or size.max_new_tokens


def _names_or_count(text: str | None, option: str) -> tuple[tuple[str, ...] | None, int | None]:
    """Names with commas between, or a number; neither when nothing is given."""
    if text is None:
        return None, None
    if text.strip().isdigit():
        return None, int(text)
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UserError(f"{option} {text!r} names nothing")
    if len(set(names)) != len(names):
        raise UserError(f"{option} names {next(n for n in names if names.count(n) > 1)!r} twice")
    return names, None


def given(options: Any) -> dict[str, Any]:
    """The options of a dataclass as plain values, paths as text."""
    found = {field.name: getattr(options, field.name) for field in fields(options)}
    return {name: str(value) if isinstance(value, Path) else value for name, value in found.items()}
