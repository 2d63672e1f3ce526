"""A folder in which every command can be run, made once, and copies of it."""

import shutil

import pytest
from base_runs import short_samples  # noqa: F401 (a fixture)
from every_command import make_workbench


@pytest.fixture(scope="session")
def whole_workbench(tmp_path_factory):
    return make_workbench(tmp_path_factory.mktemp("workbench") / "whole")


@pytest.fixture
def workbench(whole_workbench, tmp_path, monkeypatch):
    """A function that makes a fresh copy of the folder and changes into it."""

    def fresh():
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        folder = shutil.copytree(whole_workbench, tmp_path / "copy")
        monkeypatch.chdir(folder)
        return folder

    return fresh
