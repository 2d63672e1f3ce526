"""Tables in the terminal: no cell is cut, blocks repeat the first column, a pipe is as wide as it needs."""

import pytest

from personatlas.cli.output import count_of, print_fields, print_line, print_table, with_interval

COLUMNS = ["", "baseline", "assistant", "random 1"]
ROWS = [["harmful", "62.5% [31%, 86%]", "25.0% [7%, 59%]", "75.0% [41%, 93%]"], ["fired", "", "70%", "63%"]]


@pytest.mark.parametrize("width", [20, 40, 80, 160])
def test_a_table_shows_every_cell_whole_at_every_width(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(COLUMNS, ROWS, title="harm")
    shown = capsys.readouterr().out
    assert all(cell in shown for cell in [*COLUMNS, *ROWS[0], *ROWS[1], "harm"])
    lines = shown.splitlines()
    assert all(len(line) <= max(width, 25) for line in lines)
    blocks = sum(line.startswith("harmful") for line in lines)
    assert blocks == {20: 3, 40: 3, 80: 1, 160: 1}[width]


def test_the_columns_of_a_block_are_aligned(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    print_table(COLUMNS, ROWS)
    header, first, second = capsys.readouterr().out.splitlines()[:3]
    assert header.index("assistant") + len("assistant") == first.index("59%]") + 4 == second.index("70%") + 3


def test_a_pipe_is_as_wide_as_the_table(capsys, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    print_table(["", *(f"arm {number}" for number in range(40))], [["share", *["12.5% [1%, 99%]"] * 40]])
    header, row = capsys.readouterr().out.splitlines()[:2]
    assert header.count("arm") == row.count("12.5%") == 40
    print_line("word " * 100)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_last_column_of_text_wraps_at_words_under_itself(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    print_fields([("why", "a long reason that does not fit into one line"), ("n", "[red]3[/red]")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "why  a long reason that does not fit"
    assert lines[1] == "     into one line"
    assert lines[2] == "n    [red]3[/red]"


def test_a_value_has_its_interval_where_there_is_one():
    assert with_interval(0.5, 0.25, 0.75) == "0.50 [0.25, 0.75]"
    assert with_interval(0.5, None, None, "+.1%") == "+50.0%"
    assert with_interval(None, None, None) == "-"
    assert with_interval(-0.001, -0.1, 0.04, "+.1f") == "+0.0 [-0.1, +0.0]"
    assert with_interval(-0.001, None, None, ".1%") == "-0.1%"
    assert [count_of(n, "case") for n in (0, 1, 2000)] == ["0 cases", "1 case", "2,000 cases"]


def test_a_long_text_beside_many_columns_has_a_block_of_its_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = "a message of a user that goes on and on until it fills more than a line"
    row = ["1", *ROWS[0][1:3], text]
    print_table(["turn", "baseline", "assistant", "says"], [row], left=(3,), title="t " * 50)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [("t " * 30).strip(), ("t " * 20).strip()]
    assert max(map(len, lines)) <= 60
    assert lines[-3:] == [
        "   1  a message of a user that goes on and on until it fills",
        "      more than a line",
        "",
    ]
