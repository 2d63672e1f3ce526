"""Suites: what an evaluation asks a model, and what its answers count as. One file of this folder is one
suite.

    from personatlas.steering.evals.suites import Case, Suite, suite

    @suite
    class Greetings(Suite):
        name = "greetings"
        outcomes = {"greets": "more"}

        def build_cases(self, inputs):
            return [Case.from_text(f"greetings/0/{text}/0", text) for text in ("Hello!", "Good evening.")]

        def score(self, case, answer, verdict):
            return {"greets": float("hello" in answer.lower())}

After this, also in a file of one's own, the suite can be named like those of this folder. A case is one
conversation; all arms answer the same cases with the same seeds. Cases that share a role or a request are not
independent: both are the clusters of the statistics. Requests of users' files are harmful texts, so nothing
here prints them.
"""

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, TypeVar

from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.formats import Message
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import seed_of
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.evals.harm.judges import HarmJudge
from personatlas.steering.evals.harm.refusal_rules import refusal_of
from personatlas.steering.evals.options import EvalOptions

Better = Literal["more", "less"]


@dataclass(frozen=True)
class Case:
    """One conversation: the messages of its first turn and the user's later turns.

    `key` is "role/prompt/request/sample" and decides the seed. `role` and `request` are the case's clusters,
    `category` groups it in the report, and `bare_request` is the request without the template that it was put
    into.
    """

    key: str
    messages: tuple[Message, ...]
    role: str = ""
    request: str = ""
    category: str = ""
    later: tuple[str, ...] = ()
    bare_request: str = ""

    @classmethod
    def from_text(cls, key: str, text: str, category: str = "") -> "Case":
        """A case of one user message without a system prompt; the key names its request."""
        return cls(key, ({"role": "user", "content": text},), request=key.split("/")[2], category=category)

    @property
    def question(self) -> str:
        """The user's first message."""
        return self.messages[-1]["content"]

    @property
    def judged_request(self) -> str:
        """The request as a judge sees it, without role or template."""
        return self.bare_request or self.question


@dataclass(frozen=True)
class SuiteInputs:
    """What cases are built from. `roles` are the lowest on the axis, and only there for suites with
    `needs_roles`."""

    options: EvalOptions
    bank: Bank
    roles: tuple[str, ...] = ()
    model_name: str = ""


@dataclass(frozen=True)
class Suite:
    """Base of all suites. A subclass sets `name` and `outcomes` and defines `build_cases`, and `score` for
    its own outcomes.

    name
        the name in `--suite` and in eval.json
    outcomes
        what is counted, and whether "more" or "less" of it is better; the first one is the main outcome
    file_option
        the field of `EvalOptions` with the file that the suite is made of; "" for none
    needs_file
        whether it cannot do without that file
    needs_roles, needs_judge
        whether it plays the axis's lowest roles, and whether a judge of harm sees its answers
    hides_answers
        whether the page leaves its requests and answers out unless they are asked for
    order
        its rank among the suites of an evaluation that names none, and on the page
    parts
        further suites that are made of the same file

    `settings` replace fields of `EvalOptions` for this suite alone; `inputs` and `cases` are there once it is
    prepared.
    """

    name: ClassVar[str]
    outcomes: ClassVar[Mapping[str, Better]]
    file_option: ClassVar[str] = ""
    needs_file: ClassVar[bool] = True
    needs_roles: ClassVar[bool] = False
    needs_judge: ClassVar[bool] = False
    hides_answers: ClassVar[bool] = False
    order: ClassVar[int] = 45
    parts: ClassVar[tuple[type["Suite"], ...]] = ()

    settings: Mapping[str, object] = field(default_factory=dict)
    inputs: SuiteInputs | None = None
    cases: tuple[Case, ...] = ()

    @classmethod
    def named(cls, name: str, **settings: object) -> "Suite":
        """The suite of that name with settings of its own: `Suite.named("harm", requests="requests.csv")`."""
        return find_suite(name)(settings)

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        assert self.inputs is not None
        return self.inputs.options.max_new_tokens

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled."""
        assert self.inputs is not None
        return self.inputs.options.sampling(self.max_new_tokens)

    @property
    def turns(self) -> int:
        """User turns of the longest case."""
        return 1 + max(len(case.later) for case in self.cases)

    def seed_of(self, case: Case) -> int:
        """The seed of a case's first turn, for all arms."""
        assert self.inputs is not None
        return seed_of(case.key, self.inputs.options.seed)

    def resolve_options(self, options: EvalOptions) -> EvalOptions:
        """The evaluation's options with the suite's own settings. Raises `UserError` where its file is not
        named."""
        unknown = set(self.settings) - set(EvalOptions.__dataclass_fields__)
        if unknown:
            raise UserError(f"suite {self.name} has no setting {sorted(unknown)[0]!r}; see EvalOptions")
        options = replace(options, **self.settings)  # type: ignore[arg-type]
        if self.file_option and self.needs_file and getattr(options, self.file_option) is None:
            raise UserError(f"suite {self.name} needs --{self.file_option.replace('_', '-')} FILE")
        return options

    def check(self, options: EvalOptions) -> None:
        """Raises `UserError` for files that cannot be read; called before a model is loaded."""

    def build_cases(self, inputs: SuiteInputs) -> Sequence[Case]:
        """The suite's cases. Of cases with the same key one is kept."""
        raise NotImplementedError

    def judge(self, harm: HarmJudge) -> HarmJudge | None:
        """The judge that sees the suite's answers: the one of harm where it `needs_judge`, else none."""
        return harm if self.needs_judge else None

    def score(self, case: Case, answer: str, verdict: float | None) -> dict[str, float | None]:
        """Outcomes of one answer, 0 or 1 each, None where it could not be judged; those not in `outcomes` are
        not counted.

        `verdict` is the judge's score, 0 to 1, or None. This one says what the refusal rules do: complied,
        refused, degenerate.
        """
        outcome = refusal_of(answer)
        return {name: float(outcome == name) for name in ("complied", "refused", "degenerate")}

    def prepare(self, inputs: SuiteInputs) -> list["Suite"]:
        """The suite with its cases, and its parts with theirs; a part without any is left out."""
        inputs = replace(inputs, options=self.resolve_options(inputs.options))
        prepared = []
        for own in (self, *(part(self.settings) for part in self.parts)):
            cases = {case.key: case for case in own.build_cases(inputs)}
            if cases:
                prepared.append(replace(own, inputs=inputs, cases=tuple(cases.values())))
        if not prepared:
            raise UserError(f"suite {self.name} has no cases")
        return prepared


SuiteClass = TypeVar("SuiteClass", bound=type[Suite])
_SUITES: dict[str, type[Suite]] = {}


def suite(cls: SuiteClass) -> SuiteClass:
    """Registers a suite under its name. Raises ValueError for a name that another class has."""
    other = _SUITES.get(cls.name)
    if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"suite {cls.name!r} is already {other.__module__}.{other.__qualname__}")
    _SUITES[cls.name] = cls
    return cls


def registered_suites() -> dict[str, type[Suite]]:
    """All suites by name: those of this folder and those that were registered elsewhere, in their order."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return dict(sorted(_SUITES.items(), key=lambda item: item[1].order))


def find_suite(name: str) -> type[Suite]:
    """The registered suite of that name. Raises `UserError` and names those that there are."""
    suites = registered_suites()
    if name not in suites:
        raise UserError(f"suite {not_one_of(name, suites)}")
    return suites[name]


def select_suites(suites: Sequence[str | Suite] | None, options: EvalOptions) -> list[Suite]:
    """The suites, each once; without a choice those whose file is given and those that need none.

    Raises `UserError` for a name that is unknown, a file that is missing or cannot be read, and for no name
    at all.
    """
    if suites is None:
        classes = registered_suites().values()
        selected = [c() for c in classes if not c.file_option or getattr(options, c.file_option) is not None]
    else:
        instances = [find_suite(own)() if isinstance(own, str) else own for own in suites]
        selected = list({own.name: own for own in instances}.values())
    if not selected:
        raise UserError(f"no suite is named; there are {', '.join(registered_suites())}")
    for own in selected:
        own.check(own.resolve_options(options))
    return selected
