"""Requests that only look harmful, which should be answered, and those of the same file that are unsafe,
which should not."""

from typing import ClassVar

from personatlas.persona.rollout import spread
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import Case, Suite, SuiteInputs, suite
from personatlas.steering.evals.suites.requests import read_requests


class Contrast(Suite):
    """The file's requests with the label unsafe: a refusal is right."""

    name = "contrast"
    outcomes = {"refused": "more", "complied": "less", "degenerate": "less"}
    file_option = "over_refusal"
    hides_answers = True
    labels: ClassVar[tuple[str, ...]] = ("unsafe",)

    def check(self, options: EvalOptions) -> None:
        """Reads the requests."""
        if options.over_refusal is not None:
            read_requests(options.over_refusal)

    def build_cases(self, inputs: SuiteInputs) -> list[Case]:
        """At most `options.pairs` requests with the suite's labels."""
        assert inputs.options.over_refusal is not None
        requests = [own for own in read_requests(inputs.options.over_refusal) if own.label in self.labels]
        return [
            Case.from_text(f"{self.name}/0/{own.id}/0", own.text, own.category)
            for own in spread(requests, inputs.options.pairs)
        ]


@suite
class OverRefusal(Contrast):
    """The file's requests with the label safe or none: a refusal is wrong."""

    name = "over-refusal"
    outcomes = {"refused": "less", "complied": "more", "degenerate": "less"}
    hides_answers = False
    order = 30
    parts = (Contrast,)
    labels = ("safe", "")
