"""Measuring interventions on one half of the material or the other: what they buy and what they cost, each once.

    trial = Trial(model, chat, halves, Sampling(48), log=folder / "trials.jsonl")
    trial.gains({"p50@18-23": [cap]}, "choose")      # who answers under the lowest roles say they are
    trial.costs({"p50@18-23": [cap]}, "report")      # loss and KL on the model's own benign answers

What was measured is kept in an append-only log under a key of everything that decides it (the plan's numbers, the prompts, the
texts, the sampling, the model), so an interrupted calibration goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from personatlas.persona.axis import Axis
from personatlas.persona.interventions import Interventions, interventions_digest
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.progress import progress
from personatlas.persona.rollout import Request, Rollout
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.arms import run_arms
from personatlas.steering.calibration.fit_floors import Descent, Floors, fitted
from personatlas.steering.calibration.quantile_floors import Projections
from personatlas.steering.identity import IdentityShares, measure_identity
from personatlas.steering.loss_cost import Cost, benign_costs

AT_ONCE = (
    8  # arms whose costs are read together and kept together: the model as it is is read once for all of them
)


@dataclass(frozen=True)
class Half:
    """Requests under role prompts and benign answers of the model that nothing else is measured on."""

    requests: tuple[Request, ...]
    texts: tuple[Rollout, ...]


@dataclass(frozen=True)
class Trial:
    """A model and the halves to measure on; `log` is where results are kept."""

    model: Model
    chat: ChatFormat
    halves: Mapping[str, Half]
    sampling: Sampling
    log: Path

    @cached_property
    def _model(self) -> dict[str, Any]:
        return {**self.model.describe(), "dtype": str(self.model.dtype), "device": self.model.device.type}

    def gains(self, arms: Mapping[str, Interventions], half: str) -> dict[str, IdentityShares]:
        """Who the answers say that they are, by arm; an arm without interventions is the model as it is."""
        requests = self.halves[half].requests
        asked = [asdict(request) for request in requests], asdict(self.sampling)
        keys = {name: self._key("gain", plan, asked) for name, plan in arms.items()}
        known = self._known()
        waiting = {name: plan for name, plan in arms.items() if keys[name] not in known}
        with progress(f"answering ({half})", len(waiting) * len(requests), quiet=not waiting) as advance:
            for arm in run_arms(self.model, self.chat, requests, waiting, self.sampling, advance):
                found = measure_identity(arm, requests)
                known[keys[arm.name]] = row = {**found.to_json(), "texts": list(arm.texts)}
                append_lines(self.log, [{"key": keys[arm.name], "half": half, **row}])
        return {name: IdentityShares.from_json(known[keys[name]] | {"arm": name}) for name in arms}

    def texts(self, plan: Interventions, half: str) -> list[str]:
        """The answers that `gains` measured."""
        asked = [asdict(request) for request in self.halves[half].requests], asdict(self.sampling)
        return list(self._known()[self._key("gain", plan, asked)]["texts"])

    def costs(self, arms: Mapping[str, Interventions], half: str) -> dict[str, Cost]:
        """What the arms, each with an intervention, cost on the half's benign texts."""
        texts = self.halves[half].texts
        asked = [[text.key, text.prompt_ids, text.answer_ids] for text in texts]
        keys = {name: self._key("cost", plan, asked) for name, plan in arms.items()}
        known = self._known()
        waiting = {name: plan for name, plan in arms.items() if keys[name] not in known}
        with progress(f"reading ({half})", len(waiting) * len(texts), quiet=not waiting) as advance:
            for first in range(0, len(waiting), AT_ONCE):
                group = dict(list(waiting.items())[first : first + AT_ONCE])
                found = benign_costs(self.model, texts, group, advance)
                rows = {keys[name]: cost.to_json() for name, cost in found.items()}
                append_lines(self.log, [{"key": key, "half": half, **row} for key, row in rows.items()])
                known |= rows
        return {name: Cost.from_json(known[keys[name]]) for name in arms}

    def floors(
        self,
        axis: Axis,
        layers: Sequence[int],
        places: Projections,
        wanted: Sequence[Rollout],
        how: Descent,
        half: str,
    ) -> Floors:
        """Floors fitted by gradient on the half's benign texts and the wanted ones."""
        benign = self.halves[half].texts
        begin = places.cap(axis, layers, 0.5)
        asked = [[[text.prompt_ids, text.answer_ids] for text in texts] for texts in (wanted, benign)]
        key = self._key("floors", [begin], [asked, asdict(how)])
        known = self._known()
        if key not in known:
            with progress(f"fitting floors ({half})", how.steps) as advance:
                known[key] = fitted(self.model, axis, layers, places, wanted, benign, how, advance).to_json()
            append_lines(self.log, [{"key": key, "half": half, **known[key]}])
        return Floors.from_json(known[key])

    def _known(self) -> dict[str, dict[str, Any]]:
        return {row["key"]: row for row in read_lines(self.log)}

    def _key(self, what: str, plan: Interventions, asked: Any) -> str:
        content = json.dumps(
            [what, interventions_digest(plan), asked, self._model], sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def halved(items: Sequence[Any], group: Callable[[Any], str]) -> tuple[list[Any], list[Any]]:
    """Two halves in which every group lies whole: every other group of those in order of first appearance."""
    groups = list(dict.fromkeys(group(item) for item in items))
    first = set(groups[::2])
    return [item for item in items if group(item) in first], [
        item for item in items if group(item) not in first
    ]
