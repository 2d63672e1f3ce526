"""The report says what was found, stands alone, and gives nobody's text a chance to run."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from personatlas.analysis.fit.figures import figures
from personatlas.analysis.fit.page import write_report
from personatlas.analysis.fit.result import FitResult
from personatlas.analysis.html import page as pages
from personatlas.persona.rollout import Rollout

XSS = """</script><script>alert(1)</script>"'><img src=x onerror=alert(2)>{{ 7*7 }}%{x}"""
NULL = {
    "norm": 1.0,
    "norm_95": 1.4,
    "p_norm": 0.01,
    "cos_pc1": 0.2,
    "cos_pc1_95": 0.5,
    "p_cos_pc1": 0.01,
    "n": 50,
}
NAMES = ("pirate", "ghost", "bard", "teacher", "analyst", "default")


def an_interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "n": 50}


def a_layer(number: int, *, bare: bool = False) -> dict[str, Any]:
    line: dict[str, Any] = {
        "layer": number,
        "norm": 3.0,
        "cos_pc1": 0.8,
        "angle_pc1": 36.9,
        "variance_pc1": 0.4,
    }
    if bare:
        return line
    both = {"cos_pc1_by_roles": an_interval(0.8), "cos_pc1_by_questions": an_interval(0.8), "wobble": 12.0}
    return {
        **line,
        **both,
        "split_half": an_interval(0.7),
        "split_roles": an_interval(0.6),
        "null": dict(NULL),
    }


def a_role(name: str, place: float, *, positive: bool, bare: bool, n_components: int = 3) -> dict[str, Any]:
    coordinates = [place, -place / 2, 0.3 * place][:n_components]
    row = {"role": name, "projection": place, "n": 4, "coordinates": coordinates, "positive": positive}
    return row if bare else {**row, "low": place - 0.5, "high": place + 0.5}


def a_fit(
    names: tuple[str, ...] = NAMES, positive: str = "default", *, bare: bool = False, n_components: int = 3
) -> dict[str, Any]:
    """A fit as `personatlas run fit` writes it; `bare` is one whose layers kept no rollout means."""
    ordered = [*(name for name in names if name != positive), positive]
    roles = [
        a_role(name, i - 4.0, positive=name == positive, bare=bare, n_components=n_components)
        for i, name in enumerate(ordered)
    ]
    return {
        "asked": {
            "content": "c" * 64,
            "version": 1,
            "keep": "small",
            "positive": None,
            "layer": None,
            "replicates": 50,
        },
        "artefacts": {"axis": "a" * 64, "space": "b" * 64},
        "layers": [a_layer(number, bare=bare) for number in range(4)],
        "layer": 2,
        "why": "highest product",
        "poles": ["assistant", "role-play"] if positive == "default" else [positive, "others"],
        "positive": positive,
        "roles": roles,
        "variance_ratio": [0.5, 0.3, 0.15, 0.05],
        "components_for": {"0.5": 1, "0.7": 2, "0.9": 3},
        "projections": {
            "positive": [] if bare else [1.0, 2.0],
            "others": [] if bare else [-3.0, -1.0, 0.5, 1.5],
        },
        "n_rollouts": 6,
        "curve": None,
        "controls": [
            {
                "name": "neutral_facts",
                "projection": -3.0,
                "place": {"value": 0.7, "low": 0.6, "high": 0.8, "n": 4},
            }
        ],
        "by_score": [{"score": 1, "n": 3, "roles": 3, "cosine": 0.97}],
        "traits": None,
        "trait_problem": None,
        "compared": None,
        "default": "default",
        "model": {
            "id": "a/model",
            "weights": "bf16",
            "revision": None,
            "fingerprint": "f",
            "n_layers": 4,
            "d_model": 8,
        },
        "dropped": {
            "by_score": {"ghost": {"0": 2, "unjudged": 1}},
            "empty": {"bard": 1},
            "roles": {"elf": "none left"},
        },
        "role_play": None if bare else {"share": 0.6, "n": 40, "interval": (0.44, 0.74)},
    }


def a_rollout(role: str, *, question: str = "q1", answer: str = "Ahoy.", score: int | None = 3) -> Rollout:
    said = (
        {"role": "system", "content": f"Be {role}."},
        {"role": "user", "content": f"Who are you, {question}?"},
    )
    return Rollout(f"{role}/0/{question}/0", said, (1,), (2,), answer, 0, "length", score)


def a_manifest() -> dict[str, Any]:
    asked = {
        "model_name": "a/model",
        "seed": 7,
        "prompts": None,
        "questions": 2,
        "roles": ["default", "pirate", "the bard"],
    }
    judge = {"id": "rules-1", "counts": {"0": 2, "1": 3, "2": 0, "3": 4}, "unscored": 1}
    gate = {"share": 0.4, "n": 10, "low": 0.2, "high": 0.6, "judge": "rules-1"}
    return {
        "asked": asked,
        "versions": {"torch": "2"},
        "created": "2026-01-02T03:04:05",
        "judge": judge,
        "gate": gate,
    }


class Page(HTMLParser):
    """What a browser would see: the tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.tags, self.text, self.inside = source, list[tuple[str, dict[str, Any]]](), "", ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""
        self.text += " " if tag in ("td", "th") else ""

    def handle_data(self, data: str) -> None:
        self.text += "" if self.inside else data

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    def figures(self) -> dict[str, Any]:
        found = re.search(
            r'<script type="application/json" id="figures">(.*?)</script>', self.source, re.DOTALL
        )
        assert found
        return json.loads(found[1])


@pytest.fixture(autouse=True, scope="module")
def _a_short_plotly() -> Iterator[None]:
    """4.5 MB of plotly.js are written and read by one test only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "get_plotlyjs", lambda: "/* plotly */")
        yield


@pytest.fixture(scope="module")
def page(_a_short_plotly: None, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The report of a whole fit, for tests that only read it."""
    return written(tmp_path_factory.mktemp("report"), a_fit(), [a_rollout(name) for name in NAMES])


def written(
    folder: Path, fit: dict[str, Any], rollouts: Any = (), manifest: dict[str, Any] | None = None
) -> Page:
    path = folder / "report.html"
    write_report(
        path,
        FitResult.from_json(fit),
        rollouts,
        a_manifest() if manifest is None else manifest,
        "stamp0123456789",
    )
    assert [file.name for file in folder.iterdir()] == ["report.html"]  # no temporary file is left
    return Page(path.read_text(encoding="utf-8"))


def test_the_stamp_stands_at_the_top(page: Page) -> None:
    assert '<meta name="personatlas-stamp" content="stamp0123456789">' in page.source[:4000]


def test_a_page_shows_every_role_and_every_figure(page: Page) -> None:
    assert set(page.figures()) == {"layers", "variance", "plane", "cloud", "answers"}
    assert {tag["data-figure"] for _, tag in page.tags if "data-figure" in tag} == set(page.figures())
    assert all(name in page.words for name in NAMES)
    assert "★ default 1.00 0.50 to 1.50 4" in page.words
    assert "points to it (p ≤ 0.01)" in page.words


def test_nobodys_text_can_run(tmp_path: Path) -> None:
    fit = a_fit((*NAMES[:3], XSS, *NAMES[4:]), positive=XSS)
    fit["model"]["id"] = fit["why"] = XSS
    fit["dropped"]["roles"][XSS] = XSS
    manifest = a_manifest()
    manifest["asked"] |= {"model_name": XSS, "system": XSS}
    manifest["judge"]["id"] = manifest["gate"]["judge"] = manifest["created"] = XSS
    rollouts = [a_rollout("pirate", answer=XSS + " word" * 400), a_rollout(XSS.replace("/", ""), answer=XSS)]
    page = written(tmp_path, fit, rollouts, manifest)
    assert [tag for tag, _ in page.tags if tag == "script"] == ["script"] * 3
    assert "img" not in [tag for tag, _ in page.tags]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert XSS in page.text  # shown as it is written, templates and all
    body = page.source[page.source.index("<body>") :]
    assert "alert(1)</script>" not in body
    assert "<script>alert" not in body


def test_texts_in_figures_carry_no_markup(tmp_path: Path) -> None:
    fit = a_fit(("<a href='http://x'>elf</a>", *NAMES))
    figure = written(tmp_path, fit).figures()["plane"]
    texts = json.dumps([trace.get("text") for trace in figure["data"]])
    assert "&lt;a href=" in texts  # plotly reads a little markup, links among it
    assert "<a" not in texts


def test_no_script_but_the_pages_own_may_run(page: Page) -> None:
    policy = next(
        tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    assert "unsafe-eval" not in policy
    assert policy.count("sha256-") == 2


def test_nothing_is_loaded_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "get_plotlyjs", get_plotlyjs)
    page = written(tmp_path, a_fit(), [a_rollout("pirate", answer="see https://example.org")])
    assert len(page.source) > 4_000_000
    loading = [
        (tag, at) for tag, at in page.tags if tag in ("script", "link", "img", "iframe", "object", "embed")
    ]
    assert [tag for tag, _ in loading] == ["script"] * 3
    assert not [at for _, at in loading if "src" in at or "href" in at]
    assert "url(" not in re.sub(r"<script.*?</script>", "", page.source, flags=re.DOTALL)


def test_layers_without_rollout_means_still_give_a_page(tmp_path: Path) -> None:
    page = written(tmp_path, a_fit(bare=True), (), {})
    assert set(page.figures()) == {"layers", "variance", "plane", "cloud"}
    assert "The null is not known" in page.words
    assert "No rollout means were kept at this layer" in page.words
    assert "No judge has scored these answers" in page.words


def test_a_band_bridges_no_layer_that_lacks_it() -> None:
    fit = a_fit()
    fit["layers"] = [a_layer(number, bare=number in (1, 4)) for number in range(6)]
    bands = [
        trace
        for trace in figures(FitResult.from_json(fit))["layers"].data
        if trace.fill == "toself" and "accent" in trace.fillcolor
    ]
    assert [sorted({round(x) for x in band.x}) for band in bands] == [[0], [2, 3], [5]] * 2


@pytest.mark.parametrize("n_components", [1, 2])
def test_a_space_of_few_dimensions_leaves_figures_out(tmp_path: Path, n_components: int) -> None:
    fit = a_fit(n_components=n_components)
    fit["variance_ratio"] = fit["variance_ratio"][:n_components]
    assert ("plane" in written(tmp_path, fit).figures()) == (n_components == 2)
    assert "cloud" not in figures(FitResult.from_json(fit))


def test_another_character_can_be_the_positive_pole(tmp_path: Path) -> None:
    page = written(
        tmp_path, a_fit(positive="pirate"), [a_rollout("pirate"), a_rollout("default", score=None)]
    )
    assert "grows toward “pirate” and falls toward “others”" in page.words
    assert {"pole", "default"} <= {tag.get("class") for _, tag in page.tags}
    star = next(
        trace for trace in page.figures()["plane"]["data"] if trace.get("marker", {}).get("symbol") == "star"
    )
    assert "<b>pirate</b>" in star["text"][0]


@pytest.mark.parametrize(
    ("p_norm", "p_cos", "said"),
    [(0.3, 0.3, "the axis is not distinguishable from chance"), (0.01, 0.3, "use the axis, not PC1")],
)
def test_what_chance_would_give_is_said_first(tmp_path: Path, p_norm: float, p_cos: float, said: str) -> None:
    fit = a_fit()
    fit["layers"][2]["null"] |= {"p_norm": p_norm, "p_cos_pc1": p_cos}
    assert said in written(tmp_path, fit).words


def test_all_that_was_dropped_is_shown(page: Page) -> None:
    assert (
        "6 of 6 answers went into the fit (keeping “small”): 3 were dropped by their score, 1 as empty, and 1 whole role was"
        in page.words
    )
    assert "role score 0 unjudged empty role dropped" in page.words
    assert "none left" in page.words


def test_samples_are_answers_to_the_same_questions(tmp_path: Path) -> None:
    rollouts = [a_rollout("default", question=f"q{i}", answer=f"default {i}", score=None) for i in range(5)]
    rollouts += [a_rollout("pirate", question=f"q{i}", answer=f"pirate {i}") for i in (3, 4)]
    words = written(tmp_path, a_fit(), rollouts).words
    assert all(f"{role} {i}" in words for role in ("default", "pirate") for i in (3, 4))
    assert "default 0" not in words
    assert "score 3: fully in the role" in words


def test_a_long_answer_is_folded_and_whole(tmp_path: Path) -> None:
    answer = " ".join(f"word{i}" for i in range(300))
    page = written(tmp_path, a_fit(), [a_rollout("pirate", answer=answer)])
    shown = re.sub(r"<details><summary>.*?</summary>|</?[a-z]+>", "", page.source)
    assert answer in shown
    assert "more characters" in page.words


def test_projections_of_single_answers_are_shown_where_the_fit_names_them(tmp_path: Path) -> None:
    fit = a_fit()
    fit["projections"]["keys"] = {
        "positive": ["default/0/q1/0", "default/0/q2/0"],
        "others": [f"x/0/q{i}/0" for i in range(4)],
    }
    assert "projection 1.00" in written(tmp_path, fit, [a_rollout("default")]).words


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path: Path) -> None:
    assert (
        "broken ? pair"
        in written(tmp_path, a_fit(), [a_rollout("pirate", answer="broken \ud83d pair")]).words
    )


def test_the_command_makes_the_run_again_and_quotes_what_came_from_others(tmp_path: Path) -> None:
    manifest = a_manifest()
    manifest["asked"]["model_name"] = "a; rm -rf ~"
    manifest["judge"]["id"] = "local:hub/judge:1234abcd:56ef"
    words = written(tmp_path, a_fit(), (), manifest).words
    assert (
        "personatlas axis 'a; rm -rf ~' \\ --plan paper \\ --roles 'pirate,the bard' \\ --questions 2 \\ --seed 7"
        in words
    )
    assert "--judge local:hub/judge \\ --keep small" in words


def test_the_command_names_the_plan_that_the_run_was_made_with(tmp_path: Path) -> None:
    manifest = a_manifest()
    for recorded in (
        {"plan": "demo", "max_new_tokens": 32},
        {"prompts": 1, "questions": 16, "max_new_tokens": 32},  # as earlier versions recorded it
    ):
        manifest["asked"] = {"model_name": "mine", **recorded}
        assert "personatlas axis mine \\ --plan demo" in written(tmp_path, a_fit(), (), manifest).words


def test_a_system_prompt_that_the_template_adds_is_called_that(tmp_path: Path) -> None:
    bare = replace(a_rollout("default"), messages=({"role": "user", "content": "Who are you?"},))
    manifest = a_manifest()
    assert "no system prompt" in written(tmp_path, a_fit(), (bare,), manifest).words
    manifest["asked"]["injected_system"] = "You are a helpful assistant."
    words = written(tmp_path, a_fit(), (bare,), manifest).words
    assert "none given; the chat template's own You are a helpful assistant." in words
    assert "no system prompt" not in words


def test_headings_go_down_one_level_at_a_time(page: Page) -> None:
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_chart_has_a_label_and_colours_that_the_page_knows(page: Page) -> None:
    assert all(tag["aria-label"] for _, tag in page.tags if "data-figure" in tag)
    used = set(re.findall(r"var\((--[a-z-]+)\)", json.dumps(page.figures())))
    defined = set(re.findall(r"(--[a-z-]+):", page.source.split("</style>")[0]))
    assert used
    assert used <= defined
