"""Measures interventions on one half of the material or the other: what they gain and what they cost, each
once.

    measurements = Measurements(model, halves, Sampling(48), log=folder / "trials.jsonl")
    measurements.identity({"p50@18-23": [cap]}, "choose")   # who answers under the lowest roles say they are
    measurements.costs({"p50@18-23": [cap]}, "report")      # loss and KL on the model's own benign answers

What was measured is logged under a key of everything that decides it (the interventions' numbers, the
prompts, the texts, the sampling, the model), so an interrupted calibration resumes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from personatlas.persona.axis import Axis
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import ResultCache
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.records import FieldError, JsonObject, read_field
from personatlas.persona.rollout import Request, Rollout
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.arms import run_arms
from personatlas.steering.calibration.fit_floors import DescentOptions, Floors, fit_floors
from personatlas.steering.calibration.quantile_floors import Projections
from personatlas.steering.identity import IdentityShares, measure_identity
from personatlas.steering.loss_cost import Cost, benign_costs

COST_GROUP = 8  # arms whose costs are read and logged together: the baseline is read once for all of them


def _check_row(row: JsonObject) -> None:
    """Raises `ValueError` for a row of the log that is no measurement."""
    if "classes" in row:
        identity = IdentityShares.from_json({**row, "arm": ""})
        if len(read_field(row, "texts", tuple[str, ...])) != len(identity.classes):
            raise FieldError(": not one text for each answer", "texts")
    elif "kl_sums" in row:
        Cost.from_json(row)
    else:
        Floors.from_json(row)


@dataclass(frozen=True)
class Half:
    """Requests under role prompts, and benign answers of the model, that nothing else is measured on."""

    requests: tuple[Request, ...]
    texts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Measurements:
    """A model, the halves to measure on, and the log of what was measured."""

    model: Model
    halves: Mapping[str, Half]
    sampling: Sampling
    log: Path

    @cached_property
    def cache(self) -> ResultCache:
        """What was measured, by key."""
        return ResultCache(self.log, "key", schema=_check_row)

    def identity(self, arms: Mapping[str, Interventions], half: str) -> dict[str, IdentityShares]:
        """Who each arm's answers say that they are; an arm without interventions is the baseline."""
        requests = self.halves[half].requests
        keys = {name: self._identity_key(interventions, half) for name, interventions in arms.items()}
        missing = {name: arm for name, arm in arms.items() if keys[name] not in self.cache}
        with progress(f"answering ({half})", len(missing) * len(requests), quiet=not missing) as advance:
            for answers in run_arms(self.model, requests, missing, self.sampling, advance):
                row = {**measure_identity(answers, requests).to_json(), "texts": list(answers.texts)}
                self.cache.add([{"key": keys[answers.name], "half": half, **row}])
        own = {"keys": [request.key for request in requests]}  # not in rows of earlier versions
        return {name: IdentityShares.from_json(self.cache[keys[name]] | own | {"arm": name}) for name in arms}

    def answers(self, interventions: Interventions, half: str) -> list[str]:
        """The answers that `identity` measured."""
        return list(self.cache[self._identity_key(interventions, half)]["texts"])

    def costs(self, arms: Mapping[str, Interventions], half: str) -> dict[str, Cost]:
        """What the arms, each with an intervention, cost on the half's benign texts."""
        texts = self.halves[half].texts
        content = [[text.key, text.prompt_ids, text.answer_ids] for text in texts]
        keys = {name: self._key("cost", interventions, content) for name, interventions in arms.items()}
        missing = [name for name in arms if keys[name] not in self.cache]
        with progress(f"reading ({half})", len(missing) * len(texts), quiet=not missing) as advance:
            for first in range(0, len(missing), COST_GROUP):
                group = {name: arms[name] for name in missing[first : first + COST_GROUP]}
                costs = benign_costs(self.model, texts, group, advance)
                self.cache.add(
                    {"key": keys[name], "half": half, **cost.to_json()} for name, cost in costs.items()
                )
        return {name: Cost.from_json(self.cache[keys[name]]) for name in arms}

    def floors(
        self,
        axis: Axis,
        layers: Sequence[int],
        projections: Projections,
        target: Sequence[Rollout],
        options: DescentOptions,
        half: str,
    ) -> Floors:
        """Floors fitted by gradient on the half's benign texts and the target texts."""
        benign = self.halves[half].texts
        content = [[[text.prompt_ids, text.answer_ids] for text in texts] for texts in (target, benign)]
        start = projections.cap(axis, layers, 0.5)
        key = self._key("floors", [start], [content, asdict(options)])
        if key not in self.cache:
            with progress(f"fitting floors ({half})", options.steps) as advance:
                floors = fit_floors(self.model, axis, layers, projections, target, benign, options, advance)
            self.cache.add([{"key": key, "half": half, **floors.to_json()}])
        return Floors.from_json(self.cache[key])

    def _identity_key(self, interventions: Interventions, half: str) -> str:
        requests = [asdict(request) for request in self.halves[half].requests]
        return self._key("gain", interventions, (requests, asdict(self.sampling)))

    def _key(self, kind: str, interventions: Interventions, content: object) -> str:
        parts = [kind, interventions_digest(interventions), content, self._model]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]

    @cached_property
    def _model(self) -> dict[str, Any]:
        return {**self.model.describe(), "dtype": str(self.model.dtype), "device": self.model.device.type}
