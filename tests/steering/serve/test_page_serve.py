"""Talking on the page of `personatlas serve`, in a real browser, against a stand-in of the server that needs no model."""

import json
import re

import pytest
from serve_page import MARKDOWN, expect, file_of, saved, say, settled

from personatlas.persona.formats import read_conversations


def test_an_answer_streams_and_its_point_moves_with_it(visit, fake):
    page = visit()
    expect(page.locator("#chart .band")).to_have_count(1)
    say(page, "How do I read a file?")
    expect(page.locator(".tokens")).to_contain_text("one by one")
    fake.behaviour.delay = 0.03
    page.fill("#say", "And then?")
    page.press("#say", "Enter")
    live = page.locator("#chart .point.live")
    expect(live).to_have_count(1)
    expect(page.locator(".answer.live .tokens")).to_contain_text("tired")
    expect(
        page.locator(".answer.live .t").nth(4)
    ).to_be_attached()  # measured tokens, while the newest word is still bare
    first = live.get_attribute("data-value")
    expect(live).not_to_have_attribute("data-value", first)
    settled(page)
    expect(page.locator("#chart .point")).to_have_count(2)
    assert [message["role"] for message in fake.requests[1]["messages"]] == ["user", "assistant", "user"]
    assert fake.requests[1]["persona"] == {"arm": None, "mode": "always", "per_token": True}
    said = "".join(page.locator(".tokens").nth(1).locator(".t").all_text_contents())
    assert said == page.locator(".tokens").nth(1).text_content()


def test_a_conversation_that_drifts_shows_its_alarm_where_it_was_raised(visit):
    page = visit()
    for text in ("one", "two", "three", "four", "five"):
        say(page, text)
    expect(page.locator("#chart .point.raised")).to_have_count(1)
    raised = int(page.locator("#chart .point.raised").get_attribute("data-turn"))
    expect(page.locator("#state")).to_have_text(f"Drifting since answer {raised + 1}.")
    expect(page.locator("#chart .alarm-bar")).to_have_count(5 - raised)
    page.click("#table-toggle")
    expect(page.locator("#table tbody tr").nth(raised)).to_contain_text("raised")
    page.locator("#chart .point").first.click()
    expect(page.locator("#turn-0")).to_be_focused()


def test_an_answer_below_the_band_is_not_called_calm_and_the_alarm_says_how_near_it_is(visit, fake):
    page = visit()
    page.click("#how summary")
    page.fill("#system", "You are a ghost.")
    page.fill("#seed", "1")
    say(page, "one")
    expect(page.locator("#state")).to_have_text(
        re.compile(r"^Within the calm band, the alarm’s sum at [01]\.\d of 4\.0\.$")
    )
    say(page, "two")
    expect(page.locator("#state")).to_have_text(
        re.compile(r"^Below the calm band, the alarm’s sum at [23]\.\d of 4\.0\.$")
    )
    expect(page.locator("#readouts")).to_contain_text("of 4.0")


def test_markdown_is_laid_out_and_nothing_of_it_becomes_markup_or_is_lost(visit, fake):
    page = visit()
    fake.behaviour.text = MARKDOWN
    say(page, "Show me")
    box = page.locator(".tokens")
    assert box.text_content() == MARKDOWN
    assert "".join(box.locator(".t").all_text_contents()) == MARKDOWN
    expect(box.get_by_role("heading")).to_contain_text("A first try", use_inner_text=True)
    expect(box.locator("strong")).to_have_text(["each ", "line"])
    expect(box.locator("strong em")).to_have_text(["line"])
    expect(box.locator("code")).to_have_text(["sum(x)"])
    expect(box.locator(".item")).to_have_text(
        [re.compile("open"), re.compile("then"), re.compile("1. close")]
    )
    expect(box.locator("pre").first).to_have_text(
        'with open("x") as file:\n    print("**not bold**")\n', use_inner_text=True
    )
    assert box.locator("a, b[onclick], script").count() == 0
    expect(box).to_contain_text(
        '<b onclick="alert(1)">this</b> [link](javascript:alert(1))', use_inner_text=True
    )
    assert "**each" not in box.inner_text()
    page.click("#colours")  # marks are tokens too
    assert "**each" in box.inner_text()
    page.reload()
    assert box.text_content() == MARKDOWN


def test_the_cap_and_the_sampling_that_are_chosen_are_asked_for(visit, fake):
    page = visit()
    page.select_option("#arm", "firm")
    page.select_option("#mode", "adaptive")
    expect(page.locator("#chart .floor")).to_have_count(1)
    page.click("#how summary")
    page.fill("#temperature", "0.3")
    page.fill("#max_tokens", "50")
    page.fill("#seed", "7")
    page.click("#roles button >> nth=0")
    say(page, "Hello")
    request = fake.requests[0]
    assert request["persona"] == {"arm": "firm", "mode": "adaptive", "per_token": True}
    assert (request["temperature"], request["max_tokens"], request["seed"], request["stream"]) == (
        0.3,
        50,
        7,
        True,
    )
    assert request["messages"][0]["role"] == "system"
    assert "lighthouse" in request["messages"][0]["content"]
    assert "top_p" not in request
    page.fill("#temperature", "9")
    say(page, "Not sent")
    expect(page.locator("#line")).to_have_text("Temperature must be a number from 0 to 2.")
    assert page.input_value("#say") == "Not sent"
    assert len(fake.requests) == 1


def test_compared_sides_hear_the_same_words_and_keep_their_own_histories(visit, fake):
    page = visit()
    say(page, "Before")
    page.click("#compare")
    say(page, "First")
    say(page, "Second")
    plain, capped = sorted(fake.requests[3:], key=lambda request: request["persona"]["arm"] or "")
    assert (plain["persona"]["arm"], capped["persona"]["arm"]) == (None, "assistant")
    assert plain["seed"] == capped["seed"]
    for place, same in enumerate(
        (True, True, True, False, True)
    ):  # Before, its answer, First, its two answers, Second
        assert (plain["messages"][place] == capped["messages"][place]) is same
    expect(page.locator("#chart .line.second")).to_have_count(1)
    expect(page.locator("#chart .point")).to_have_count(5)
    page.locator(".answer.capped").last.get_by_role("button", name="Continue from this answer").click()
    expect(page.locator(".answer.aside")).to_have_count(2)
    page.click("#compare")
    say(page, "Third")
    assert fake.requests[-1]["messages"][:-2] == capped["messages"]
    assert (
        fake.requests[-1]["messages"][-2]["content"]
        == page.locator(".answer.capped .tokens").nth(1).text_content()
    )


def test_after_a_comparison_the_conversation_goes_on_as_it_is(visit, fake):
    page = visit()
    page.click("#compare")
    say(page, "First")
    page.select_option("#arm", "")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "false")
    say(page, "Second")
    assert (
        fake.requests[-1]["messages"][1]["content"]
        == page.locator(".answer.plain .tokens").first.text_content()
    )
    expect(page.locator(".answer.aside.capped")).to_have_count(1)


def test_escape_stops_an_answer_and_what_was_said_stays(visit, fake):
    page = visit()
    fake.behaviour.delay = 0.04
    page.fill("#say", "Go on")
    page.press("#say", "Enter")
    expect(page.locator(".tokens")).to_contain_text("good place")
    page.keyboard.press("Escape")
    settled(page)
    expect(page.locator(".facts")).to_contain_text("stopped by you")
    part = page.locator(".tokens").text_content()
    assert 0 < len(part) < 150
    fake.behaviour.delay = 0
    say(page, "And on")
    assert fake.requests[1]["messages"][1] == {"role": "assistant", "content": part}
    assert fake.stopped == 1


@pytest.mark.parametrize(
    ("trouble", "said"),
    [
        ({"status": 503}, "all slots are busy"),
        ({"break_after": 4}, "out of memory"),
        ({"cut_after": 4}, "The answer broke off"),
    ],
)
def test_an_error_stands_in_its_place_and_can_be_tried_again(visit, fake, trouble, said):
    page = visit()
    say(page, "Fine")
    for name, value in trouble.items():
        setattr(fake.behaviour, name, value)
    say(page, "Not fine")
    problem = page.locator(".answer .problem").last
    expect(problem).to_contain_text(said)
    page.reload()
    expect(problem).to_contain_text(said)
    expect(page.locator(".user .text")).to_have_text(["Fine", "Not fine"])
    fake.reset()
    problem.get_by_role("button", name="Retry").click()
    settled(page)
    expect(problem).to_be_hidden()
    expect(page.locator(".tokens").last).to_contain_text("tired")
    assert [message["content"] for message in fake.requests[0]["messages"]][::2] == ["Fine", "Not fine"]


def test_a_message_that_failed_is_not_shown_to_the_model_later(visit, fake):
    page = visit()
    fake.behaviour.status = 500
    say(page, "Lost")
    fake.reset()
    say(page, "AnswerStream")
    assert fake.requests[0]["messages"] == [{"role": "user", "content": "AnswerStream"}]
    expect(page.locator(".turn.out")).to_contain_text("the model does not see this message")


def test_trying_again_takes_a_new_seed_and_editing_replaces_the_last_message(visit, fake):
    page = visit()
    say(page, "First")
    say(page, "Secnod")
    page.get_by_role("button", name="Try again").click()
    settled(page)
    assert fake.requests[2]["messages"] == fake.requests[1]["messages"]
    assert fake.requests[2]["seed"] != fake.requests[1]["seed"]
    fake.behaviour.status = 500
    before = page.locator(".tokens").last.text_content()
    page.get_by_role("button", name="Try again").click()
    expect(page.locator("#line")).to_contain_text("still here")
    expect(page.locator(".tokens").last).to_have_text(before)
    fake.behaviour.status = None
    page.focus("#say")
    page.keyboard.press("ArrowUp")
    assert page.input_value("#say") == "Secnod"
    say(page, "Second")
    assert [message["content"] for message in fake.requests[-1]["messages"] if message["role"] == "user"] == [
        "First",
        "Second",
    ]
    expect(page.locator(".user .text")).to_have_text(["First", "Second"])


def test_a_saved_conversation_can_be_traced_and_comes_back_whole(visit, fake, tmp_path):
    page = visit()
    page.click("#how summary")
    page.fill("#system", "You are a ghost.")
    say(page, "One")
    page.click("#compare")
    say(page, "Two")
    path = saved(page, tmp_path)
    (told,) = read_conversations(path)
    assert [message["role"] for message in told.messages] == [
        "system",
        "user",
        "assistant",
        "user",
        "assistant",
    ]
    points = [page.locator("#chart .point").nth(place).get_attribute("data-value") for place in range(3)]
    other = visit()
    other.set_input_files("#file", path)
    expect(other.locator("#chart .point")).to_have_count(3)
    assert [
        other.locator("#chart .point").nth(place).get_attribute("data-value") for place in range(3)
    ] == points
    assert other.input_value("#system") == "You are a ghost."
    assert other.locator(".answer.capped .t").count() > 10
    changed = json.loads(path.read_text())
    changed["messages"][2]["content"] = "Something else."
    other.set_input_files("#file", file_of(changed))
    expect(other.locator("#line")).to_contain_text("were changed after it was saved")
    expect(other.locator("#chart .point")).to_have_count(0)
    other.get_by_role("button", name="Undo").click()
    expect(other.locator("#chart .point")).to_have_count(3)
    foreign = json.loads(path.read_text())
    foreign["personatlas"]["layer"] = 9
    other.set_input_files("#file", file_of(foreign))
    expect(other.locator("#line")).to_contain_text("layer 9: its projections lie on another axis")


def test_conversations_of_other_forms_are_read_and_traced_with_the_next_answer(visit):
    page = visit()
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    page.set_input_files("#file", file_of(share))
    expect(page.locator(".tokens")).to_have_text(["Hello"])
    expect(page.locator("#chart .point")).to_have_count(0)
    expect(page.locator("#state")).to_have_text("These answers are measured with the next one.")
    say(page, "Go on")
    expect(page.locator("#chart .point")).to_have_count(2)
    page.set_input_files("#file", file_of([{"role": "user", "content": "Open question"}]))
    page.get_by_role("button", name="Answer it").click()
    settled(page)
    expect(page.locator(".tokens")).to_contain_text("good place")
    script = "text => { const data = new DataTransfer(); data.items.add(new File([text], 'dropped.json')); return data; }"
    page.dispatch_event("main", "drop", {"dataTransfer": page.evaluate_handle(script, json.dumps(share))})
    expect(page.locator(".tokens")).to_have_text(["Hello"])


def test_files_that_are_no_conversation_are_refused_in_one_line(visit, tmp_path):
    (tmp_path / "large.json").write_bytes(b" " * (8 * 2**20 + 1))
    page = visit()
    say(page, "Mine")
    user = {"role": "user", "content": "x"}
    for content, said in (
        ("{", "is not JSON"), ({"a": 1}, "is no conversation"), ({"messages": [{"role": "user", "content": 5}]}, "message 1 is not text"),
        ({"messages": [{"role": "toString", "content": "x"}]}, "its role is not one of"), ([[user], [user]], "holds 2 conversations"),
        ([user, {"role": "system", "content": "x"}], "system prompt after the beginning"), ({"messages": [user] * 2001}, "at most 2000"),
        ({"messages": [user], "personatlas": {"format": 1, "turns": [{"user": "x", "answers": [{"content": None}]}]}}, "an answer is not text"),
        (None, "at most 8 are read"),
    ):  # fmt: skip
        page.set_input_files("#file", tmp_path / "large.json" if content is None else file_of(content))
        expect(page.locator("#line")).to_contain_text(said)
        expect(page.locator(".user .text")).to_have_text(["Mine"])


def test_a_conversation_stays_in_the_browser_unless_that_is_not_wanted(visit):
    page = visit()
    say(page, "Keep me")
    page.reload()
    expect(page.locator(".user .text")).to_have_text(["Keep me"])
    expect(page.locator("#chart .point")).to_have_count(1)
    page.click("#how summary")
    page.uncheck("#keep")
    page.reload()
    expect(page.locator("#empty")).to_be_visible()
    say(page, "Not me")
    page.click("#how summary")
    expect(page.locator("#keep")).not_to_be_checked()
    assert page.evaluate("localStorage.getItem('personatlas.conversation')") is None
    page.click("#clear")
    expect(page.locator(".user")).to_have_count(0)


def test_an_answer_in_the_middle_is_kept_when_the_page_goes(visit, fake):
    page = visit()
    fake.behaviour.delay = 0.04
    page.fill("#say", "Go on")
    page.press("#say", "Enter")
    expect(page.locator(".tokens")).to_contain_text("good place")
    page.reload()
    expect(page.locator(".tokens")).to_contain_text("good place")
    expect(page.get_by_role("button", name=re.compile("Retry|Try again")).first).to_be_visible()
    fake.behaviour.axis["layer"] = 3
    page.reload()
    expect(page.locator("#line")).to_contain_text("Saved with smollm2-135m, layer 21")
