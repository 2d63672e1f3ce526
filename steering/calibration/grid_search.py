"""The search for a cap over layer windows and levels, for the most gain within a loss budget, on one half of
the material.

1. Every window at every level is read on benign text (cheap). Cost rises with the level, so for each window
the level at
   which the whole budget is spent lies between two of them.
2. Each window is tried at that level under role prompts (dear): gain is the share of answers that call
themselves an
   assistant.
3. Floors that were fitted by gradient (`calibration.fit_floors`) are tried in the same way, their shift being
the level.

The winner has the highest gain of all that cost no more than the budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.steering.calibration.measure import Measurements
from personatlas.steering.identity import IdentityShares
from personatlas.steering.loss_cost import Cost


@dataclass(frozen=True)
class Candidate:
    """A cap that could be: a window of layers, a level, and whose answers it is a quantile of.

    With `fitted`, floors come from a descent and `level` is how far all of them are shifted, in spreads of
    their layers.
    """

    first: int
    last: int
    level: float
    population: str = "default"
    fitted: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The window."""
        return tuple(range(self.first, self.last + 1))

    @property
    def shape(self) -> "Candidate":
        """The same for all levels."""
        return replace(self, level=0.0)

    @property
    def name(self) -> str:
        """Such as "p47@18-23", "roles:p90@18-23" or "fitted+0.2@6-27"."""
        if self.fitted:
            return f"fitted{self.level:+.3g}@{self.first}-{self.last}"
        population = "" if self.population == "default" else f"{self.population}:"
        return f"{population}p{100 * self.level:.3g}@{self.first}-{self.last}"


@dataclass(frozen=True)
class Trial:
    """A candidate with what it cost and, where that was tried, what it gained."""

    candidate: Candidate
    cost: Cost
    gain: IdentityShares | None = None

    @property
    def share(self) -> float:
        """Share of answers that call themselves an assistant; -1 where that was not tried."""
        return -1.0 if self.gain is None else self.gain.shares["assistant"]


def default_windows(n_layers: int, quick: bool = False) -> list[tuple[int, int]]:
    """Windows of three widths (an eighth, a fifth and two fifths of the depth) from 0.4 of it on; quick:
    three of them.
    """
    windows = []
    for share in (0.13, 0.2, 0.4):
        width = max(round(share * n_layers), 1)
        for start in (0.5,) if quick else (0.4, 0.5, 0.6, 0.7):
            first = round(start * n_layers)
            if first + width <= max(round(0.96 * n_layers), 1):
                windows.append((first, first + width - 1))
    return windows or [(0, n_layers - 1)]


class GridSearch:
    """The search; `make` turns a candidate into a cap. `trials` has everything that was tried."""

    def __init__(
        self, measurements: Measurements, make: Callable[[Candidate], Cap], half: str, budget: float
    ) -> None:
        self.measurements, self.make, self.half, self.budget = measurements, make, half, budget
        self.trials: dict[Candidate, Trial] = {}

    def search(self, candidates: Sequence[Candidate]) -> Trial:
        """Tries each shape among the candidates at its highest affordable level; returns the best of all so
        far.

        Raises `UserError` when none is affordable.
        """
        self._read(candidates)
        self._answer(self._at_budget(candidates))
        affordable = [trial for trial in self.trials.values() if trial.cost.more <= self.budget]
        tried = [trial for trial in affordable if trial.gain is not None]
        if not tried:
            cheapest = min(self.trials.values(), key=lambda trial: trial.cost.more)
            raise UserError(
                f"no cap costs at most {self.budget:.1%} more loss; the cheapest, {cheapest.candidate.name}, "
                f"costs {cheapest.cost.more:.1%}: give lower --levels, narrower --windows or more --budget"
            )
        return max(tried, key=lambda trial: (trial.share, -trial.cost.more))

    def try_levels(self, candidate: Candidate) -> None:
        """Tries the other levels of a candidate's shape too, for the figure of what more or less would
        gain.
        """
        self._answer([other for other in self.trials if other.shape == candidate.shape])

    def _read(self, candidates: Sequence[Candidate]) -> None:
        new = {candidate.name: candidate for candidate in candidates if candidate not in self.trials}
        arms = {name: [self.make(candidate)] for name, candidate in new.items()}
        for name, cost in self.measurements.costs(arms, self.half).items():
            self.trials[new[name]] = Trial(new[name], cost)

    def _answer(self, candidates: Sequence[Candidate]) -> None:
        new = {candidate.name: candidate for candidate in candidates if self.trials[candidate].gain is None}
        arms = {name: [self.make(candidate)] for name, candidate in new.items()}
        for name, gain in self.measurements.identity(arms, self.half).items():
            self.trials[new[name]] = replace(self.trials[new[name]], gain=gain)

    def _at_budget(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """For each shape the highest affordable level, of those given or between the last affordable and the
        first not.
        """
        best: dict[Candidate, Trial] = {}
        dearer: dict[Candidate, Trial] = {}
        for shape in dict.fromkeys(candidate.shape for candidate in candidates):
            own = [self.trials[candidate] for candidate in candidates if candidate.shape == shape]
            own.sort(key=lambda trial: trial.candidate.level)
            cheap = [trial for trial in own if trial.cost.more <= self.budget]
            if not cheap:
                continue
            best[shape] = cheap[-1]
            level = cheap[-1].candidate.level
            dear = [trial for trial in own if trial.cost.more > self.budget and trial.candidate.level > level]
            if dear:
                dearer[shape] = dear[0]
        for _ in range(2):  # twice: cost is not straight between two levels
            middle = {shape: self._between(best[shape], dear) for shape, dear in dearer.items()}
            self._read(list(middle.values()))
            for shape, candidate in middle.items():
                trial = self.trials[candidate]
                (best if trial.cost.more <= self.budget else dearer)[shape] = trial
        return [trial.candidate for trial in best.values()]

    def _between(self, low: Trial, high: Trial) -> Candidate:
        """The level at which the budget is spent, on a straight line between two, a little to the cheap
        side.
        """
        rise = (self.budget - low.cost.more) / max(high.cost.more - low.cost.more, 1e-12)
        level = low.candidate.level + 0.95 * rise * (high.candidate.level - low.candidate.level)
        return replace(low.candidate, level=round(level, 3))
