"""The README tells the truth: its Python runs, its verbs exist, its commands parse."""

import re
from pathlib import Path

from personaxis.persona.cli import VERBS

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_blocks_run(capsys):
    assert blocks("python")
    for block in blocks("python"):
        exec(block, {})
    assert "roles" in capsys.readouterr().out


def test_it_starts_with_the_two_commands():
    assert blocks("sh")[0].splitlines()[0].startswith("make demo")
    assert blocks("sh")[0].splitlines()[1].startswith("make test")


def test_every_verb_stands_in_it_and_every_verb_in_it_exists():
    told = set(re.findall(r"^personaxis ([a-z-]+)", "\n".join(blocks("sh")), re.M))
    assert told == set(VERBS)
