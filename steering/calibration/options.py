"""What a calibration searches and measures."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from personatlas.persona.errors import UserError

if TYPE_CHECKING:  # it needs torch, which --help does not
    from personatlas.persona.sampling.sampler import Sampling

SIZES = {  # of a search, quick or not
    False: {"roles": 50, "prompts": 2, "answers": 60, "steps": 120},
    True: {"roles": 20, "prompts": 1, "answers": 60, "steps": 30},
}
LEAST = {"roles": 4, "prompts": 1, "answers": 2, "steps": 0}


@dataclass(frozen=True)
class CalibrationOptions:
    """What to search and measure."""

    windows: str = ""
    "layer windows with commas between, such as 14-25,18-23; 12 over the upper half unless given (quick: 3)"
    levels: str = "0.1,0.25,0.5,0.75"
    "levels to try, quantiles from 0 to 1"
    population: str = "default"
    "whose answers the floors are quantiles of: default, roles or pooled; several with commas between"
    budget: float = 0.05
    "the most that a cap may cost: loss per token on benign answers more than the baseline's, 0.05 is 5%"
    quick: bool = False
    "for a CPU: three windows, and fewer of what has a number for it in brackets"
    steps: int | None = None
    "steps that fit a floor for each layer, prompt and answer by gradient: 120 (quick: 30); 0 for none"
    roles: int | None = None
    "the lowest roles on the axis, half to choose on and half to report on: 50 (quick: 20)"
    prompts: int | None = None
    "prompts a role: 2 (quick: 1)"
    answers: int | None = None
    "benign answers, half and half: 60"
    max_new_tokens: int = 48
    "longest answer"
    temperature: float = 0.7
    "sampling temperature"
    seed: int = 0
    "all arms sample with it"

    def parse(self) -> "SearchSettings":
        """The options as numbers, with their defaults filled in. Raises `UserError` for those that cannot
        be.
        """
        from personatlas.persona.sampling.sampler import Sampling

        try:
            levels = tuple(float(part) for part in self.levels.split(","))
        except ValueError:
            raise UserError(f"--levels {self.levels!r} is not numbers with commas between") from None
        for level in levels:
            if not 0 <= level <= 1:
                raise UserError(f"--levels: {level} is outside 0..1: a level is a quantile")
        given = {"roles": self.roles, "prompts": self.prompts, "answers": self.answers, "steps": self.steps}
        defaults = SIZES[self.quick]
        sizes = {name: defaults[name] if size is None else size for name, size in given.items()}
        for name, least in LEAST.items():
            if sizes[name] < least:
                raise UserError(f"--{name} {sizes[name]} is below {least}")
        if not 0 < self.budget < 10:
            raise UserError(f"--budget {self.budget} is not between 0 and 10: 0.05 is 5% more loss")
        return SearchSettings(
            tuple(_parse_window(part) for part in self.windows.split(",") if part.strip()),
            levels,
            tuple(part.strip() for part in self.population.split(",")),
            self.budget,
            **sizes,
            seed=self.seed,
            sampling=Sampling(self.max_new_tokens, self.temperature),
            quick=self.quick,
        )


def _parse_window(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)-(\d+)\s*", text)
    if match is None or int(match[1]) > int(match[2]):
        raise UserError(f"--windows {text!r} is not FIRST-LAST, such as 18-23")
    return int(match[1]), int(match[2])


@dataclass(frozen=True)
class SearchSettings:
    """`CalibrationOptions`, parsed. Empty windows: those of `grid_search.default_windows`."""

    windows: tuple[tuple[int, int], ...]
    levels: tuple[float, ...]
    populations: tuple[str, ...]
    budget: float
    roles: int
    prompts: int
    answers: int
    steps: int
    seed: int
    sampling: "Sampling"
    quick: bool
