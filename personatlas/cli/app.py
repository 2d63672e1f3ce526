"""The command line: every command by import path, so that `personatlas --help` imports none of them.

    personatlas axis smollm2-135m --plan demo
    personatlas run report runs/smollm2-135m

A `UserError`, a wrong option and an error of the operating system (`OSError`, or what a library makes of
one) are one line on stderr and exit status 2. Any other exception is a bug and keeps its traceback.
"""

import contextlib
import fcntl
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from cyclopts import App, CycloptsError, Group, Parameter

from personatlas.persona.errors import UserError, explain_os_error, find_os_error

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

COMMANDS = {
    "Map": {
        "axis": ("axis:axis", "Compute the Assistant Axis of a model, with a report: all steps of `run`."),
        "run": ("", "Run one step of `axis` on a run folder; write the report of a run."),
        "run rollout": ("axis:rollout", "Sample answers under role prompts into a run folder."),
        "run judge": ("axis:judge", "Score whether a run's answers play their roles."),
        "run record": ("axis:record", "Record a run's mean activations."),
        "run fit": ("axis:fit", "Fit axis and persona space to a run's activations."),
        "run report": ("axis:report", "Write the report.html of a fitted run or of a training run."),
        "emergence": ("axis:emergence", "Compare the axes of a training run's checkpoints."),
    },
    "Steer": {
        "calibrate": ("calibrate:calibrate", "Find the strongest cap within a loss budget."),
        "generate": ("talk:generate", "Answer a prompt without and with a cap, side by side."),
        "chat": ("talk:chat", "Chat with a model in the terminal, with its persona measured."),
        "serve": ("talk:serve", "Serve an OpenAI-compatible API and a web page, with personas measured."),
    },
    "Measure": {
        "eval": ("evals:eval_", "Evaluate with and without caps: own suites, tasks of lm-eval or Inspect."),
        "trace": ("drift:trace", "Trace stored conversations along an axis, turn by turn."),
        "drift": ("drift:drift", "Measure persona drift over conversations, with and without a cap."),
    },
    "Train": {
        "train": ("", "Train a small GPT, tune it to chat, evaluate and export it."),
        "train plan": ("plan:plan", "Print size, memory, hours and cost of a training run; nothing is run."),
        "train tokenizer": ("train:tokenizer", "Train a byte-level BPE tokenizer on a corpus."),
        "train base": ("train:base", "Train a GPT on a corpus."),
        "train chat": ("train:chat", "Tune a base model on conversations."),
        "train eval": ("train:evaluate", "Bits per byte of a text under any model."),
        "train export": ("train:export", "Write a trained model as a Hugging Face folder or a GGUF file."),
    },
    "Tools": {
        "roles": ("roles:roles", "List, search, show, check and export a role bank."),
        "tools": ("", "Inspect templates and artefacts, import the paper's files, test a machine."),
        "tools spans": ("tools:spans", "Show which speaker a chat template gives each token to."),
        "tools show": ("tools:show", "Print any artefact or run folder as JSON."),
        "tools import": ("tools:import_", "Convert the files of the paper's repository."),
        "tools self-test": ("tools:self_test", "Test that recording and capping bind on this machine."),
        "tools harm-judge": ("", "Fit a classifier of harm to human labels; check any judge of harm."),
        "tools harm-judge fit": ("harm_judge:fit", "Fit a classifier of harm to human labels."),
        "tools harm-judge check": ("harm_judge:check", "Compare a judge of harm with human labels."),
    },
}  # fmt: skip
"By panel of `--help`: name to (module:function, help); a group of commands has no function."
RESUMED = ("axis", "run rollout", "run judge", "run record", "emergence", "calibrate", "eval", "drift", "train base", "train chat")  # fmt: skip
"Commands that go on where they were stopped."


def _build() -> App:
    root = App(
        name="personatlas",
        help="Map, monitor and hold the persona of a language model.",
        help_epilogue="`personatlas COMMAND --help` explains a command. "
        "A first run: `personatlas axis smollm2-135m --plan demo`.",
        version_flags=["--version"],
        default_parameter=Parameter(negative=()),  # no --no-json, no --empty-cap
        group_commands=Group("Options", sort_key=len(COMMANDS) * 100),
        result_action="return_value",
        suppress_keyboard_interrupt=False,  # `main` says that the same command resumes
    )
    apps = {"": root}
    order = count()
    for panel, commands in COMMANDS.items():
        group = Group(panel, sort_key=next(order))
        for full_name, (path, text) in commands.items():
            parent, _, name = full_name.rpartition(" ")
            app_group, sort_key = None if parent else group, next(order)
            if path:
                apps[parent].command(
                    f"personatlas.cli.{path}", name=name, help=text, group=app_group, sort_key=sort_key
                )
            else:
                apps[full_name] = App(name, help=text, group=app_group, sort_key=sort_key, help_epilogue="")
                apps[parent].command(apps[full_name])
    root.register_install_completion_command(help="Install shell completion and exit.")
    return root


app = _build()

STDOUT = "standard output"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    _prepare_streams()
    # read when torch is loaded: threads that spin for one another on cores that other work wants took more than
    # five times as long as these, which sleep and come to 1.2 times one thread's time there
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _explain_in_thread
    try:
        app(arguments, exit_on_error=False, print_error=False)
        sys.stdout.flush()
    except UserError as error:
        _fail(str(error))
    except CycloptsError as error:
        if isinstance(error.__cause__, UserError):  # of a parameter's validator
            _fail(str(error.__cause__))
        command = " ".join(["personatlas", *(error.command_chain or ())])
        _fail(f"{' '.join(str(error).split()).removesuffix('.')} (see `{command} --help`)")
    except KeyboardInterrupt:
        words = list(sys.argv[1:] if arguments is None else arguments)
        resumes = any(words[: len(name.split())] == name.split() for name in RESUMED)
        print(f"personatlas: stopped{'; the same command resumes' if resumes else ''}", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except Exception as error:
        found = find_os_error(error)
        if found is None:
            raise
        if found.filename == STDOUT:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to flush at the end
            if isinstance(found, BrokenPipeError):  # `personatlas tools show RUN | head`
                sys.exit(128 + signal.SIGPIPE)
        _fail(explain_os_error(found))


def _fail(text: str) -> NoReturn:
    said, error_file = None, os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's FOLDER/RANK/error.json
    if error_file:
        with contextlib.suppress(OSError):
            said = (Path(error_file).parents[1] / "said").open("a+")
    with contextlib.suppress(OSError), said or contextlib.nullcontext():
        if said is not None:  # what one process says the others do not say again
            fcntl.flock(said, fcntl.LOCK_EX)  # nor end before it is said: torchrun ends all after the first
            said.seek(0)
            if text in said.read().splitlines():
                sys.exit(2)
            said.write(text + "\n")
        print(f"personatlas: {text}", file=sys.stderr, flush=True)  # noqa: T201
    sys.exit(2)


def _explain_in_thread(failed: threading.ExceptHookArgs) -> None:
    """Says in one line what the system refused a library's thread; the command goes on without it."""
    found = None if failed.exc_value is None else find_os_error(failed.exc_value)
    if found is None:
        threading.__excepthook__(failed)
    else:
        from personatlas.persona.progress import say

        say(f"note: {explain_os_error(found)}")


class _StandardOutput(io.FileIO):
    """Standard output, whose errors have its name where those of a file have the path."""

    def write(self, data: "ReadableBuffer") -> int:
        try:
            return super().write(data)
        except OSError as error:
            error.filename = STDOUT
            raise


def _prepare_streams() -> None:
    """Names standard output; opens closed streams (`>&-`), whose numbers the next files would get."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (stays open)
    out = sys.stdout
    if out is sys.__stdout__ and isinstance(out, io.TextIOWrapper):
        raw = _StandardOutput(out.fileno(), "w", closefd=False)
        sys.stdout = io.TextIOWrapper(
            io.BufferedWriter(raw), out.encoding, out.errors, line_buffering=out.isatty()
        )


if __name__ == "__main__":
    main()
