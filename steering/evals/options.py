"""Options of an evaluation, of lm-eval's tasks and of Inspect's: files, sizes, sampling, judge."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from personatlas.persona.errors import UserError
from personatlas.steering.evals.harm.judges import require_harm_judge

if TYPE_CHECKING:
    from personatlas.persona.sampling.sampler import Sampling


@dataclass(frozen=True)
class EvalOptions:
    """Sizes, files, sampling and judge of an evaluation."""

    requests: Path | None = None
    "harmful requests: HarmBench, AdvBench, StrongREJECT, JailbreakBench, or any CSV, JSON, JSONL or Parquet"
    column: str | None = None
    "the column of the requests, if it has another name than those of these sets"
    templates: Path | None = None
    "jailbreak templates with [INSERT PROMPT HERE] or {request}, for the suite harm"
    over_refusal: Path | None = None
    "requests that only look harmful, in XSTest's form; those labelled unsafe become the suite contrast"
    transcripts: Path | None = None
    "stored conversations, in any form that `trace` reads, that the suite drift asks again"
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
    "who judges harm: rules, a file of `harm-judge fit`, local:MODEL, or an OpenAI-compatible endpoint's URL"
    judge_model: str | None = None
    "the model to ask for at that URL"
    judge_tokens: int | None = None
    "the longest reply of that model, with its thoughts; unless given as long as it needs"
    rubric: str = "yes-no"
    "what a model that judges is asked: yes-no, or scale (refused, convincing, specific)"

    def check(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        _require_least(self, pairs=1, roles=4, prompts=1, answers=2, random=0, max_new_tokens=1)
        if not 0 < self.margin < 1:
            raise UserError(f"--margin {self.margin} is outside 0..1: it is a share")
        for option in ("column", "templates"):
            if getattr(self, option) is not None and self.requests is None and self.over_refusal is None:
                raise UserError(f"--{option} is about a file of requests: give --requests FILE with it")
        require_harm_judge(self.judge, self.judge_model, self.rubric, self.judge_tokens)
        self.sampling(self.max_new_tokens)

    def sampling(self, max_new_tokens: int) -> "Sampling":
        """The sampling of answers of at most that many tokens."""
        from personatlas.persona.sampling.sampler import Sampling

        return Sampling(max_new_tokens, self.temperature, self.top_p)


@dataclass(frozen=True)
class LmEvalOptions:
    """How to run tasks of the lm-eval harness."""

    tasks_folder: Path | None = None
    "a folder with task YAMLs of your own"
    data: list[str] | None = None
    "TASK=FILE.jsonl: rows in place of those that a built-in task would download; may be repeated"
    limit: int | None = None
    "samples per task; all unless given"
    fewshot: int | None = None
    "examples in each prompt, in place of the task's own number"
    max_new_tokens: int | None = None
    "bounds every answer; the task's own length unless given"
    raw: bool = False
    "prompts without the chat template (lm-eval's own default)"
    margin: float = 0.02
    "the largest change that counts as none, in the metric's own unit"

    def check(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        _require_least(self, limit=1, fewshot=0, max_new_tokens=1)
        if not 0 < self.margin < 1:
            raise UserError(
                f"--margin {self.margin} is outside (0, 1): the largest change that counts as none"
            )


@dataclass(frozen=True)
class InspectOptions:
    """How to run a task of Inspect."""

    limit: int | None = None
    "the first samples only; all unless given"
    epochs: int | None = None
    "times that every sample is answered; the task's own number unless given"
    max_tokens: int | None = None
    "longest answer; the task's own unless given, else 512"
    temperature: float | None = None
    "sampling temperature; the task's own unless given, else 0.7"
    seed: int | None = None
    "seed of both arms; 0 unless given"
    grader: str | None = None
    "a model in Inspect's words (openai/gpt-4o) for scorers that ask one; the baseline unless given"
    log_dir: Path | None = None
    "where Inspect writes its logs; ./logs unless given"

    def check(self) -> None:
        """Raises `UserError` for a number that is out of range."""
        _require_least(self, limit=1, epochs=1, max_tokens=1)


def _require_least(options: object, **least: int) -> None:
    for name, value in least.items():
        given = getattr(options, name)
        if given is not None and given < value:
            option = {"pairs": "limit", "max_tokens": "max-new-tokens"}.get(name, name.replace("_", "-"))
            raise UserError(f"--{option} {given} is below {value}")
