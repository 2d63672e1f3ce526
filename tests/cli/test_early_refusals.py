"""A wrong value of an option is refused before torch is imported, with the name that was meant."""

import json
import subprocess
import sys

LINES = {
    "axis smollm2-135m --plan dmeo": "--plan 'dmeo' is not one of demo, standard, paper; did you mean demo?",
    "axis smollm2-135m --judge ruels": "did you mean rules?",
    "axis smollm2-135m --keep papper": "did you mean paper",
    "axis smollm2-135m --replicates 1": "--replicates 1 makes no interval",
    "axis smollm2-135m --dtype flot32": "did you mean float32",
    "axis smollm2-135m --roles pirat,nun,king": "'pirat' is not one of",
    "axis smollm2-135m --prompts 0": "--prompts 0 is below 1",
    "axis smollm2-135m --bank nowhere": "nowhere/roles.jsonl does not exist",
    "emergence nowhere --plan dmeo": "did you mean demo?",
    "run rollout smollm2-135m --plan dmeo": "did you mean demo?",
    "run judge nowhere --judge-model m": "--judge-model is about a model at an address",
    "run fit nowhere --keep papper": "did you mean paper",
    "calibrate nowhere --arm ad:8@2": "did you mean add?",
    "eval smollm2-135m --judge ruels": "did you mean rules?",
    "eval smollm2-135m --rubric yesno": "did you mean yes-no?",
    "drift smollm2-135m --arm cp:p50@1": "did you mean cap?",
    "generate smollm2-135m Hi --arm cp:p50@1": "did you mean cap?",
    "chat smollm2-135m --arm randm:3": "is not baseline, random:3",
    "serve smollm2-135m --arm cp:p50@1": "did you mean cap?",
    "tools self-test smollm2-135m --arm cp:p50@1": "did you mean cap?",
    "train eval smollm2-135m --text x --dtype half": "--dtype 'half' is not one of",
}
SCRIPT = """
import contextlib, io, json, sys
from personatlas.cli.app import main
for line in json.load(sys.stdin):
    error, status = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(error):
            main(line.split())
    except SystemExit as stop:
        status = stop.code
    print(json.dumps([line, status, error.getvalue(), "torch" in sys.modules]))
"""


def test_wrong_values_are_refused_before_torch_is_imported(tmp_path):
    line = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(
        line, input=json.dumps(list(LINES)), capture_output=True, text=True, cwd=tmp_path, check=True
    )
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(rows) == len(LINES)
    for command, status, error, has_torch in rows:
        assert (status, error.count("\n"), has_torch) == (2, 1, False), (command, error)
        assert LINES[command] in error
    assert not list(tmp_path.iterdir())
