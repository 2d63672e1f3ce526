"""Talking with a model that has no axis yet: the server, the terminal and the page."""

import asyncio

import httpx
import openai
import pytest
from rich.console import Console
from serve_page import expect, say
from serving import HOW, ROOM, served

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json
from personatlas.persona.errors import UserError
from personatlas.steering.serve.options import ServeOptions
from personatlas.steering.serve.startup import make_service
from personatlas.steering.serve.terminal.repl import ChatRepl
from personatlas.steering.serve.terminal.session import Transcript

HI = [{"role": "user", "content": "Who are you?"}]


def unmeasured(tiny_run, **options):
    options = ServeOptions(**{"max_new_tokens": 12, "temperature": 0.0, **options})
    return make_service(str(tiny_run / "tiny"), None, options, ROOM, load=HOW)


@pytest.fixture(scope="module")
def server(tiny_run):
    with served(unmeasured(tiny_run)) as server:
        yield server


def test_answers_are_those_of_a_server_with_an_axis_but_have_no_persona(server, tiny_server):
    extra = {"persona": {"per_token": True}}
    request = {"model": "tiny", "messages": HI, "temperature": 0, "max_tokens": 9}
    replies = [
        httpx.post(f"{one.v1}/chat/completions", json=request | extra) for one in (server, tiny_server)
    ]
    plain, measured = (reply.json() for reply in replies)
    assert plain["choices"] == measured["choices"]
    assert "persona" not in plain
    assert "persona" in measured
    with openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(**request, stream=True, extra_body=extra))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plain["choices"][0]["message"]["content"]
    assert not any("persona" in (chunk.model_extra or {}) for chunk in chunks)
    text = httpx.post(f"{server.v1}/completions", json={"prompt": "Who", "max_tokens": 3}).json()
    assert text["usage"]["completion_tokens"] == 3
    assert 'personatlas_tokens_total{kind="written"}' in httpx.get(f"{server.url}/metrics").text


def test_what_is_loaded_says_that_there_is_no_axis_and_which_command_makes_one(server, tiny_run):
    known = httpx.get(f"{server.v1}/axis").json()
    assert (known["layer"], known["poles"], known["baseline"], known["alarm"], known["arms"]) == (
        None,
    ) * 4 + ({},)
    assert f"`personatlas axis {tiny_run / 'tiny'}` makes it (about " in known["no_axis"]
    assert (
        httpx.get(f"{server.url}/health").json()
        == httpx.get(f"{server.url}/healthz").json()
        == {"status": "ok"}
    )


@pytest.mark.parametrize(
    "persona", [{"arm": "p50@1"}, {"cap": "held"}, {"arm": "add:8@1", "mode": "adaptive"}]
)
def test_an_arm_without_an_axis_is_refused_in_one_line(server, persona):
    reply = httpx.post(f"{server.v1}/chat/completions", json={"messages": HI, "persona": persona})
    assert reply.status_code == 400
    assert "no axis is loaded" in reply.json()["error"]["message"]


def test_options_that_need_an_axis_are_refused_before_a_model_is_loaded(tiny_run, monkeypatch):
    monkeypatch.setattr("personatlas.steering.session.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(
        UserError, match=r"--arm cap:assistant needs an axis, and .* has none: `personatlas axis"
    ):
        unmeasured(tiny_run, arm="cap:assistant")


def test_the_terminal_talks_saves_and_loads_without_measuring(tiny_run, tmp_path, capsys):
    service, path = unmeasured(tiny_run), tmp_path / "chat.json"
    with asyncio.Runner() as runner:
        runner.run(service.start())
        repl = ChatRepl(runner, service, Console(), Console(stderr=True), seed=0, live=False)
        lines = [
            "Hi",
            "/arm p50@1",
            "/tokens",
            "/compare",
            "/trace",
            f"/save {path}",
            f"/load {path}",
            "And?",
        ]
        repl.run(Transcript(), lines)
        service.close()
    out, err = capsys.readouterr()
    assert "no axis is loaded, so answers are not measured" in err
    assert repl.n_failed == 3  # /arm, /tokens and /compare
    assert out.count("no axis is loaded") == 3
    assert len(repl.session.transcript.answers) == 2
    assert "projection " not in out.replace("no projection", "")
    assert read_json(path)["personatlas"]["layer"] is None


def test_a_chat_with_a_model_without_an_axis_is_a_chat(tiny_run, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    main(["chat", str(tiny_run / "tiny"), "--device", "cpu", "--max-new-tokens", "4", "--message", "Hi"])
    out, err = capsys.readouterr()
    assert out.startswith("> Hi\n")
    assert "makes it (about " in err


def test_the_page_talks_and_says_how_to_measure(browser, server):
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(server.url)
    expect(page.locator("#explain")).to_contain_text("personatlas axis")
    expect(page.locator("#state")).to_have_text("Not measured")
    expect(page.locator("#colours")).to_be_hidden()
    say(page, "Hello")
    say(page, "And then?")
    expect(page.locator(".answer .tokens")).to_have_count(2)
    assert page.locator(".answer .tokens").first.text_content() not in ("", "…")
    assert not problems
    page.close()
