"""Every page of a study as it is drawn: nothing is wider than its place, on nothing else, or too pale to read."""

from functools import cache

import pytest
from sample_pages import PAGES, SIZES, write_pages
from serve_page import LOOK

USUAL = (
    "report, few roles",
    "emergence, large",
    "trace, many",
    "generate, four arms",
    "evaluation, large",
    "drift, large",
)
VIEWS = [(*size, scheme) for size in SIZES for scheme in ("light", "dark")]
CASES = [(name, view) for name in PAGES for view in VIEWS]
USUAL_CASES = [(name, view) for name in USUAL for view in (VIEWS[0], VIEWS[-1])]


@pytest.fixture(scope="module")
def page_of(tmp_path_factory):
    """A page's file by its name, written once."""
    folder = tmp_path_factory.mktemp("pages")
    return cache(lambda name: next(iter(write_pages(folder, name).values())))


def looked_at(browser, path, *, scheme, width, height):
    """What is wrong with a page in a window: by its look, and in its console."""
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        offline=True,
        reduced_motion="reduce",
    )
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.goto(path.as_uri())
    wrong += page.evaluate(LOOK)
    context.close()
    return wrong


@pytest.mark.parametrize(
    ("name", "view"),
    [
        pytest.param(
            *case,
            id=f"{case[0]}, {case[1][0]} {case[1][2]}",
            marks=[] if case in USUAL_CASES else pytest.mark.robustness,
        )
        for case in CASES
    ],
)
def test_a_page_is_legible(browser, page_of, name, view):
    width, height, scheme = view
    assert looked_at(browser, page_of(name), scheme=scheme, width=width, height=height) == []


def test_the_look_finds_what_is_cut_pale_or_on_something_else(browser, tmp_path):
    path = tmp_path / "bad.html"
    path.write_text(
        """<body style="background:#fff;margin:0"><p style="color:#bbb">pale</p>
        <p style="width:60px;overflow:hidden;white-space:nowrap">cut at its end by its own box</p>
        <p style="white-space:nowrap;width:2000px">wide</p>
        <div class="chart"><svg width="200" height="40"><text x="5" y="20">one</text><text x="9" y="22">two</text></svg></div>"""
    )
    wrong = looked_at(browser, path, scheme="light", width=390, height=844)
    for said in (
        "contrast 1.9: pale",
        "cut without its whole text in a title: cut",
        "px wide in 390",
        "a label on “two”: one",
    ):
        assert any(said in line for line in wrong), (said, wrong)


def test_a_page_says_what_it_says_without_scripts_and_without_a_network(browser, page_of):
    context = browser.new_context(java_script_enabled=False, offline=True)
    page = context.new_page()
    page.goto(page_of("trace, many").as_uri())
    assert "200 of 300 conversations raise the alarm" in page.locator(".lead").inner_text()
    assert page.locator(".names tbody tr").count() == 100
    context.close()
