"""Which cap? A search over layer windows and levels for the most gain at a given cost, on one half of the material.

1. Every window at every level is read on benign text (cheap). Cost rises with the level, so for each window the level at
   which the whole budget is spent lies between two of them.
2. Each window is tried at that level under role prompts (dear): gain is the share of answers that call themselves an
   assistant.
3. The best one's neighbours are tried in the same way: one layer more or less at either end, levels that rise or fall over
   the layers, and answers alone in place of both phases.
4. Floors that were fitted by gradient (`personatlas.steering.calibration.fit_floors`) are tried in the same way, their shift being the level.

The winner has the highest gain of all that cost no more than the budget.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap
from personatlas.steering.calibration.measure import Trial
from personatlas.steering.identity import IdentityShares
from personatlas.steering.loss_cost import Cost

TILT = 0.2  # how far the first and the last layer's level lie from the middle one in a tilted candidate


@dataclass(frozen=True)
class Candidate:
    """A cap that could be: a window of layers, the level of its middle, how far levels rise over it, whose answers, when.

    With `fitted`, floors come from a descent and `level` is how far all of them are shifted, in spreads of their layers.
    """

    first: int
    last: int
    level: float
    tilt: float = 0.0
    population: str = "default"
    phase: str = "both"
    fitted: bool = False

    @property
    def layers(self) -> tuple[int, ...]:
        """The window."""
        return tuple(range(self.first, self.last + 1))

    @property
    def levels(self) -> tuple[float, ...]:
        """A level for each layer, within 0..1."""
        n = len(self.layers)
        return tuple(
            min(max(self.level + self.tilt * (2 * i / (n - 1) - 1 if n > 1 else 0.0), 0.0), 1.0)
            for i in range(n)
        )

    @property
    def name(self) -> str:
        """Such as "p47@18-23", "roles:p90@18-23", "p30..p70@18-23", "p50@18-23 (answer)" or "fitted+0.2@6-27"."""
        if self.fitted:
            return f"fitted{self.level:+.3g}@{self.first}-{self.last}"
        low, high = self.levels[0], self.levels[-1]
        level = f"p{100 * low:.3g}" + (f"..p{100 * high:.3g}" if self.tilt else "")
        whose = "" if self.population == "default" else f"{self.population}:"
        return f"{whose}{level}@{self.first}-{self.last}" + (
            "" if self.phase == "both" else f" ({self.phase})"
        )


@dataclass(frozen=True)
class Tried:
    """A candidate with what it cost and, where that was tried, what it gained."""

    candidate: Candidate
    cost: Cost
    gain: IdentityShares | None = None

    @property
    def share(self) -> float:
        """Share of answers that call themselves an assistant; -1 where that was not tried."""
        return -1.0 if self.gain is None else self.gain.shares["assistant"]


def windows_of(n_layers: int, quick: bool = False) -> list[tuple[int, int]]:
    """Windows to begin with: three widths (an eighth, a fifth and two fifths of the depth) from 0.4 of it on; when it has to
    be quick, one of each width from the middle on."""
    found = []
    for share in (0.13, 0.2, 0.4):
        width = max(round(share * n_layers), 1)
        for start in (0.5,) if quick else (0.4, 0.5, 0.6, 0.7):
            first = round(start * n_layers)
            if first + width <= max(round(0.96 * n_layers), 1):
                found.append((first, first + width - 1))
    return found or [(0, n_layers - 1)]


class Sweep:
    """The search; `make` turns a candidate into a cap."""

    def __init__(self, trial: Trial, make: Callable[[Candidate], Cap], half: str, budget: float) -> None:
        self.trial, self.make, self.half, self.budget = trial, make, half, budget
        self.tried: dict[Candidate, Tried] = {}

    def run(
        self,
        windows: Sequence[tuple[int, int]],
        levels: Sequence[float],
        populations: Sequence[str],
        *,
        neighbours: bool = True,
    ) -> Tried:
        """The best candidate; everything that was tried on the way is in `tried`. `UserError` when none is affordable."""
        grid = [
            Candidate(first, last, level, population=population)
            for population in populations
            for first, last in windows
            for level in sorted(set(levels))
        ]
        best = self.more(grid)
        if not neighbours:
            return best
        around = [
            replace(shape, level=level)
            for shape in _neighbours(best.candidate, self.trial.model.n_layers)
            for level in sorted({*levels, best.candidate.level})
        ]
        return self.more(around)

    def more(self, candidates: Sequence[Candidate]) -> Tried:
        """Try each shape among the candidates at its highest affordable level; the best of all so far."""
        self._read(candidates)
        self._answer(self._at_budget(candidates))
        return self._best()

    def trace(self, best: Candidate) -> None:
        """Try the other levels of a candidate's shape too, for the picture of what more or less would buy."""
        self._answer([one for one in self.tried if replace(one, level=best.level) == best])

    def _read(self, candidates: Sequence[Candidate]) -> None:
        new = {candidate.name: candidate for candidate in candidates if candidate not in self.tried}
        costs = self.trial.costs({name: [self.make(candidate)] for name, candidate in new.items()}, self.half)
        for name, cost in costs.items():
            self.tried[new[name]] = Tried(new[name], cost)

    def _answer(self, candidates: Sequence[Candidate]) -> None:
        new = {candidate.name: candidate for candidate in candidates if self.tried[candidate].gain is None}
        gains = self.trial.gains({name: [self.make(candidate)] for name, candidate in new.items()}, self.half)
        for name, gain in gains.items():
            self.tried[new[name]] = replace(self.tried[new[name]], gain=gain)

    def _at_budget(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """For each shape the highest affordable level: of those given, or between the last that is and the first that is not."""
        found, between = [], {}
        for shape in dict.fromkeys(replace(candidate, level=0.0) for candidate in candidates):
            own = sorted(
                (self.tried[c] for c in candidates if replace(c, level=0.0) == shape),
                key=lambda t: t.candidate.level,
            )
            cheap = [one for one in own if one.cost.more <= self.budget]
            if not cheap:
                continue
            found.append(cheap[-1].candidate)
            dear = [
                one
                for one in own
                if one.cost.more > self.budget and one.candidate.level > cheap[-1].candidate.level
            ]
            if dear:
                between[shape] = cheap[-1], dear[0]
        for _ in range(2):  # twice: cost is not straight between two levels
            middle = {shape: _between(low, high, self.budget) for shape, (low, high) in between.items()}
            self._read(list(middle.values()))
            for shape, candidate in middle.items():
                low, high = between[shape]
                now = self.tried[candidate]
                between[shape] = (now, high) if now.cost.more <= self.budget else (low, now)
        closest = {replace(low.candidate, level=0.0): low.candidate for low, _ in between.values()}
        return [closest.get(replace(candidate, level=0.0), candidate) for candidate in found]

    def _best(self) -> Tried:
        good = [one for one in self.tried.values() if one.gain is not None and one.cost.more <= self.budget]
        if not good:
            least = min(self.tried.values(), key=lambda one: one.cost.more)
            raise UserError(
                f"no cap costs at most {self.budget:.1%} more loss; the cheapest, {least.candidate.name}, costs "
                f"{least.cost.more:.1%}: give lower --levels, narrower --windows or a larger --budget"
            )
        return max(good, key=lambda one: (one.share, -one.cost.more))


def _between(low: Tried, high: Tried, budget: float) -> Candidate:
    """The level at which the budget is spent, on a straight line between two, a little to the cheap side."""
    rise = (budget - low.cost.more) / max(high.cost.more - low.cost.more, 1e-12)
    level = low.candidate.level + 0.95 * rise * (high.candidate.level - low.candidate.level)
    return replace(low.candidate, level=round(level, 3))


def _neighbours(best: Candidate, n_layers: int) -> list[Candidate]:
    moved = [(-1, 0), (1, 0), (0, -1), (0, 1), (-1, -1), (1, 1), (-2, 0), (0, 2)]
    windows = [(best.first + a, best.last + b) for a, b in moved]
    found = [
        replace(best, first=first, last=last) for first, last in windows if 0 <= first <= last < n_layers
    ]
    tilts = [replace(best, tilt=tilt) for tilt in (-TILT, TILT)] if len(best.layers) > 1 else []
    return [*found, *tilts, replace(best, phase="answer")]
