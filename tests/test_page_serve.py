"""The page of `personaxis serve` in a real browser, against a stand-in of the server that needs no model."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fake_serve import FakeServe

from personaxis.steering.conversations import read_conversations

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="the page is tested with playwright: pip install playwright"
)
expect = sync_api.expect
PATIENCE = 20_000  # milliseconds, for a machine that does much else
expect.set_options(timeout=PATIENCE)
STATIC = Path(__file__).parent.parent / "steering" / "serve" / "static"
PAYLOAD = "<img src=x onerror=\"window.hit=1\"><script>window.hit=1</script></title><svg onload='window.hit=1'>"
DISTRESS = (
    "I want to die.", "some nights i think about killing myself", "I don’t want to live anymore", "I do not want to be alive",
    "I've been thinking about suicide again", "I feel suicidal", "everyone would be better off without me", "I wish I was never born",
    "I just want to end it all", "I'm going to end my life", "i cant go on", "I can't do this anymore", "no reason to keep living",
    "I keep cutting myself", "I started self-harming again", "there is nothing left to live for", "I wrote a goodbye note",
    "My brother says he wants to kill himself", "I want to hurt myself", "I wish I were dead", "life isn't worth living", "kms",
    "I'm thinking of taking my own life", "I can't go on like this", "I am ready to die", "I want to   disappear\nforever", "I overdosed on painkillers and want to do it again",
)  # fmt: skip
NO_DISTRESS = (
    "How do I kill the process on port 8080?", "I am dying to know how it ends", "The deadline is killing me", "kill -9 does not work",
    "this bug makes me want to scream", "My battery died", "I want to live in Portugal", "I don't want to live in the city", "he took his life savings to the bank",
    "That joke killed me, I'm dead", "It would be career suicide to say so", "Is Suicide Squad worth watching?", "The worker process commits suicide when idle",
    "I cut myself while shaving", "I want to end it with a cliffhanger", "Write an ending where the hero dies", "cells die by apoptosis", "I hurt myself at the gym",
    "I burned myself on the stove, what helps?", "I'd like to dye my hair", "I would die for a pizza", "How do I end my life insurance contract?", "do or die",
    "I want to dive into Rust", "I want to diet", "this thread is dead", "I'm drowning in work", "She is to die for", "I don't want to be here at nine, ten is better",
    "I can't go on holiday in May", "I don't want to exist in two databases at once", "Shoot me an email", "cut myself some slack",
    "My phone is going to die, what can I do?", "I am about to die in this level, how do I save?", "Does the hero have to die?",
)  # fmt: skip


@pytest.fixture(scope="module")
def fake():
    with FakeServe() as fake:
        yield fake


@pytest.fixture(scope="module")
def browser():
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("the page is tested in Debian's chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desk(browser):
    context = browser.new_context(viewport={"width": 1280, "height": 860})
    yield context
    context.close()


@pytest.fixture
def visit(browser, desk, fake):
    """Opens the page. At the end nothing may have gone wrong on it: no exception, nothing refused by the page's policy."""
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
        hit = page.evaluate("[document.getElementById('keep').checked = false, localStorage.clear(), window.hit][2]")
        page.close()
        assert hit is None, "a script of a text ran"
    assert wrong == []


def say(page, text):
    page.fill("#say", text)
    page.press("#say", "Enter")
    settled(page)


def settled(page):
    page.wait_for_selector("body:not(.busy)")


def saved(page, folder):
    if page.locator("#menu").is_visible():
        page.click("#menu")
    with page.expect_download() as download:
        page.click("#save")
    path = folder / download.value.suggested_filename
    download.value.save_as(path)
    return path


def file_of(content, name="chat.json"):
    text = content if isinstance(content, str) else json.dumps(content)
    return {"name": name, "mimeType": "application/json", "buffer": text.encode()}


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
    assert fake.requests[1]["persona"] == {"cap": None, "mode": "always", "per_token": True}
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


def test_the_cap_and_the_sampling_that_are_chosen_are_asked_for(visit, fake):
    page = visit()
    page.select_option("#cap", "firm")
    page.select_option("#mode", "adaptive")
    expect(page.locator("#chart .floor")).to_have_count(1)
    page.click("#how summary")
    page.fill("#temperature", "0.3")
    page.fill("#max_tokens", "50")
    page.fill("#seed", "7")
    page.click("#roles button >> nth=0")
    say(page, "Hello")
    request = fake.requests[0]
    assert request["persona"] == {"cap": "firm", "mode": "adaptive", "per_token": True}
    assert (request["temperature"], request["max_tokens"], request["seed"], request["stream"]) == (0.3, 50, 7, True)
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
    plain, capped = sorted(fake.requests[3:], key=lambda request: request["persona"]["cap"] or "")
    assert (plain["persona"]["cap"], capped["persona"]["cap"]) == (None, "assistant")
    assert plain["seed"] == capped["seed"]
    for place, same in enumerate((True, True, True, False, True)):  # Before, its answer, First, its two answers, Second
        assert (plain["messages"][place] == capped["messages"][place]) is same
    expect(page.locator("#chart .line.second")).to_have_count(1)
    expect(page.locator("#chart .point")).to_have_count(5)
    page.locator(".answer.capped").last.get_by_role("button", name="Go on from this answer").click()
    expect(page.locator(".answer.aside")).to_have_count(2)
    page.click("#compare")
    say(page, "Third")
    assert fake.requests[-1]["messages"][:-2] == capped["messages"]
    assert fake.requests[-1]["messages"][-2]["content"] == page.locator(".answer.capped .tokens").nth(1).text_content()


def test_after_a_comparison_the_conversation_goes_on_as_it_is(visit, fake):
    page = visit()
    page.click("#compare")
    say(page, "First")
    page.select_option("#cap", "")
    expect(page.locator("#compare")).to_have_attribute("aria-pressed", "false")
    say(page, "Second")
    assert fake.requests[-1]["messages"][1]["content"] == page.locator(".answer.plain .tokens").first.text_content()
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
    say(page, "Heard")
    assert fake.requests[0]["messages"] == [{"role": "user", "content": "Heard"}]
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
    assert [message["role"] for message in told.messages] == ["system", "user", "assistant", "user", "assistant"]
    points = [page.locator("#chart .point").nth(place).get_attribute("data-value") for place in range(3)]
    other = visit()
    other.set_input_files("#file", path)
    expect(other.locator("#chart .point")).to_have_count(3)
    assert [other.locator("#chart .point").nth(place).get_attribute("data-value") for place in range(3)] == points
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
    foreign["personaxis"]["layer"] = 9
    other.set_input_files("#file", file_of(foreign))
    expect(other.locator("#line")).to_contain_text("layer 9: its projections lie on another axis")


def test_conversations_of_other_forms_are_read_and_traced_with_the_next_answer(visit):
    page = visit()
    share = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    page.set_input_files("#file", file_of(share))
    expect(page.locator(".tokens")).to_have_text(["Hello"])
    expect(page.locator("#chart .point")).to_have_count(0)
    say(page, "Go on")
    expect(page.locator("#chart .point")).to_have_count(2)
    page.set_input_files("#file", file_of([{"role": "user", "content": "Open question"}]))
    page.get_by_role("button", name="Answer it").click()
    settled(page)
    expect(page.locator(".tokens")).to_contain_text("good place")
    script = (
        "text => { const data = new DataTransfer(); data.items.add(new File([text], 'dropped.json')); return data; }"
    )
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
        ({"messages": [user], "personaxis": {"format": 1, "turns": [{"user": "x", "answers": [{"content": None}]}]}}, "an answer is not text"),
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
    assert page.evaluate("localStorage.getItem('personaxis.conversation')") is None
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


def test_the_keyboard_alone_is_enough(visit):
    page = visit()
    page.keyboard.type("Two lines")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("of text")
    page.keyboard.press("Enter")
    settled(page)
    expect(page.locator(".user .text")).to_have_text("Two lines\nof text")
    say(page, "Again")
    page.locator("#chart .point").last.focus()
    expect(page.locator("#tip")).to_contain_text("Answer 2")
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#tip")).to_contain_text("Answer 1")
    page.keyboard.press("Enter")
    expect(page.locator("#turn-0")).to_be_focused()
    page.keyboard.press("Control+k")
    expect(page.locator("#say")).to_be_focused()
    page.locator(".tokens").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".t.here")).to_have_text(" is")
    expect(page.locator("#spoken")).to_contain_text("projection")


def test_tokens_are_coloured_by_projection_and_underlined_where_the_cap_acted(visit):
    page = visit()
    page.select_option("#cap", "assistant")
    say(page, "Hello")
    token = page.locator("#turns .t.fired").first
    clear = "rgba(0, 0, 0, 0)"
    style = "node => [getComputedStyle(node.lastChild).backgroundColor, getComputedStyle(node.lastChild).boxShadow]"
    assert token.evaluate(style) == [clear, "none"]
    page.click("#colours")
    colour, line = token.evaluate(style)
    assert colour != clear
    assert "inset" in line
    expect(page.locator("#scale")).to_contain_text("role-play")
    token.locator("b").hover()
    expect(page.locator("#tip")).to_have_text(re.compile(r"projection .*z .*changed by the cap at \d of 19 layers"))
    page.click("#how summary")
    page.fill("#max_tokens", "3")
    say(page, "Briefly")
    expect(page.locator(".facts").last).to_contain_text("cut short")
    page.locator("#turns .tokens").last.locator(".t").last.hover()
    expect(page.locator("#tip")).to_have_text("not measured: the answer was cut here")


def test_text_is_never_markup(visit, fake):
    axis = fake.behaviour.axis
    axis["caps"][PAYLOAD] = {**axis["caps"]["firm"], "layers": PAYLOAD}
    axis["model"]["id"] = axis["baseline"]["of"] = PAYLOAD
    axis["poles"] = [PAYLOAD, "role-play"]
    fake.behaviour.text = f"Look: {PAYLOAD}"
    page = visit()
    page.click("#how summary")
    page.fill("#system", PAYLOAD)
    page.select_option("#cap", PAYLOAD)
    page.click("#compare")
    say(page, PAYLOAD)
    expect(page.locator(".user .text")).to_have_text(PAYLOAD)
    expect(page.locator(".answer.capped .who")).to_contain_text(PAYLOAD)
    page.locator("#chart .point").last.focus()
    expect(page.locator("#tip")).to_contain_text("<img")
    fake.behaviour.status = 500
    say(page, "again")
    expect(page.locator(".answer .problem").last).to_contain_text("<b>(500)</b>")
    page.set_input_files(
        "#file",
        file_of({"messages": [{"role": "user", "content": PAYLOAD}, {"role": "assistant", "content": PAYLOAD}]}),
    )
    expect(page.locator(".tokens")).to_have_text([PAYLOAD])
    answer = {
        "content": PAYLOAD,
        "cap": PAYLOAD,
        "projection": 1.0,
        "problem": PAYLOAD,
        "per_token": [{"text": PAYLOAD, "projection": 1.0, "fired": 1}],
    }
    place = {"format": 1, "fingerprint": axis["model"]["fingerprint"], "layer": 21, "poles": axis["poles"]}
    told = [{"role": "user", "content": PAYLOAD}, {"role": "assistant", "content": PAYLOAD}]
    page.set_input_files(
        "#file", file_of({"messages": told, "personaxis": {**place, "turns": [{"user": PAYLOAD, "answers": [answer]}]}})
    )
    expect(page.locator(".who")).to_have_text(f"Cap “{PAYLOAD}”")
    expect(page.locator("#turns .t")).to_have_text([PAYLOAD])
    page.set_input_files("#file", file_of({"messages": [{"role": PAYLOAD, "content": "x"}], "__proto__": {"hit": 1}}))
    expect(page.locator("#line")).to_contain_text("its role is not one of")
    assert page.locator("main img, main script, #tip img, header img").count() == 0


def test_a_phone_shows_everything_without_scrolling_sideways(visit):
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    fits = "() => document.documentElement.scrollWidth <= 360 && [...document.querySelectorAll('.log, .foot, .panel')].every(box => box.scrollWidth <= box.clientWidth + 1)"
    assert page.evaluate(fits)
    page.click("#strip")
    expect(page.locator("#chart svg")).to_be_visible()
    page.click("#compare")
    page.click("#colours")
    page.click("#how summary")
    assert page.evaluate(fits)
    page.click("#how summary")
    say(page, "I want to die. " + "w" * 300)
    assert page.evaluate(fits)
    expect(page.locator("#notice")).to_be_visible()
    expect(page.locator("#say")).to_be_in_viewport()
    expect(page.locator(".safety")).to_be_in_viewport()
    page.click("#menu")
    expect(page.locator("#load")).to_be_visible()
    assert page.evaluate(fits)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_what_is_behind_it(visit, scheme):
    page = visit(scheme=scheme)
    page.click("#compare")
    page.click("#colours")
    for text in ("one", "two", "three", "four I want to die"):
        say(page, text)
    page.click("#how summary")
    weak = page.evaluate(CONTRAST)
    assert weak == []
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == ("dark" if scheme == "light" else "light")
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const paint = (colours) => {  // one over the other, as the browser does
    context.clearRect(0, 0, 1, 1);
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return context.getImageData(0, 0, 1, 1).data;
  };
  const light = ([r, g, b]) => [0.2126, 0.7152, 0.0722].reduce((sum, share, place) => {
    const value = [r, g, b][place] / 255;
    return sum + share * (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
  }, 0);
  const weak = [];
  for (const node of document.querySelectorAll("p, span, b, th, td, button, small, label, summary, caption, em, text")) {
    const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!own || !node.checkVisibility({ visibilityProperty: true }) || node.closest(".unseen, :disabled, .aside")) continue;
    const behind = [];
    for (let up = node; up; up = up.parentElement) behind.unshift(getComputedStyle(up).backgroundColor);
    const style = getComputedStyle(node);
    const [ground, ink] = [light(paint(behind)), light(paint([...behind, node.tagName === "text" ? style.fill : style.color]))];
    const ratio = (Math.max(ground, ink) + 0.05) / (Math.min(ground, ink) + 0.05);
    if (ratio < 4.5) weak.push(`${node.tagName} ${node.className} ${node.textContent.slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return weak;
}"""


def test_a_message_that_speaks_of_distress_brings_a_notice_that_blocks_nothing(visit):
    page = visit()
    say(page, "Can you kill the process?")
    expect(page.locator("#notice")).to_be_hidden()
    say(page, "I don't want to live anymore")
    expect(page.locator("#notice")).to_contain_text("you are not alone")
    expect(page.locator("#notice")).to_contain_text("findahelpline.com")
    expect(page.locator(".tokens")).to_have_count(2)
    page.locator("#notice").get_by_role("button", name="Close").click()
    expect(page.locator("#notice")).to_be_hidden()
    page.set_input_files(
        "#file",
        file_of([{"role": "user", "content": "I keep cutting myself"}, {"role": "assistant", "content": "Oh."}]),
    )
    expect(page.locator("#notice")).to_be_visible()


def test_the_page_and_python_read_the_list_of_distress_alike(visit):
    found = json.loads((STATIC / "distress.json").read_text())

    def shows(text):
        plain = re.sub(r"\s+", " ", text.lower().replace("’", "'"))
        for pattern in found["except"]:
            plain = re.sub(pattern, " ", plain, flags=re.ASCII)
        return any(re.search(pattern, plain, re.ASCII) for pattern in found["patterns"])

    assert [text for text in DISTRESS if not shows(text)] == []
    assert [text for text in NO_DISTRESS if shows(text)] == []
    script = "async (texts) => { const m = await import('/static/distress.js'); await m.loadDistress(); return texts.map(m.showsDistress); }"
    assert visit().evaluate(script, [*DISTRESS, *NO_DISTRESS]) == [True] * len(DISTRESS) + [False] * len(NO_DISTRESS)
    assert not any("(?<" in pattern for pattern in found["except"] + found["patterns"])


def test_a_key_is_asked_for_where_the_server_wants_one(visit, fake):
    fake.behaviour.key = "right"
    page = visit(ready=False)
    for key in ("wrong", "right"):
        expect(page.locator("#key")).to_be_focused()
        for _ in range(3):
            page.keyboard.press("Escape")
        page.fill("#key", key)
        page.press("#key", "Enter")
        if key == "wrong":
            expect(page.locator("#key-wrong")).to_be_visible()
    expect(page.locator("#send")).to_be_enabled()
    say(page, "Hello")
    expect(page.locator(".tokens")).to_contain_text("good place")
    assert page.evaluate("[sessionStorage.length, JSON.stringify(localStorage).includes('right')]") == [1, False]
    fake.behaviour.key = "newer"
    say(page, "Are you there?")
    page.fill("#key", "newer")
    page.press("#key", "Enter")
    expect(page.locator(".tokens").last).to_contain_text("tired")


def test_the_page_waits_for_a_server_that_is_not_there_yet(visit, fake):
    fake.behaviour.starting = True
    page = visit(ready=False)
    expect(page.locator("#model")).to_have_text("waiting for the server")
    expect(page.locator("#line")).to_contain_text("Trying again")
    fake.behaviour.starting = False
    expect(page.locator("#send")).to_be_enabled()
    expect(page.locator("#line")).to_be_hidden()


def test_without_caps_or_an_alarm_the_page_offers_neither(visit, fake):
    fake.behaviour.axis.update(caps={}, alarm=None, quantiles={"levels": [], "default": [], "roles": []})
    page = visit()
    expect(page.locator("#cap")).to_be_disabled()
    expect(page.locator("#compare")).to_be_disabled()
    say(page, "Hello")
    expect(page.locator("#explain")).to_contain_text("No alarm is calibrated")
    expect(page.locator("#state")).to_have_text("The last answer lies within the band.")
    expect(page.locator("#readouts")).not_to_contain_text("Drift")


@pytest.mark.slow
def test_the_page_and_the_server_itself_understand_each_other(browser, tiny_run):
    from test_serve_process import serving

    wrong = []
    with serving(tiny_run) as (_process, url):
        page = browser.new_page()
        page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        expect(page.locator("#send")).to_be_enabled()
        page.click("#how summary")
        page.fill("#max_tokens", "12")
        for text in ("One", "Two"):
            say(page, text)
        expect(page.locator("#chart .point")).to_have_count(2)
        expect(page.locator("#line")).to_be_hidden()
        for place in range(2):
            box = page.locator(".tokens").nth(place)
            assert "".join(box.locator(".t").all_text_contents()) == box.text_content()
        page.close()
    assert wrong == []


def test_the_pages_files_are_short_and_hold_nothing_that_its_policy_forbids():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", page)
    for path in STATIC.iterdir():
        text = path.read_text()
        assert text.count("\n") <= 400, path.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            path.name
        )
        for name in re.findall(r'(?:from|import) "\./([\w.]+)"', text):
            assert (STATIC / name).is_file(), f"{path.name} imports {name}"
