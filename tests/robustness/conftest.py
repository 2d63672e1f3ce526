"""A folder in which every command can be run, made once, and copies of it."""

import shutil

import pytest
from every_command import make_workbench

from personatlas.training.chat import samples as reply_samples
from personatlas.training.loop import samples


@pytest.fixture(scope="session", autouse=True)
def short_samples():
    """Samples of few tokens: they are more than half of the time that so small a run takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(samples, "LENGTH", 4)
        patch.setattr(reply_samples, "LENGTH", 4)
        yield


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
