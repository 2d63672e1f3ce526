"""Where commands write to: an empty name, the working folder and other people's files are refused before any work."""

from pathlib import Path

import pytest

from personatlas.cli.app import COMMANDS, app, main

NEEDED = {  # what must be given beside; everywhere else a name is enough
    "generate": ". Hi",
    "trace": ". a.json",
    "roles": "",
    "train tokenizer": "--corpus .",
    "train base": "--depth 2 --corpus .",
    "tools import": "axis a.pt",
    "tools harm-judge check": "a.csv --judge rules",
}
WRITES = ("--out", "--html", "--export", "--gguf", "--log")


def writing_commands() -> list[tuple[str, str]]:
    """Every command with every option of its own that names a path to write to."""
    found = []
    for panel in COMMANDS.values():
        for name, (path, _) in panel.items():
            if path:
                arguments = app[name.split()[0]] if " " not in name else app
                for part in name.split() if " " in name else ():
                    arguments = arguments[part]
                options = {option for one in arguments.assemble_argument_collection() for option in one.names}
                found += [(name, option) for option in WRITES if option in options]
    return found


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert (ended.value.code, said.out, said.err.count("\n")) == (2, "", 1)
    return said.err


@pytest.mark.parametrize(("command", "option"), writing_commands())
def test_an_empty_name_is_no_path_to_write_to(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for given in ([option, ""], [f"{option}="], [option, " "]):
        assert f"for {option}: an empty name" in refused(
            capsys, *command.split(), *NEEDED.get(command, ".").split(), *given
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["axis", "drift", "eval", "train base", "train chat", "train tokenizer", "emergence"]
)
def test_a_folder_to_write_to_is_no_file_and_not_the_working_folder_with_other_files(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").write_text("mine")
    assert "notes.txt is a file, not a folder" in refused(
        capsys, *command.split(), *NEEDED.get(command, ".").split(), "--out", "notes.txt"
    )
    assert "is the working folder and holds other files" in refused(
        capsys, *command.split(), *NEEDED.get(command, ".").split(), "--out", "."
    )
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_page_is_not_written_over_another_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("chats.jsonl").write_text("{}")
    for command in (["generate", ".", "Hi"], ["trace", ".", "chats.jsonl"]):
        assert "chats.jsonl is a file and no page" in refused(capsys, *command, "--html", "chats.jsonl")
    assert Path("chats.jsonl").read_text() == "{}"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("eval . --fewshot 3", "--fewshot is about tasks of lm-eval"),
        ("eval . --raw --suite benign", "--raw is about tasks of lm-eval"),
        ("eval . --epochs 3", "--epochs is about a task of Inspect"),
        ("eval . --lm-eval ifeval --requests a.csv", "--requests is about suites"),
        ("roles pirate --export new", "NAME and --export are two things to do"),
        ("roles --check a --traits", "leave out --check"),
        ("roles --traits --questions", "are two lists"),
        ("drift . --axis smollm2-135m --conversations 999", "--conversations 999: a domain has"),
        ("drift . --axis smollm2-135m --turns 999", "--turns 999: the longest script has"),
        ("drift . --axis smollm2-135m --seeds 2 --temperature 0", "are one conversation 2 times"),
        ("tools harm-judge check a.csv --judge rules --judge-tokens 9", "--judge-tokens is about a model"),
        ("tools spans . --transcript a.json --user Hi", "--transcript has its own messages"),
    ],
)
def test_options_that_contradict_each_other_are_refused_before_a_model_is_loaded(
    arguments, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert reason in refused(capsys, *arguments.split())
