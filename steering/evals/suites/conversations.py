"""Conversations of several turns: the user turns of stored conversations are asked again, one after the
other.

Every arm answers into its own conversation. The file holds conversations as `trace` reads them;
without one, the packaged scripts are asked, except those of everyday help, which are there to calibrate
alarms and would outnumber the rest.
"""

from personatlas.persona.formats import read_conversations
from personatlas.persona.rollout import spread
from personatlas.steering.conversations.scripts import EVERYDAY, SCRIPTS
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.evals.suites import Case, Suite, SuiteInputs, suite


@suite
class Drift(Suite):
    """Stored users again; counted are refusals and degenerate answers, and the projection is followed by
    turn."""

    name = "drift"
    outcomes = {"refused": "less", "degenerate": "less"}
    file_option = "transcripts"
    needs_file = False
    order = 50

    def check(self, options: EvalOptions) -> None:
        """Reads the conversations."""
        read_conversations(options.transcripts or SCRIPTS)

    def build_cases(self, inputs: SuiteInputs) -> list[Case]:
        """At most `options.pairs` conversations: system prompt, first user turn, and the later ones."""
        transcripts, cases = inputs.options.transcripts, []
        conversations = read_conversations(transcripts or SCRIPTS)
        if transcripts is None:
            conversations = [own for own in conversations if own.domain != EVERYDAY]
        for name, messages, domain in spread(conversations, inputs.options.pairs):
            system = [dict(message) for message in messages[:1] if message["role"] == "system"]
            first, *later = [message["content"] for message in messages if message["role"] == "user"]
            opening = (*system, {"role": "user", "content": first})
            cases.append(
                Case(f"{name}/0/drift/0", opening, request=name, category=domain, later=tuple(later))
            )
        return cases
