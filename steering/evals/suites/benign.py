"""Everyday questions to the default role: an intervention should change nothing here. Loss and KL are
measured on the answers."""

from personatlas.persona.rollout import role_messages, spread
from personatlas.steering.evals.suites import Case, Suite, SuiteInputs, suite


@suite
class Benign(Suite):
    """The bank's questions under prompts of the default role; counted are refusals and degenerate answers."""

    name = "benign"
    outcomes = {"refused": "less", "degenerate": "less"}
    order = 60

    def build_cases(self, inputs: SuiteInputs) -> list[Case]:
        """`options.answers` questions spread over the bank, each under the next prompt of the default
        role."""
        role, cases = inputs.bank.default, []
        for number, question in enumerate(spread(inputs.bank.questions, inputs.options.answers)):
            prompt = number % len(role.prompts)
            messages = role_messages(role, prompt, question.question, inputs.model_name)
            cases.append(Case(f"{role.name}/{prompt}/{question.id}/0", messages, request=question.id))
        return cases
