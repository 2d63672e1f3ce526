"""Options of an evaluation: which files its suites are made of, how much is asked, how answers are sampled and judged."""

from dataclasses import dataclass
from pathlib import Path

from personatlas.persona.errors import UserError
from personatlas.persona.sampling.sampler import Sampling


@dataclass(frozen=True)
class EvalOptions:
    """Sizes, files, sampling and judge of an evaluation."""

    requests: Path | None = None
    "harmful requests: HarmBench, AdvBench, StrongREJECT, JailbreakBench, or any CSV, JSON or JSONL with a column for them"
    column: str | None = None
    "the column of the requests, if it has another name than those of these sets"
    templates: Path | None = None
    "jailbreak templates with [INSERT PROMPT HERE] or {request}, for the suite harm"
    over_refusal: Path | None = None
    "requests that only look harmful, in XSTest's form; those labelled unsafe become the suite contrast"
    transcripts: Path | None = None
    "stored conversations (JSON or JSONL, OpenAI or ShareGPT form) whose user turns the suite drift asks again"
    pairs: int = 300
    "most cases per suite; benign has --answers"
    roles: int = 50
    "number of roles, the lowest on the axis"
    tag: list[str] | None = None
    "only roles with this tag; may be repeated"
    prompts: int = 2
    "prompts per role in susceptibility"
    answers: int = 60
    "everyday questions, on which loss and KL are measured"
    text: Path | None = None
    "a text file, for bits per byte"
    text_bytes: int = 200_000
    "most bytes of it"
    tasks: str | None = None
    "tasks of the lm-eval harness with commas between, such as ifeval,gsm8k"
    data: list[str] | None = None
    "TASK=FILE.jsonl: rows of a task from a file, without a download; may be repeated"
    task_limit: int | None = None
    "most samples per task"
    task_tokens: int | None = None
    "longest answer in a task; the task's own unless given"
    random: int = 1
    "random caps that fire as often as the first cap, as controls"
    max_new_tokens: int = 128
    "longest answer; 48 in susceptibility"
    temperature: float = 0.7
    "sampling temperature; 0 takes the likeliest token"
    top_p: float = 0.9
    "nucleus mass"
    seed: int = 0
    "seed of all arms"
    margin: float = 0.05
    "a change within this much of zero is no loss"
    judge: str = "rules"
    "who judges harm: rules, a file of `harm-judge fit`, local:MODEL, or the URL of an OpenAI-compatible endpoint"
    judge_model: str | None = None
    "the model to ask for at that URL"
    rubric: str = "yes-no"
    "what a model that judges is asked: yes-no, or scale (refused, convincing, specific)"

    def check(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        least = {"pairs": 1, "roles": 4, "prompts": 1, "answers": 2, "random": 0, "max_new_tokens": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                option = "limit" if name == "pairs" else name.replace("_", "-")
                raise UserError(f"--{option} {getattr(self, name)} is below {value}")
        if not 0 < self.margin < 1:
            raise UserError(f"--margin {self.margin} is outside 0..1: it is a share")
        self.sampling(self.max_new_tokens)

    def sampling(self, max_new_tokens: int) -> Sampling:
        """The sampling of answers of at most that many tokens."""
        return Sampling(max_new_tokens, self.temperature, self.top_p)
