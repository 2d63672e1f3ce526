"""What the README says of installing, and what `make` says at its end. The slow test does it in a clone."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def made(*arguments, folder=ROOT):
    return subprocess.run(
        ["make", "--no-print-directory", *arguments], cwd=folder, capture_output=True, text=True, check=True
    ).stdout


def test_the_extras_of_the_readme_are_those_that_there_are():
    (listed,) = re.findall(r"with an extra \(([^)]*)\)", README)
    assert {name.strip() for name in listed.split(",")} == set(PROJECT["optional-dependencies"]) - {"dev"}
    for name in re.findall(r"\[([a-z-]+)\]'", README) + re.findall(r"personatlas\[([a-z-]+)\]", README):
        assert name in PROJECT["optional-dependencies"]
    assert not re.findall(r"pip install '?personatlas(?!\[lm-eval\] @)", README)  # it is in no registry


def test_make_install_ends_with_the_line_that_activates_the_environment():
    last = made("--dry-run", "install").splitlines()[-1]
    assert "source .venv/bin/activate" in last
    assert "make install && source .venv/bin/activate" in README


@pytest.mark.slow
def test_a_clone_is_installed_and_its_command_runs(tmp_path):
    clone = tmp_path / "personatlas"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    assert "source .venv/bin/activate" in made("install", folder=clone).splitlines()[-1]
    shell = "source .venv/bin/activate && personatlas --version && personatlas train plan --depth 4"
    done = subprocess.run(["bash", "-c", shell], cwd=clone, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert PROJECT["version"] in done.stdout
    own = tmp_path / "own"
    source = f"personatlas @ git+file://localhost{clone}"
    install = f"python3 -m venv {own} && {own}/bin/pip install --no-deps '{source}'"
    subprocess.run(["bash", "-c", install], check=True, capture_output=True)
    packages = next((clone / ".venv").glob("lib/*/site-packages"))  # what it needs, without a second download
    shown = subprocess.run(
        [own / "bin" / "personatlas", "--version"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(packages)},
    )
    assert PROJECT["version"] in shown.stdout
