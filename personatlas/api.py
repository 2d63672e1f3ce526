"""The functions of the front door: thin, typed, one signature for each job.

    import personatlas as pa

    model = pa.load("smollm2-135m", device="cpu") run = pa.compute_axis(model, out="runs/demo", plan="demo")
    out = pa.generate(model, messages, steer=[run.axis.cap("p50@18-23")]) result = pa.evaluate(model,
    run.axis, arms={"cap": [run.axis.cap("assistant")]}, suites=["benign"], out="runs/eval")

`model`, `axis`, `steer` and `out` mean the same everywhere: a loaded `Model` (or its name), an `Axis`,
interventions, and the folder that is written. Long jobs resume when they are called again with the same
folder. Whatever a user can do wrong is a `UserError` of one line.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch

from personatlas.persona import axis as axes
from personatlas.persona.axis import Axis, PersonaSpace
from personatlas.persona.errors import UserError
from personatlas.persona.formats import Message
from personatlas.persona.interventions import Intervention
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import FitOptions, JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.roles import bank as banks
from personatlas.persona.roles.bank import Bank
from personatlas.persona.rollout import Rollout, read_rollouts
from personatlas.persona.runs import own_axis, resolve_axis
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.calibration.options import CalibrationOptions
from personatlas.steering.evals.options import EvalOptions
from personatlas.steering.serve.options import CapacityOptions, ServeOptions
from personatlas.training.options import ChatDataOptions, CorpusOptions, FinetuneOptions, PretrainOptions

if TYPE_CHECKING:  # what a job needs is imported when it runs: some of it takes seconds
    from personatlas.analysis.fit.result import FitResult
    from personatlas.steering.calibration.result import CalibrationResult
    from personatlas.steering.evals.result import EvalResult
    from personatlas.steering.evals.suites import Suite
    from personatlas.steering.generate import Generation
    from personatlas.steering.hooks.steering import Steering
    from personatlas.steering.traces import Trace
    from personatlas.training.run import TrainResult


@dataclass(frozen=True)
class Run:
    """A folder that `compute_axis` has written: its axis, persona space, fit and rollouts, read when they are
    asked for.
    """

    folder: Path

    @cached_property
    def axis(self) -> Axis:
        """The Assistant Axis: one unit vector (D,) a layer."""
        return axes.load_axis(self.folder / "axis")

    @cached_property
    def space(self) -> PersonaSpace:
        """Mean role vector and principal components at the axis's layer."""
        return axes.load_space(self.folder / "space")

    @cached_property
    def fit(self) -> "FitResult":
        """All numbers of the fit, with intervals and nulls."""
        from personatlas.analysis.fit.result import FitResult

        return FitResult.load(self.folder)

    @cached_property
    def rollouts(self) -> tuple[Rollout, ...]:
        """The answers under role prompts."""
        return tuple(read_rollouts(self.folder))


def load(
    name: str,
    *,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    chat_template: Path | None = None,
) -> Model:
    """Loads a causal decoder once and checks it.

    Parameters
    ----------
    name
        a packaged name (`smollm2-135m`), a local folder, a training run, a `.gguf` file or a hub id
    device
        "cpu", "cuda", "cuda:1"; the first GPU unless given, else the CPU
    dtype
        bfloat16 on a GPU and the faster of bfloat16 and float32 on a CPU unless given; "auto" is the
        checkpoint's own
    chat_template
        a Jinja file in place of the tokenizer's chat template

    Raises `UserError` for anything that is not a causal decoder which transformers can load.
    """
    return load_model(name, device=device, dtype=dtype, chat_template=chat_template)


def load_bank(folder: str | Path | None = None) -> Bank:
    """Reads a role bank; the packaged one unless a folder is given. Raises `UserError` with file and line."""
    return banks.load_bank(None if folder is None else Path(folder))


def load_axis(name: str | Path) -> Axis:
    """Reads an axis: a run folder, an axis file, or the name of a packaged model. Raises `UserError`."""
    return axes.load_axis(resolve_axis(str(name)))


def open_run(folder: str | Path) -> Run:
    """Opens a folder that `compute_axis` has written. Raises `UserError` where there is no fitted axis."""
    resolve_axis(str(folder))
    return Run(Path(folder))


def compute_axis(
    model: str | Model,
    *,
    out: str | Path,
    plan: str | PlanOptions = PlanOptions(),
    judge: str | JudgeOptions = "rules",
    fit: FitOptions = FitOptions(),
    load: ModelOptions = ModelOptions(),
) -> Run:
    """Computes the Assistant Axis of a model: samples, judges, records, fits, and writes a report. Resumes.

    Parameters
    ----------
    model
        a loaded model, or a name, which is loaded as `load` says
    out
        the run folder
    plan
        "demo" (unless given on a CPU), "standard" (on a GPU) or "paper", or all options of the rollouts
    judge
        "rules", "none" or "local:MODEL", or all options of the judge of role play
    fit
        which scores count, the positive pole, the layer, bootstrap replicates

    Raises `UserError` for options that do not go together and for a folder of another run.
    """
    from personatlas.analysis.fit import pipeline

    pipeline.compute_axis(
        model,
        Path(out),
        load=load,
        plan=PlanOptions(plan=plan) if isinstance(plan, str) else plan,
        judge=JudgeOptions(judge=judge) if isinstance(judge, str) else judge,
        fit=fit,
    )
    return Run(Path(out))


def steer(model: Model, interventions: Sequence[Intervention]) -> AbstractContextManager["Steering"]:
    """Applies interventions to every forward of `model.hf` inside the context; the model is left as it was
    found.

    The context's value says what was done: `fired` is the share of tokens times layers that were changed,
    `tally` the counts by layer and row. Raises `UserError` for interventions of another model.
    """
    from personatlas.steering.hooks import steering

    return steering.steer(model, list(interventions))


def generate(
    model: Model,
    messages: Sequence[Message],
    *,
    steer: Sequence[Intervention] = (),
    axis: Axis | None = None,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> "Generation":
    """Answers a conversation, with interventions if any, and projects every token on an axis if one is given.

    Parameters
    ----------
    messages
        `{"role", "content"}` each, the last one the user's
    steer
        interventions that act on prompt and answer
    axis
        the axis of the trace; without one there is no trace

    Returns text, why it stopped, the trace and the fired share. Raises `UserError` for a conversation that
    leaves no room for an answer, and for interventions of another model.
    """
    from personatlas.steering import generate as generation

    return generation.generate(model, messages, steer=steer, axis=axis, sampling=sampling, seed=seed)


def project(model: Model, messages: Sequence[Message], axis: Axis) -> "Trace":
    """Projects a stored conversation on an axis: a value (residual units) for each token, a mean for each
    answer.

    `trace.turns` has an entry for every answer. Raises `UserError` for an axis of another model, and for a
    conversation without an answer that fits into the context.
    """
    from personatlas.steering import traces

    return traces.project(model, messages, axis)


def calibrate(
    run: Run | str | Path,
    *,
    model: Model | None = None,
    name: str = "assistant",
    bank: Path | None = None,
    options: CalibrationOptions = CalibrationOptions(),
    load: ModelOptions = ModelOptions(),
) -> "CalibrationResult":
    """Finds the strongest cap within a loss budget on one half of roles and questions, reports it on the
    other half.

    The cap is saved as `RUN/caps/NAME`. `model` is the run's model where it is loaded already. Raises
    `UserError` for a folder without rollouts and a fit.
    """
    from personatlas.steering.calibration import calibrate as calibration

    folder = run.folder if isinstance(run, Run) else Path(run)
    return calibration.calibrate(folder, model=model, name=name, bank=bank, options=options, load=load)


def evaluate(
    model: str | Model,
    axis: str | Axis,
    *,
    arms: Mapping[str, Sequence[Intervention]],
    out: str | Path,
    suites: "Sequence[str | Suite] | None" = None,
    options: EvalOptions = EvalOptions(),
    load: ModelOptions = ModelOptions(),
) -> "EvalResult":
    """Answers the same prompts with the same seeds without and with interventions, and compares the arms.
    Resumes.

    Parameters
    ----------
    arms
        interventions by the arm's name; the baseline is always there
    suites
        names (`benign`, `susceptibility`, ...) or suites with a file, `Suite.named("harm",
        requests="requests.csv")`; unless given, those whose file is in the options and those that need none
    options
        sizes, files, sampling and the judge of harm

    Raises `UserError` before anything is answered, and for a folder of another evaluation.
    """
    from personatlas.steering.evals import study

    result = study.evaluate(model, axis, arms, suites, Path(out), options=options, load=load)
    return _of_first_process(result)


def serve(
    model: str | Model,
    axis: str | Axis | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8377,
    allow_origins: Sequence[str] = (),
    options: ServeOptions = ServeOptions(),
    capacity: CapacityOptions = CapacityOptions(),
) -> None:
    """Serves a page and an OpenAI-compatible API with the persona of every conversation, until interrupted.

    Without an axis the model's own is taken: the packaged one, or that of its run; where there is none,
    conversations are not measured.
    """
    from personatlas.steering.serve import startup

    if axis is None:
        axis = own_axis(model.id if isinstance(model, Model) else model)
    startup.serve(
        model, axis, host=host, port=port, allow_origins=allow_origins, options=options, capacity=capacity
    )


def train_base(
    corpus: str | Path | CorpusOptions,
    *,
    depth: int | None = None,
    out: str | Path,
    minutes: float | None = None,
    tokens: int | None = None,
    options: PretrainOptions = PretrainOptions(),
) -> "TrainResult":
    """Trains a GPT of some depth on a corpus; every other size follows from the depth and the length.
    Resumes.

    Parameters
    ----------
    corpus
        a file or folder of texts, or all options of the corpus
    depth
        number of blocks; from the size of the corpus unless given, and a CPU then trains for 4 minutes
    minutes, tokens
        the length: what this machine does in so many minutes, or so many tokens; compute-optimal unless
        given, and at most 16 times the corpus

    Raises `UserError` for texts and options that make no run, and for a folder of another run.
    """
    from personatlas.training import pretrain

    if minutes is not None or tokens is not None:
        options = replace(options, minutes=minutes, tokens=tokens)
    source = corpus if isinstance(corpus, CorpusOptions) else Path(corpus)
    result = pretrain.train_base(source, depth=depth, out=Path(out), options=options)
    return _of_first_process(result)


def train_chat(
    base: "str | Path | TrainResult",
    data: Sequence[str | Path] | ChatDataOptions,
    *,
    out: str | Path,
    options: FinetuneOptions = FinetuneOptions(),
) -> "TrainResult":
    """Tunes a base model on conversations or on the rollouts of another model. Resumes.

    `data` are files of conversations or run folders; `PATH=30%` gives 30% of the answers' tokens. Raises
    `UserError` for a base or data that cannot be used, and for a folder of another run.
    """
    from personatlas.training import finetune

    start = Path(base) if isinstance(base, str) else base
    return _of_first_process(finetune.train_chat(start, data, out=Path(out), options=options))


Result = TypeVar("Result")


def _of_first_process(result: Result | None) -> Result:
    if result is None:
        raise UserError("under torchrun only the first process has the result; the others end here")
    return result
