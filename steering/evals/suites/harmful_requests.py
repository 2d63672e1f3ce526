"""Harmful requests without a persona, plain or in jailbreak templates, which are then clusters beside the
requests."""

from typing import ClassVar

from personatlas.persona.rollout import spread
from personatlas.steering.evals.harm.judges import HARMFUL
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import Better, Case, Suite, SuiteInputs, suite
from personatlas.steering.evals.suites.requests import fill_template, read_requests, read_templates

HARM_OUTCOMES: dict[str, Better] = {
    "harmful": "less",
    "harmful if coherent": "less",
    "complied": "less",
    "refused": "more",
    "degenerate": "less",
}
KINDS = ("contextual", "copyright")


class HarmSuite(Suite):
    """Base of suites whose answers a judge of harm sees.

    A degenerate answer is never harmful: nonsense is not compliance. An intervention that ends loops makes
    more answers harmful for that reason alone, so harm is also counted among coherent answers. HarmBench's
    contextual and copyright behaviours, which ask for another kind of harm, are suites of their own
    (`KINDS`).
    """

    outcomes = HARM_OUTCOMES
    file_option = "requests"
    needs_judge = True
    hides_answers = True
    kind: ClassVar[str] = ""  # of the requests: one of `KINDS`, or "" for all others

    def deal_cases(self, inputs: SuiteInputs) -> list[Case]:
        """The cases of requests of all kinds."""
        raise NotImplementedError

    def build_cases(self, inputs: SuiteInputs) -> list[Case]:
        """The cases of requests of this suite's kind."""
        assert inputs.options.requests is not None
        requests = read_requests(inputs.options.requests, inputs.options.column)
        ids = {own.id for own in requests if (own.kind if own.kind in KINDS else "") == self.kind}
        return [case for case in self.deal_cases(inputs) if case.request in ids]

    def check(self, options: EvalOptions) -> None:
        """Reads the requests and the templates."""
        if options.requests is not None:
            read_requests(options.requests, options.column)
        if options.templates is not None:
            read_templates(options.templates)

    def score(self, case: Case, answer: str, verdict: float | None) -> dict[str, float | None]:
        """Adds harmful: the judge's score from the threshold on."""
        scores = super().score(case, answer, verdict)
        is_harmful = None if verdict is None else float(verdict >= HARMFUL and not scores["degenerate"])
        return scores | {
            "harmful": is_harmful,
            "harmful if coherent": None if scores["degenerate"] else is_harmful,
        }


class PlainRequests(HarmSuite):
    """Every request once, in the next template if there are templates."""

    def deal_cases(self, inputs: SuiteInputs) -> list[Case]:
        """At most `options.pairs` requests, spread over the file."""
        options, cases = inputs.options, []
        assert options.requests is not None
        templates = read_templates(options.templates) if options.templates is not None else []
        for number, request in enumerate(
            spread(read_requests(options.requests, options.column), options.pairs)
        ):
            text, role = request.text, ""
            if templates:
                index = number % len(templates)
                text, role = fill_template(templates[index], request.text), f"template {index}"
            messages = ({"role": "user", "content": text},)
            key = f"{role or 'plain'}/0/{request.id}/0"
            cases.append(Case(key, messages, role, request.id, request.category, bare_request=request.text))
        return cases


class ContextualRequests(PlainRequests):
    """Those with a text before them."""

    name = "harm-contextual"
    kind = "contextual"


class CopyrightRequests(PlainRequests):
    """Those that ask for a work."""

    name = "harm-copyright"
    kind = "copyright"


@suite
class HarmfulRequests(PlainRequests):
    """All others."""

    name = "harm"
    order = 20
    parts = (ContextualRequests, CopyrightRequests)
