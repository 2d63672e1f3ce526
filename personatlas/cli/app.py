"""The command line. The one place that names all verbs, by import path, so that `personatlas --help` imports none of them.

A `UserError` is one line on stderr and exit status 2; so are a full disk and a wrong option. Any other exception is a bug and
keeps its traceback.
"""

import errno
import os
import signal
import sys
import time
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from personatlas.persona.distributed import get_world
from personatlas.persona.errors import UserError

VERBS = {
    "axis": ("personatlas.cli.axis:axis", "The Assistant Axis of a checkpoint, end to end, with a report."),
    "emergence": (
        "personatlas.cli.axis:emergence",
        "Watch the axis of a training run emerge over its checkpoints.",
    ),
    "rollout": ("personatlas.cli.runs:rollout", "Sample answers under role prompts into a run folder."),
    "judge": (
        "personatlas.cli.judge:app",  # itself, and its commands fit and check
        "Score whether a run's answers play their roles; fit and check judges of harm.",
    ),
    "record": ("personatlas.cli.runs:record", "Record a run's activations."),
    "fit": ("personatlas.cli.axis:fit", "Fit axis and persona space to a run's activations."),
    "report": ("personatlas.cli.axis:report", "Write the report.html of a fitted run or a training run."),
    "generate": ("personatlas.cli.talk:generate", "Answer a prompt without and with a cap, side by side."),
    "calibrate": ("personatlas.cli.calibrate:calibrate", "Find the cap that buys most for what it may cost."),
    "susceptibility": (
        "personatlas.cli.calibrate:susceptibility",
        "Who a model says it is under role prompts.",
    ),
    "eval": ("personatlas.cli.evals:eval_", "Evaluate a model capped against uncapped."),
    "lm-eval": ("personatlas.cli.evals:lm_eval", "The lm-eval harness's tasks, capped and uncapped."),
    "replay": ("personatlas.cli.replay:replay", "Ask stored conversations again with a cap off and on."),
    "inspect": ("personatlas.cli.evals:inspect", "A task of Inspect with and without a cap, compared."),
    "serve": (
        "personatlas.cli.talk:serve",
        "An OpenAI-compatible server, and a page, with every conversation's persona measured.",
    ),
    "chat": ("personatlas.cli.talk:chat", "Talk to a model in the terminal, and see where it stands."),
    "drift": (
        "personatlas.cli.drift:drift",
        "Do conversations leave the Assistant, and does a cap hold them?",
    ),
    "trace": ("personatlas.cli.drift:trace", "Trace stored conversations along an axis, turn by turn."),
    "train": (
        "personatlas.cli.train:app",
        "Make a small model of one's own: `train tokenizer`, `train base`, `train chat`, `train evaluate`.",
    ),
    "plan": (
        "personatlas.cli.plan:plan",
        "What training a GPT of some depth takes: size, tokens, memory, hours, cost.",
    ),
    "export": ("personatlas.cli.train:export", "A trained model as a Hugging Face folder or a GGUF file."),
    "roles": ("personatlas.cli.roles:roles", "List, search, show, check and export a role bank."),
    "spans": ("personatlas.cli.runs:spans", "Show which tokens a chat template gives to whom."),
    "show": ("personatlas.cli.runs:show", "Print any artefact or run folder as JSON."),
    "import": (
        "personatlas.cli.runs:import_",
        "Turn the paper repository's files into artefacts of this project.",
    ),
    "self-test": ("personatlas.cli.tools:self_test", "Prove that recording and capping bind on a model."),
}

app = App(
    name="personatlas",
    help="Map, watch and hold the persona of a language model.",
    help_epilogue="`personatlas VERB --help` explains a verb. A first run: `personatlas axis smollm2-135m --plan demo`.",
    version_flags=["--version"],
    result_action="return_value",
    suppress_keyboard_interrupt=False,  # `main` says that the work goes on from there
)
for name, (path, text) in VERBS.items():
    app.command(path, name=name, help=text)

HEARD = 2.0  # seconds
FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file grew too large",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit with its status."""
    try:
        app(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except CycloptsError as error:
        _fail(f"{' '.join(str(error).split())} (see `personatlas --help`)")
    except BrokenPipeError:  # `personatlas show RUN | head`: whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        if error.errno not in FULL:
            raise
        where = f" ({error.filename})" if error.filename else ""
        _fail(
            f"{FULL[error.errno]}{where}; what was finished is kept: make room and run the same command again"
        )
    except KeyboardInterrupt:
        print("personatlas: stopped; the same command goes on from here", file=sys.stderr)  # noqa: T201
        sys.exit(130)


def _fail(text: str) -> None:
    if (
        get_world().rank
    ):  # torchrun ends all processes once the first has failed: what each of them would say is said once
        time.sleep(HEARD)
    print(f"personatlas: {text}", file=sys.stderr)  # noqa: T201
    sys.exit(2)


if __name__ == "__main__":
    main()
