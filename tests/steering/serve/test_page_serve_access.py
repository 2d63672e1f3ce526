"""The page of `personatlas serve` for everybody: by keyboard, on a phone, in distress, with a key; and text that is never markup."""

import json
import re
from pathlib import Path

import pytest
from serve_page import LOOK, MARKDOWN, expect, file_of, say, settled

STATIC = Path(__file__).parents[3] / "steering" / "serve" / "static"
PAYLOAD = (
    "<img src=x onerror=\"window.hit=1\"><script>window.hit=1</script></title><svg onload='window.hit=1'>"
)
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
FRAMES = (
    "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"  # figures are drawn anew
)


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
    page.select_option("#arm", "assistant")
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
    expect(page.locator("#tip")).to_have_text(
        re.compile(r"projection .*z .*changed by the arm at \d of 19 layers")
    )
    page.click("#how summary")
    page.fill("#max_tokens", "3")
    say(page, "Briefly")
    expect(page.locator(".facts").last).to_contain_text("cut at 3 tokens, the longest answer allowed")
    page.locator("#turns .tokens").last.locator(".t").last.hover()
    expect(page.locator("#tip")).to_have_text(
        "no projection: the answer reached its longest length here, and the model never read this token"
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_coloured_comparison_with_markdown_and_hebrew_is_legible_at_three_widths(visit, fake, scheme):
    page = visit(scheme=scheme)
    fake.behaviour.text = MARKDOWN
    say(page, "שלום, מי אתה?")
    found = {}
    for width, height in ((1280, 860), (768, 1024), (390, 844)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(FRAMES)
        found[f"{width}, plain"] = page.evaluate(LOOK)
    page.click("#colours")
    page.click("#compare")
    say(page, "And now?")
    for width, height in ((390, 844), (768, 1024), (1280, 860)):
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate(FRAMES)
        found[f"{width}, compared"] = page.evaluate(LOOK)
    assert {where: wrong for where, wrong in found.items() if wrong} == {}


def test_text_is_never_markup(visit, fake):
    axis = fake.behaviour.axis
    axis["arms"][PAYLOAD] = {**axis["arms"]["firm"], "layers": PAYLOAD}
    axis["model"]["id"] = axis["baseline"]["of"] = PAYLOAD
    axis["poles"] = [PAYLOAD, "role-play"]
    fake.behaviour.text = f"Look: {PAYLOAD}"
    page = visit()
    page.click("#how summary")
    page.fill("#system", PAYLOAD)
    page.select_option("#arm", PAYLOAD)
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
        file_of(
            {"messages": [{"role": "user", "content": PAYLOAD}, {"role": "assistant", "content": PAYLOAD}]}
        ),
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
        "#file",
        file_of(
            {"messages": told, "personatlas": {**place, "turns": [{"user": PAYLOAD, "answers": [answer]}]}}
        ),
    )
    expect(page.locator(".who")).to_have_text(f"Arm “{PAYLOAD}”")
    expect(page.locator("#turns .t")).to_have_text([PAYLOAD])
    page.set_input_files(
        "#file", file_of({"messages": [{"role": PAYLOAD, "content": "x"}], "__proto__": {"hit": 1}})
    )
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
    assert page.evaluate("document.documentElement.dataset.theme") == (
        "dark" if scheme == "light" else "light"
    )
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
        file_of(
            [{"role": "user", "content": "I keep cutting myself"}, {"role": "assistant", "content": "Oh."}]
        ),
    )
    expect(page.locator("#notice")).to_be_visible()
    page.click("#new")  # the notice was about the conversation before
    expect(page.locator("#notice")).to_be_hidden()
    page.get_by_role("button", name="Undo").click()
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
    assert visit().evaluate(script, [*DISTRESS, *NO_DISTRESS]) == [True] * len(DISTRESS) + [False] * len(
        NO_DISTRESS
    )
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
    assert page.evaluate("[sessionStorage.length, JSON.stringify(localStorage).includes('right')]") == [
        1,
        False,
    ]
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
    fake.behaviour.axis.update(arms={}, alarm=None, quantiles={"levels": [], "default": [], "roles": []})
    page = visit()
    expect(page.locator("#arm")).to_be_disabled()
    expect(page.locator("#compare")).to_be_disabled()
    say(page, "Hello")
    expect(page.locator("#explain")).to_contain_text("No alarm is calibrated")
    expect(page.locator("#state")).to_have_text("The last answer lies within the band.")
    expect(page.locator("#readouts")).not_to_contain_text("Drift")


def test_the_page_and_the_server_itself_understand_each_other(browser, tiny_server):
    wrong = []
    page = browser.new_page()
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(tiny_server.url)
    expect(page.locator("#send")).to_be_enabled()
    page.click("#how summary")
    page.fill("#max_tokens", "12")
    page.fill("#seed", "6")  # with others the tiny model writes half characters, which no token spells
    for text in ("One", "Two"):
        say(page, text)
    expect(page.locator("#chart .point")).to_have_count(2)
    expect(page.locator("#line")).to_be_hidden()
    for answer in range(2):
        box = page.locator(".tokens").nth(answer)
        assert "".join(box.locator(".t").all_text_contents()) == box.text_content()
    page.close()
    assert wrong == []


def test_the_pages_files_are_short_and_hold_nothing_that_its_policy_forbids():
    page = (STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\sstyle=|\son\w+=|https?://", page)
    for path in STATIC.iterdir():
        text = path.read_text()
        assert text.count("\n") <= 400, path.name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
        ), path.name
        for name in re.findall(r'(?:from|import) "\./([\w.]+)"', text):
            assert (STATIC / name).is_file(), f"{path.name} imports {name}"
