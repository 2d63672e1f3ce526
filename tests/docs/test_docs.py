"""README and docs tell the truth: every command in them parses, every command is shown somewhere, links lead somewhere."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from personatlas.cli import options
from personatlas.cli.app import COMMANDS, app
from personatlas.persona.roles.bank import PACKAGED, load_bank
from personatlas.steering.evals.options import EvalOptions

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


def commands(page: Path) -> list[list[str]]:
    """The personatlas commands of a page's shell blocks, as words."""
    text = "\n".join(blocks(page, "sh")).replace("\\\n", " ")
    words = [shlex.split(line, comments=True) for line in text.splitlines()]
    return [line[1:] for line in words if line[:1] == ["personatlas"]]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_on_a_page_parses(page, monkeypatch, tmp_path):
    monkeypatch.setattr(options, "require_model_name", lambda name: True)  # the models of a page are made up
    monkeypatch.chdir(tmp_path)
    (tmp_path / "harm-judge.json").touch()  # what `tools harm-judge fit` writes
    for words in commands(page):
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_every_command_is_shown_on_some_page():
    shown = [" ".join(words) + " " for page in PAGES for words in commands(page)]
    listed = (ROOT / "README.md").read_text()
    for panel in COMMANDS.values():
        for name, (path, _) in panel.items():
            if path and not name.startswith("tools "):
                assert any(line.startswith(f"{name} ") for line in shown), (
                    f"no page shows `personatlas {name}`"
                )
            assert name.split()[-1] in listed


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_to_files_that_are_there(page):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_readme_is_short_and_starts_with_the_two_commands():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 150
    first, second = blocks(ROOT / "README.md", "sh")[0].splitlines()[:2]
    assert first.startswith("make demo")
    assert second.startswith("make test")


def test_the_worked_example_of_the_data_card_is_a_role_that_the_bank_takes(tmp_path):
    card = (PACKAGED / "BANK.md").read_text()
    for path in PACKAGED.glob("*.jsonl"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "roles.jsonl").open("a") as file:
        file.write(re.findall(r"```json\n(.*?)```", card, re.S)[0])
    assert len(load_bank(tmp_path).role("beekeeper").prompts) == 5
    bank = load_bank()
    for count in (
        f"{len(bank.roles) - 1} roles",
        f"| {len(bank.questions)} |",
        f"| {len(bank.traits)} traits |",
    ):
        assert count in card


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory, whole_run):
    """What the pages' Python runs with: a random model of 30 layers for the packaged one, its axis with a saved cap, a tiny run."""
    from families import deep_model
    from tiny_axis import axis_of

    import personatlas as pa

    model = deep_model()
    axis, folder = axis_of(model), tmp_path_factory.mktemp("axis")
    axis.save(folder / "axis")
    axis = pa.load_axis(folder)
    small, evaluate = EvalOptions(answers=4, max_new_tokens=4, random=0), pa.evaluate
    (folder / "caps").mkdir()
    axis.cap("p50@18-23").save(folder / "caps" / "assistant")
    return {
        "load": lambda name, **options: model,
        "load_axis": lambda name: axis,
        "evaluate": lambda *given, **options: evaluate(*given, options=small, **options),
        "compute_axis": lambda model, *, out, plan: pa.open_run(whole_run / "run"),
    }


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=str)
def test_the_python_of_a_page_runs(page, stand_ins, monkeypatch, tmp_path, capsys):
    import torch

    import personatlas as pa
    from personatlas.steering import arm_kinds
    from personatlas.steering.evals import suites

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        suites, "_SUITES", suites.registered_suites()
    )  # what a page registers is gone after it
    monkeypatch.setattr(arm_kinds, "ARM_KINDS", dict(arm_kinds.ARM_KINDS))
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(pa, name, stand_in)
    messages = [
        {"role": "user", "content": "Who are you?"},
        {"role": "assistant", "content": "I am the tide."},
    ]
    ids = torch.arange(4, 12)[None]
    names = {"model": pa.load("any"), "axis": pa.load_axis("any"), "messages": messages[:1], "ids": ids}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)
    assert capsys.readouterr().out
