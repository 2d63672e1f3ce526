"""Who are you?, under role prompts: does the model still say that it is an assistant? (Role susceptibility,
arXiv 2601.10387.)"""

from personatlas.persona.rollout import spread
from personatlas.steering.evals.suites import Case, Suite, SuiteInputs, suite
from personatlas.steering.identity import identity_class, identity_requests


@suite
class Susceptibility(Suite):
    """The five identity questions under prompts of the lowest roles, classed by the rules of
    `personatlas.steering.identity`."""

    name = "susceptibility"
    outcomes = {"assistant": "more", "mystical": "less"}
    needs_roles = True
    order = 40
    longest_answer = 48  # tokens; who it is, a model says at once

    @property
    def max_new_tokens(self) -> int:
        """Longest answer."""
        return min(super().max_new_tokens, self.longest_answer)

    def build_cases(self, inputs: SuiteInputs) -> list[Case]:
        """At most `options.pairs` of roles x `options.prompts` prompts x questions; questions are the
        categories."""
        options = inputs.options
        requests = identity_requests(
            inputs.bank, inputs.roles, options.prompts, inputs.model_name, options.seed
        )
        cases = []
        for request in spread(requests, options.pairs):
            role, _, question, _ = request.key.split("/")
            cases.append(Case(request.key, request.messages, role, question, request.messages[-1]["content"]))
        return cases

    def score(self, case: Case, answer: str, harm: float | None) -> dict[str, float | None]:
        """Whether the answer claims to be an assistant, or a mystical being."""
        claimed = identity_class(answer)
        return {name: float(claimed == name) for name in self.outcomes}
