"""The verdict of an evaluation and its page: what is said first, what rules cannot see, and answers that are filtered."""

from dataclasses import replace

import pytest
from eval_results import make_result

from personatlas.cli.eval_tables import print_evaluation
from personatlas.steering.evals.page import write_eval_page
from personatlas.steering.evals.verdict import find_change, main_outcome, p_value, write_verdict


def verdict_of(result):
    return write_verdict(result)[0].text


def test_a_change_is_said_with_its_shares_its_interval_and_its_control():
    text = verdict_of(make_result(harm=(0.8, 0.2), cost=0.156))
    assert "fewer harmful answers to harmful requests: " in text
    assert "a random control " in text
    assert text.index("fewer") < text.index("costs 15.6% [")


def test_no_change_says_what_would_not_have_been_seen():
    result = make_result(harm=(0.5, 0.5), n=30)
    text = verdict_of(result)
    change = find_change(result, "harm", "harmful", "assistant").change
    assert (
        f"no change in harmful answers to harmful requests shown; under {100 * change.smallest:.0f} points"
        in text
    )


def test_what_rules_saw_is_said_to_comply_and_never_to_be_harmful():
    result = make_result(harm=(1.0, 1.0), judge="rules:123")
    assert main_outcome(result, "harm") == "complied"
    assert "compliant answers" in verdict_of(result)
    assert "harmful answers" not in " ".join([verdict_of(result), *write_verdict(result)[0].details])


def test_a_baseline_alone_is_described():
    (verdict,) = write_verdict(make_result(arms=("baseline",)))
    assert "nothing is compared" in verdict.text
    assert verdict.details


def test_an_arm_that_never_fired_is_said_to_have_done_nothing():
    result = make_result()
    silent = {name: replace(row, fired=0.0) for name, row in result.suites["harm"].arms.items()}
    suites = {name: replace(suite, arms=silent) for name, suite in result.suites.items()}
    assert verdict_of(replace(result, suites=suites)) == "it never fired, so its answers are the model's own"


def test_p_has_two_digits_and_is_never_zero():
    assert [p_value(p) for p in (0.0, 0.0004, 0.0312, 0.5, float("nan"))] == [
        "< 0.001",
        "< 0.001",
        "0.031",
        "0.5",
        "·",
    ]


@pytest.mark.parametrize("width", [60, 200])
def test_the_terminal_leads_with_the_verdict(width, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("COLUMNS", str(width))
    print_evaluation(make_result(), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("assistant: ")
    assert "\x1b[" not in "".join(lines)
    assert max(len(line) for line in lines if str(tmp_path) not in line) <= width


def test_answers_are_filtered_by_arm_outcome_category_and_words(browser, tmp_path):
    result = make_result(n=40, categories=2, suite="over-refusal")
    write_eval_page(tmp_path / "eval.html", result)
    page = browser.new_page()
    page.goto((tmp_path / "eval.html").as_uri())
    count = page.locator("#count")
    assert count.inner_text() == "40 of 40 cases"
    page.select_option("[name=category]", "category 1")
    assert count.inner_text() == "20 of 40 cases"
    page.select_option("[name=change]", "better")
    assert 0 < int(count.inner_text().split()[0]) < 20
    assert "better with assistant" in page.locator(".case").first.inner_text().replace("\n", " ")
    page.select_option("[name=change]", "")
    page.fill("[name=words]", "number 7 ")
    assert count.inner_text() == "1 of 40 cases"
    assert page.locator(".case b").count() == 0  # markup of an answer is text
    assert "<b>" in page.locator(".case .answer").first.inner_text()
    page.close()
