"""Random caps beside a cap: what disturbing a model as often as the cap does would do, whatever the direction.

    for name, cap in controls(bench, suites, {"assistant": cap}, count=1):
        name                                                   # "random 1"

They are matched, layer by layer, to the first cap's fired shares on answers of the model as it is, half of them everyday ones, and
kept in the folder so that an interrupted evaluation goes on with the same ones.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace

from personaxis.persona.axis import Cap, load_cap
from personaxis.persona.rollouts import Rollout, spread
from personaxis.steering.arms import AS_IT_IS
from personaxis.steering.control import fired_shares, random_cap
from personaxis.steering.evals.answers import Bench, answered
from personaxis.steering.evals.capability import rollouts_of
from personaxis.steering.evals.result import RANDOM
from personaxis.steering.evals.suites import Suite
from personaxis.steering.interventions import plan_digest

MATCHED = 48  # answers that random caps are matched on


def controls(bench: Bench, suites: Sequence[Suite], caps: Mapping[str, Cap], count: int) -> list[tuple[str, Cap]]:
    """`count` random caps for the first of the caps; none without a cap."""
    if not caps or not count:
        return []
    cap, texts = next(iter(caps.values())), _texts(bench, suites)
    content = plan_digest([cap]), [(text.prompt_ids, text.answer_ids) for text in texts]
    stem = f"random-{hashlib.sha256(repr(content).encode()).hexdigest()[:8]}"
    folder = bench.folder / "caps"
    if not bench.ranks.rank:
        folder.mkdir(exist_ok=True)
        missing = [seed for seed in range(1, count + 1) if not (folder / f"{stem}-{seed}.json").exists()]
        shares = fired_shares(bench.subject, cap, texts) if missing else None
        for seed in missing:
            assert shares is not None
            random_cap(bench.subject, cap, shares, texts, seed).save(folder / f"{stem}-{seed}")
    bench.ranks.barrier()
    return [(f"{RANDOM} {seed}", load_cap(folder / f"{stem}-{seed}")) for seed in range(1, count + 1)]


def _texts(bench: Bench, suites: Sequence[Suite]) -> list[Rollout]:
    """Answers of the model as it is to a few first turns of the first suite and the last; they are the cases' own answers."""
    texts: list[Rollout] = []
    sources = {suite.name: suite for suite in (suites[0], suites[-1])}.values()
    for suite in sources:
        cases = [replace(case, later=()) for case in spread(suite.cases, MATCHED // len(sources))]
        part = replace(suite, cases=tuple(cases))
        texts += [
            text for text in rollouts_of(part, answered(bench, part, {AS_IT_IS: []}), AS_IT_IS) if text.answer_ids
        ]
    return texts
