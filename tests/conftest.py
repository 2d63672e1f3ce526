"""Shape annotations are checked in the tests: every jaxtyping signature of the package runs under beartype here."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # before the first kernel is defined: kernels run without a GPU

ROOT = Path(__file__).parent.parent
FOLDERS = [
    ROOT / "tests",
    *(path for path in (ROOT / "tests").rglob("*") if path.is_dir() and path.name != "__pycache__"),
]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), os.environ.get("PYTHONPATH", "")]).rstrip(
    os.pathsep
)  # for the processes that tests start
# Triton reads its kernels' source, which the hook would wrap
MODULES = [
    ".".join(("personatlas", *path.relative_to(ROOT).with_suffix("").parts)).replace(
        "personatlas.personatlas", "personatlas"
    )
    for folder in ("personatlas", "persona", "analysis", "steering", "training")
    for path in (ROOT / folder).rglob("*.py")
    if path.stem not in ("__init__", "kernels")
]
install_import_hook(MODULES, "beartype.beartype")

LONG = ("test_notebooks", "test_pretrain", "test_stages", "test_resume")


def pytest_collection_modifyitems(items):
    """The longest files first: a process that is given one when the others have nothing left to do keeps them waiting."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture
def triton_interpreter():
    """Kernels as the interpreter runs them, where Triton is installed; `test_gpu.py` runs them on a GPU."""
    pytest.importorskip("triton")
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("there is a GPU: test_gpu.py runs the kernels themselves")


@pytest.fixture(scope="module")
def tiny_run(whole_run, tmp_path_factory):
    """A folder with a tiny model ("tiny"), a bank of six roles ("bank") and a whole run over them ("run"), for one file's tests: what
    they put beside the run is not found by another file's."""
    return shutil.copytree(whole_run, tmp_path_factory.mktemp("tiny") / "own")


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """The same, made once and left as it is."""
    from banks import write_bank
    from families import save_tiny

    from personatlas.cli.app import main

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny(folder / "tiny")
    bank = write_bank(folder / "bank")
    how = "--plan standard --device cpu --dtype float32 --samples 4 --chunk 32 --max-new-tokens 8 --judge none --keep all --replicates 4"
    main(["axis", str(folder / "tiny"), "--bank", str(bank), "--out", str(folder / "run"), *how.split()])
    return folder


@pytest.fixture(
    scope="module"
)  # not longer: other tests start processes, which forks of many threads take ill
def tiny_server(tiny_run, tmp_path_factory):
    """The real server around the tiny model, with the caps `held` and `firm`, in a thread (serving.Served)."""
    from serving import axis_folder, served, tiny_service

    folder = axis_folder(tiny_run, tmp_path_factory.mktemp("served"))
    with served(tiny_service(tiny_run, folder)) as server:
        yield server


@pytest.fixture(scope="module")
def fake():
    """A stand-in for the server behind the page."""
    from fake_serve import FakeServe

    with FakeServe() as fake:
        yield fake


@pytest.fixture(scope="module")
def browser():
    """Chromium, if there is one."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page is tested in Debian's chromium: apt-get install chromium")
    from serve_page import sync_api

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desk(browser):
    """A window of a desktop computer's size."""
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    yield context
    context.close()


@pytest.fixture
def visit(browser, desk, fake):
    """Opens the page. At the end nothing may have gone wrong on it: no exception, nothing refused by the page's policy."""
    from serve_page import PATIENCE, expect

    fake.reset()
    opened, wrong = [], []

    def note(message):
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def open_page(ready=True, scheme="light", **how):
        page = browser.new_page(**how) if how else desk.new_page()
        page.set_default_timeout(PATIENCE)
        page.emulate_media(color_scheme=scheme)
        opened.append(page)
        page.on("console", note)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("dialog", lambda dialog: wrong.append(f"dialog: {dialog.message}"))
        page.goto(fake.url)
        if ready:
            expect(page.locator("#send")).to_be_enabled()
        return page

    yield open_page
    for page in opened:
        hit = page.evaluate(
            "[document.getElementById('keep').checked = false, localStorage.clear(), window.hit][2]"
        )
        page.close()
        assert hit is None, "a script of a text ran"
    assert wrong == []
