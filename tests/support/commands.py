"""Commands in the tests: the one line with which a mistake ends."""

import pytest

from personatlas.cli.app import main


def refused(capsys, argv):
    """The line on stderr of a command that must fail with just one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("personatlas:")]
    assert len(lines) == 1
    return lines[0]
