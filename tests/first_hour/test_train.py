"""The first hour of somebody with two small books: the README's commands for training, timed."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from personatlas.training.data.demo_text import write_demo

ROOT = Path(__file__).parents[2]
MINUTES = 10  # on two idle cores


@pytest.mark.slow
def test_two_small_books_are_a_base_a_character_and_a_conversation_within_ten_minutes(tmp_path, capsys):
    block = (ROOT / "README.md").read_text().split("### 4.")[1].split("```sh\n")[1].split("```")[0]
    commands = [line.partition("#")[0].split() for line in block.splitlines()]
    base, tune, talk, axis = commands
    assert [words[:3] for words in (base, tune)] == [
        ["personatlas", "train", name] for name in ("base", "chat")
    ]
    assert [words[1] for words in (talk, axis)] == ["chat", "axis"]
    write_demo(tmp_path / "data")
    (tmp_path / "books").mkdir()
    for kind in ("topic", "module"):  # English that is on every machine, 0.5 MB each
        texts = [
            path.read_text(encoding="utf-8") for path in sorted((tmp_path / "data/text").glob(f"{kind}-*"))
        ]
        (tmp_path / "books" / f"{kind}s.txt").write_text("\n".join(texts)[:500_000], encoding="utf-8")
    total = 0.0
    for words in (base, tune, [*talk, "--message", "Who are you?", "--max-new-tokens", "48"]):
        began = time.monotonic()
        command = [sys.executable, "-m", "personatlas", *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        total += time.monotonic() - began
        with capsys.disabled():
            print(f"{' '.join(words)}: {time.monotonic() - began:.0f} s")
        if words is not base:
            continue
        assert "held out: a passage of each of 2 documents" in done.stderr
        bits = float(re.search(r"held out +([\d.]+) bits per byte", done.stdout)[1])
        assert bits < 3
    assert re.search(r"\w{2}", done.stdout)
    busy = max(1.0, os.getloadavg()[1] / (os.cpu_count() or 1))  # processes that shared a core
    assert total < 60 * MINUTES * busy
