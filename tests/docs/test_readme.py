"""The README tells the truth: its Python runs, its commands exist, its commands parse."""

import re
import shutil
from pathlib import Path

from personatlas.cli.app import COMMANDS
from personatlas.persona.roles.bank import PACKAGED, load_bank

README = (Path(__file__).parents[2] / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_python_blocks_run(capsys):
    assert blocks("python")
    for block in blocks("python"):
        exec(block, {})
    assert "roles" in capsys.readouterr().out


def test_the_worked_example_of_the_data_card_is_a_role_that_the_bank_takes(tmp_path):
    card = (PACKAGED / "BANK.md").read_text()
    for path in PACKAGED.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "roles.jsonl").open("a") as file:
        file.write(re.findall(r"```json\n(.*?)```", card, re.S)[0])
    assert len(load_bank(tmp_path).role("beekeeper").prompts) == 5
    bank = load_bank()
    for told in (
        f"{len(bank.roles) - 1} roles",
        f"| {len(bank.questions)} |",
        f"| {len(bank.traits)} traits |",
    ):
        assert told in card


def test_it_starts_with_the_two_commands():
    assert blocks("sh")[0].splitlines()[0].startswith("make demo")
    assert blocks("sh")[0].splitlines()[1].startswith("make test")


def test_every_command_stands_in_it_and_every_command_in_it_exists():
    names = {name for panel in COMMANDS.values() for name, (path, _) in panel.items() if path}
    examples = re.findall(r"^personatlas (.*)", "\n".join(blocks("sh")), re.M)
    named = {
        example: [name for name in names if f"{example} ".startswith(f"{name} ")] for example in examples
    }
    assert [example for example, found in named.items() if not found] == []
    assert {name for found in named.values() for name in found} == names
