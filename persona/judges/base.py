"""Does an answer play the role? Scores by a judge, the log that they are kept in, and which answers they let
through.

    0 refuses as itself   1 answers as itself   2 says that it is an AI, yet shows the role   3 fully in the
    role

(arXiv 2601.10387, appendix on data.) The default role plays nobody and is never judged: its score stays None.
What a judge could not decide is a `problem`, counted and asked again on the next run, never guessed.

    tally = judge_rollouts(rollouts, bank, RuleJudge(), folder / "scores.jsonl", None)
    rollouts = with_scores(rollouts, read_scores(folder / "scores.jsonl", tally.judge))
    used, dropped = filter_by_score(rollouts, SCORE_FILTERS["small"], bank.default.name)
"""

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Protocol, runtime_checkable

from personatlas.persona.errors import UserError
from personatlas.persona.logs import ResultCache
from personatlas.persona.records import Count, JsonRecord
from personatlas.persona.roles.bank import POSITIVE, Bank, Role, role_kind
from personatlas.persona.rollout import Rollout, RolloutKey

SCORES = (0, 1, 2, 3)  # of roles
HIGHEST_PERCENT, NEUTRAL_PERCENT = 100, 50  # of traits, which are scored from 0


@dataclass(frozen=True)
class Item:
    """What a judge sees of a rollout: the role, the system prompt ("" for none), the question and the answer."""

    key: str
    role: Role
    prompt: str
    question: str
    answer: str

    @property
    def sha(self) -> str:
        """16 hex digits over the answer and all that it is judged against: an edited rubric means a new
        judgement.
        """
        role = (self.role.name, *self.role.prompts, self.role.rubric, *self.role.tags)
        content = "\0".join((*role, "", self.prompt, self.question, self.answer))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class Verdict:
    """A score (0-3 of a role, 0-100 of a trait), or None with the `problem` that kept the judge from one."""

    key: str
    score: int | None
    reply: str
    problem: str | None = None

    def __post_init__(self) -> None:
        if (self.score is None) != (self.problem is not None) or not 0 <= (
            self.score or 0
        ) <= HIGHEST_PERCENT:
            raise ValueError(
                f"{self.key}: a score or a problem is needed, not {self.score!r} and {self.problem!r}"
            )


@runtime_checkable
class Judge(Protocol):
    """Anything that scores items; two judges' scores are told apart by `id`, and never mixed."""

    @property
    def id(self) -> str:
        """Judge and wording."""

    def verdicts(self, items: Sequence[Item]) -> Generator[Verdict, None, None]:
        """One verdict per item, in any order, each as soon as it is there. Raises `UserError` to stop it all."""
        ...


@dataclass(frozen=True)
class Tally:
    """How a judging went. `by_role` counts every item's score, new or from the log; None counts those with a
    problem.

    `cached` is how many were in the log already; `problems` says what went wrong in this run, and how often.
    """

    judge: str
    by_role: dict[str, Counter[int | None]]
    problems: Counter[str]
    cached: int

    @property
    def counts(self) -> dict[int, int]:
        """Number of answers at each score 0-3, over all roles."""
        return {score: sum(counts[score] for counts in self.by_role.values()) for score in SCORES}

    @property
    def unparsable(self) -> int:
        """Number of answers without a score: the judge's reply could not be read or never came."""
        return sum(counts[None] for counts in self.by_role.values())


def items_to_judge(rollouts: Sequence[Rollout], bank: Bank) -> list[Item]:
    """Every rollout but the default's and those without text, which no score could save."""
    items, roles = [], dict[str, Role]()
    for rollout in rollouts:
        name = rollout.role
        if name == bank.default.name or rollout.is_empty:
            continue
        if name not in roles:
            named = bank.trait(name[1:]).poles if role_kind(name) == "trait" else (bank.role(name),)
            roles |= {role.name: role for role in named}
        contents = {message["role"]: message["content"] for message in rollout.messages}
        system, question = contents.get("system", ""), contents.get("user", "")
        items.append(Item(rollout.key, roles[name], system, question, rollout.answer))
    return items


def judge_rollouts(
    rollouts: Sequence[Rollout],
    bank: Bank,
    judge: Judge,
    path: Path,
    progress: Callable[[int], None] | None = None,
) -> Tally:
    """Judge what this judge has not scored yet and append it to the log `path`, a row each as it comes.

    Rows: key, judge, answer_sha (see `Item.sha`), score, reply, problem. An exception loses no verdict, a
    kill at most those that came within half a second of the last write; the next run asks only for the rest
    and for those with a problem. `progress` is called with the number of items just finished, first with
    those from the log; their sum is `len(items_to_judge(...))`.
    """
    items = {item.key: item for item in items_to_judge(rollouts, bank)}
    log = ResultCache(path, ("judge", "key"), schema=ScoreRow.from_json, batched=True)
    done: dict[str, int] = {}
    for key, item in items.items():
        row = log.get((judge.id, key))
        if row is not None and row["score"] is not None and row.get("answer_sha") == item.sha:
            done[key] = row["score"]
    tally = Tally(judge.id, {item.role.name: Counter() for item in items.values()}, Counter(), len(done))
    for key, score in done.items():
        tally.by_role[items[key].role.name][score] += 1
    if done and progress is not None:
        progress(len(done))
    waiting = {key: item for key, item in items.items() if key not in done}
    # a generator that is closed ends its threads here rather than at some later garbage collection
    with log, contextlib.closing(judge.verdicts(list(waiting.values()))) as verdicts:
        for verdict in verdicts:
            item = waiting.pop(verdict.key)
            reply = verdict.reply.encode("utf-8", "replace").decode()  # a lone surrogate cannot be written
            row = {"key": item.key, "judge": judge.id, "answer_sha": item.sha, "score": verdict.score}
            log.add([{**row, "reply": reply, "problem": verdict.problem}])
            tally.by_role[item.role.name][verdict.score] += 1
            if verdict.problem is not None:
                tally.problems[verdict.problem] += 1
            if progress is not None:
                progress(1)
    if waiting:
        raise ValueError(
            f"judge {judge.id} gave no verdict on {len(waiting)} items, {next(iter(waiting))} for one"
        )
    return tally


def read_scores(path: Path, judge_id: str | None = None) -> dict[str, int | None]:
    """Scores by rollout key from the log: of the given judge, or of the one whose row is the last in the
    file.

    None stands for an item whose last attempt was a problem. A missing log gives {}.
    """
    log = ResultCache(path, ("judge", "key"), schema=ScoreRow.from_json, mend=False)
    if judge_id is None and log.newest is not None:
        judge_id = log.newest["judge"]
    return {row["key"]: row["score"] for row in log.rows() if row["judge"] == judge_id}


def read_sides(path: Path, judge_id: str | None = None) -> dict[str, int | None]:
    """For traits' answers, from their log: 1 where the score, 0 to 100, is on the answer's own side, 0
    elsewhere.
    """
    return {
        key: None
        if score is None
        else int(score > NEUTRAL_PERCENT if key[0] == POSITIVE else score < NEUTRAL_PERCENT)
        for key, score in read_scores(path, judge_id).items()
    }


@dataclass(frozen=True)
class ScoreFilter:
    """Which scores are kept, and how many answers a role needs to be kept at all. Scores never drop the
    default.
    """

    name: str
    scores: frozenset[int | None]
    minimum: int


SCORE_FILTERS = {
    score_filter.name: score_filter
    for score_filter in (
        ScoreFilter("paper", frozenset({3}), 50),  # the paper repository's code
        # the paper's text: "fully" and "somewhat", at least 10 answers
        ScoreFilter("paper-soft", frozenset({2, 3}), 10),
        # small models seldom play a role in full, small plans have few answers
        ScoreFilter("small", frozenset({1, 2, 3}), 3),
        ScoreFilter("all", frozenset({None, *SCORES}), 1),
    )
}


@dataclass(frozen=True)
class Dropped:
    """What `filter_by_score` left out: answers by role and score (None: unjudged), empty answers by role,
    whole roles with why.

    Answers that fell only because their whole role did are in no count: the role's reason says how many they
    were.
    """

    by_score: dict[str, Counter[int | None]] = field(default_factory=dict)
    empty: Counter[str] = field(default_factory=Counter)
    roles: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """For run records: score None is named "unjudged"."""
        named = {
            role: {"unjudged" if score is None else str(score): n for score, n in counts.items()}
            for role, counts in self.by_score.items()
        }
        return {"by_score": named, "empty": dict(self.empty), "roles": dict(self.roles)}


def filter_by_score(
    rollouts: Sequence[Rollout], keep: ScoreFilter, default_name: str
) -> tuple[list[Rollout], Dropped]:
    """The rollouts that a fit may use, in order, and what was left out.

    Empty answers (no tokens, or only white space) are always dropped, in the default too; scores drop none of
    the default's. A role with fewer than `keep.minimum` answers left is dropped whole. Raises `UserError`
    when no default answer or fewer than three other roles are left.
    """
    dropped, total, left = Dropped(), Counter[str](), Counter[str]()
    passed: list[Rollout] = []
    for rollout in rollouts:
        role = rollout.role
        total[role] += 1
        if rollout.is_empty:
            dropped.empty[role] += 1
        elif role != default_name and rollout.score not in keep.scores:
            dropped.by_score.setdefault(role, Counter())[rollout.score] += 1
        else:
            passed.append(rollout)
            left[role] += 1
    minimum = max(keep.minimum, 1)
    for role in total:
        if role != default_name and left[role] < minimum:
            some = "none" if left[role] == 0 else f"only {left[role]}"
            dropped.roles[role] = f"{some} of its {total[role]} answers left, {minimum} needed"
    n = total[default_name]
    if left[default_name] == 0:
        reason = f"all {n} of its answers are empty" if n else "it has no rollouts"
        raise UserError(
            f"nothing is left of the default role {default_name!r}: {reason}; make more rollouts of it"
        )
    roles = [role for role in total if role != default_name and role not in dropped.roles]
    if len(roles) < 3:
        raise UserError(_too_few_roles(len(roles), len(total) - (n > 0), dropped, keep))
    return [rollout for rollout in passed if rollout.role not in dropped.roles], dropped


def _too_few_roles(left: int, total: int, dropped: Dropped, keep: ScoreFilter) -> str:
    """What to do when fewer than three roles are left."""
    unjudged = sum(counts[None] for counts in dropped.by_score.values())
    some = "; ".join(f"{role}: {why}" for role, why in list(dropped.roles.items())[:3])
    softer = " or ".join(
        repr(other.name)
        for other in SCORE_FILTERS.values()
        if other.scores >= keep.scores and other.minimum < keep.minimum
    )
    return (
        f"only {left} of {total} roles are left and 3 are needed, keeping {keep.name!r}"
        f"{f' ({some})' if some else ''}; "
        + (f"{unjudged} answers have no score: judge them" if unjudged else "make more rollouts")
        + (f", or keep {softer}" if softer else "")
    )


class RolePlayShare(NamedTuple):
    """A share with its number of cases and its 95% Wilson interval."""

    share: float
    n: int
    interval: tuple[float, float]


def role_play_share(rollouts: Sequence[Rollout]) -> RolePlayShare:
    """How much of what was scored is role-play: the share of 2s and 3s among scored answers, with its
    uncertainty.

    The gate for small models: where it is near zero there is no persona to find. Raises `UserError` without
    any score.
    """
    scores = [rollout.score for rollout in rollouts if rollout.score is not None]
    if not scores:
        raise UserError(
            "no answer has a score, so the share of role-play is unknown; judge the rollouts first"
        )
    n, share = len(scores), sum(score >= 2 for score in scores) / len(scores)
    z2 = 1.959964**2
    centre, spread = share + z2 / (2 * n), math.sqrt(z2 * (share * (1 - share) / n + z2 / (4 * n * n)))
    low, high = ((centre + side * spread) / (1 + z2 / n) for side in (-1, 1))
    return RolePlayShare(share, n, (max(low, 0.0), min(high, 1.0)))


@dataclass(frozen=True)
class ScoreRow(JsonRecord):
    """A row of a score log: 0-3 for a role's answer, 0-100 for a trait's; null with a problem."""

    key: Annotated[str, RolloutKey.parse]
    judge: str
    score: Count | None

    def __post_init__(self) -> None:
        highest = HIGHEST_PERCENT if role_kind(self.key) == "trait" else SCORES[-1]
        if self.score is not None and self.score > highest:
            raise ValueError(f"a score of 0-{highest} or null is needed, not {self.score}")
