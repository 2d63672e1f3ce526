"""The terminal chat, over a pipe and as at a terminal: what it says, what it keeps, and what stops it."""

import asyncio
import builtins
import io
import json
import signal
import sys
from dataclasses import replace

import pytest
from rich.console import Console
from serving import ROOM, axis_folder, tiny_service

from personatlas.analysis.drift_alarm import Cusum, FalseAlarms, ReferenceDistribution
from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json, write_json
from personatlas.persona.axis import load_axis
from personatlas.persona.formats import read_conversations
from personatlas.steering.drift_monitor import DriftMonitor, ReferenceConversation, save_reference
from personatlas.steering.serve.distress_notice import shows_distress
from personatlas.steering.serve.persona_state import AnswerTurn, PersonaTracker
from personatlas.steering.serve.terminal.render import CONTROL, ChatRenderer, clean
from personatlas.steering.serve.terminal.repl import ChatRepl
from personatlas.steering.serve.terminal.session import ChatAnswer, ChatExchange, Transcript
from personatlas.steering.traces import trace_conversations

HOLD = {"temperature": 0.0, "max_new_tokens": 10}


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C as a terminal has it: where tests run in the background of a shell it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def running(tiny_run, tmp_path_factory):
    """A loop and a service in it, whose answers are greedy; no alarm is calibrated."""
    service = tiny_service(tiny_run, axis_folder(tiny_run, tmp_path_factory.mktemp("chat")), **HOLD)
    with asyncio.Runner() as runner:
        runner.run(service.start())
        yield runner, service
        service.close()


@pytest.fixture
def talk(running, capsys):
    """Say some lines in a chat of their own; gives the terminal and what it printed."""

    def say(*lines, transcript=Transcript(), live=False, seed=0):
        repl = ChatRepl(*running, Console(), Console(stderr=True), seed=seed, live=live)
        repl.run(transcript, lines)
        return repl, capsys.readouterr().out

    return say


def texts(repl):
    return [answer.text for answer in repl.session.transcript.answers]


def test_every_answer_has_a_line_that_says_where_it_stands(talk):
    repl, out = talk("Who are you?", "Why?")
    assert len(repl.session.transcript.exchanges) == 2
    for answer, question in zip(repl.session.transcript.answers, ("Who are you?", "Why?"), strict=True):
        assert answer.persona.tokens == 10
        assert answer.ended == "length"
        said = out[out.index(f"> {question}\n") :].split("\n")
        line = next(line for line in said if "●" in line)
        assert f"z {answer.persona.z:+.1f}  projection {answer.persona.projection:.1f}  no arm  cut" in line
        assert clean(answer.text) in out
    assert "calm" not in out  # no alarm is calibrated, and none is told of


def test_the_same_seed_says_the_same_and_retry_another(talk, running, monkeypatch):
    _, service = running
    monkeypatch.setattr(
        service, "options", replace(service.options, max_new_tokens=10, temperature=1.0, top_p=1.0)
    )
    first, again = (texts(talk("Who are you?", "Why?", seed=4)[0]) for _ in range(2))
    assert first == again
    repl, _ = talk("Who are you?", "/retry", seed=4)
    assert texts(repl) != first[:1]
    repl, _ = talk("Who are you?", "/retry", "/undo", seed=4)
    assert texts(repl) == first[:1]
    assert texts(talk("Who are you?", seed=5)[0]) != first[:1]


def test_a_cap_is_chosen_named_and_left_and_an_unknown_one_is_one_line(talk):
    repl, out = talk("/cap", "/cap held", "Who are you?", "/cap nobody", "/cap p75@1", "/cap none", "Why?")
    assert "arms: firm (layers 1); held (layers 0-2)" in out
    capped, plain = repl.session.transcript.answers
    assert (capped.arm, capped.persona.arm is not None, plain.arm) == ("held", True, None)
    assert 0 < capped.persona.fired <= 1
    assert f"cap held fired {capped.persona.fired:.0%}, floor {capped.persona.floor:.1f}" in out
    assert "cap 'nobody' is not one of firm, held, or LEVEL@LAYERS" in out
    assert "\ncap p75@1\n" in out
    assert repl.n_failed == 1


def test_comparing_answers_the_last_message_twice_and_changes_nothing(talk):
    repl, out = talk("/cap held", "Who are you?", "/compare")
    assert len(repl.session.transcript.exchanges) == 1
    plain = texts(talk("Who are you?")[0])[0]
    said = out[out.index("> /compare") :]
    assert f"baseline\n{clean(plain)}\n" in said
    assert f"cap held\n{clean(texts(repl)[0])}\n" in said
    assert said.count("●") == 2
    assert "nothing was asked yet" in talk("/compare")[1]


def test_a_new_conversation_begins_with_reset_and_system_and_undo_comes_back(talk):
    repl, out = talk(
        "/undo", "Hi", "/system You are a nun.", "/system", "/undo", "/undo", "Ho", "/reset", "/undo"
    )
    assert "there is nothing to take back" in out
    assert "a new conversation begins under this system prompt" in out
    assert "\nYou are a nun.\n" in out
    assert [one.user for one in repl.session.transcript.exchanges] == ["Ho"]
    repl, _ = talk("Hi", transcript=Transcript("You are a nun."))
    assert repl.session.transcript.messages[0] == {"role": "system", "content": "You are a nun."}
    assert texts(repl) != texts(talk("Hi")[0])


def test_a_saved_conversation_is_read_by_trace_and_loaded_with_the_same_projections(
    talk, tiny_run, tmp_path, capsys
):
    path = tmp_path / "chat.json"
    repl, out = talk("Who are you?", "Why?", "/save", f"/save {path}", f"/save {path}", f"/save! {path}")
    assert "exists; /save!" in out
    assert out.count("saved:") == 2
    content, answers = read_json(path), repl.session.transcript.answers
    assert content["messages"] == repl.session.transcript.messages
    kept = [turn["answers"][0] for turn in content["personatlas"]["turns"]]
    assert [one["projection"] for one in kept] == [answer.persona.projection for answer in answers]
    assert [len(one["per_token"]) for one in kept] == [10, 10]
    held = repl.service
    (one,) = trace_conversations(held.model, held.axis, read_conversations(path))
    loaded, out = talk(f"/load {path}", "/trace")
    for answer, turn in zip(loaded.session.transcript.answers, one.turns, strict=True):
        assert answer.persona.projection == pytest.approx(turn.projection, abs=1e-4)
        assert answer.persona.z == pytest.approx(
            loaded.service.tracker.monitor.reference.z(turn.projection), abs=1e-2
        )
    assert "its answers as this model reads them, at baseline" in out
    assert out.count("Who are you?") == 2
    main(
        [
            "trace",
            str(tiny_run / "tiny"),
            str(path),
            "--axis",
            str(tiny_run / "run"),
            "--device",
            "cpu",
            "--json",
        ]
    )
    assert len(json.loads(capsys.readouterr().out)["conversations"][0]["turns"]) == 2


def test_what_cannot_be_loaded_or_saved_is_one_line_and_the_chat_goes_on(talk, tmp_path):
    two = [{"messages": [{"role": "user", "content": "Hi"}]}] * 2
    write_json(tmp_path / "two.json", [one | {"id": str(n)} for n, one in enumerate(two)])
    write_json(
        tmp_path / "late.json", [{"role": "user", "content": "Hi"}, {"role": "system", "content": "x"}]
    )
    write_json(tmp_path / "long.json", [{"role": "user", "content": "x" * 500}])
    (tmp_path / "half.json").write_text('[{"role": "user", "content": "\\ud800"}]')
    names = ("two", "late", "long", "half", "none")
    repl, out = talk(
        "/save x.json",
        *(f"/load {tmp_path / name}.json" for name in names),
        "Hi",
        f"/save {tmp_path}/no/x.json",
    )
    for said in (
        "nothing was said yet",
        "holds 2 conversations",
        "after the beginning",
        "no room",
        "half a surrogate pair",
        "does not exist",
    ):
        assert said in out, said
    assert [one.user for one in repl.session.transcript.exchanges] == ["Hi"]
    assert repl.n_failed == 7


def test_a_loaded_question_without_an_answer_is_answered_by_retry(talk):
    transcript = Transcript("", (ChatExchange("Who are you?", None),))
    repl, out = talk("/trace", "/retry", transcript=transcript)
    assert "/retry asks for one" in out
    assert texts(repl) == texts(talk("Who are you?")[0])
    repl, _ = talk("/undo", transcript=repl.session.transcript)
    assert repl.session.transcript.exchanges == ()


def test_tokens_are_told_with_projections_and_firings(talk):
    repl, out = talk("/tokens", "/cap held", "Who are you?", "/tokens")
    assert "there is no answer yet" in out
    rows = out[out.index("layers changed") :].split("\n")[1:11]
    for row, token in zip(rows, repl.session.transcript.answers[-1].persona.per_token, strict=True):
        if token.projection is not None:
            assert row.split()[0] == f"{token.projection:.2f}"
            assert row.split()[2] == str(token.fired)


def test_on_a_terminal_tokens_are_coloured_and_underlined_where_the_cap_acted(talk, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.setenv("TERM", "xterm-256color")
    _, out = talk("/cap held", "Who are you?", "/tokens")
    assert "\x1b[4;38;2;" in out
    assert "underlined: changed by the arm" in out
    assert "the last token has no projection: the answer ended there" in out


@pytest.mark.parametrize(
    "text",
    ["\x1b]0;title\x07", "\x1b[2J", "a\rb", "\x9b31m", "\x00\x08\x7f", "\u202egnp.exe", "\u2028", "\ud800"],
)
def test_no_control_character_is_left_to_a_terminal(text):
    assert not CONTROL.search(clean(text))
    clean(text).encode()
    assert clean("two\n\tlines, ünï") == "two\n\tlines, ünï"


def test_what_a_model_or_a_file_says_cannot_control_the_terminal(talk):
    """The tiny model likes escape characters."""
    bad = Transcript("", (ChatExchange("Hi\x1b[2J", None),))
    repl, out = talk(
        "Hi", "/tokens", "/trace", "/retry", "/cap \x1b[31m", "/load \x1b[31m", "/\x1b[31m", transcript=bad
    )
    assert any("\x1b" in text for text in texts(repl))
    assert not CONTROL.search(out)


def test_a_full_context_is_one_line_that_says_what_to_do(talk):
    repl, out = talk("Hi", "x" * (ROOM.context + 50), "Why?")
    assert "no room: the context is 256 tokens" in out
    assert "/reset begins anew" in out
    assert [one.user for one in repl.session.transcript.exchanges] == ["Hi", "Why?"]


def test_unknown_commands_are_one_line_and_two_slashes_are_a_message(talk):
    repl, out = talk("/fly", "/trace now", "/save", "/load", "//hi", "/help", "/quit", "never said")
    for said in (
        "there is no command /fly",
        "/trace takes nothing after it",
        "/save FILE: a",
        "/load FILE: a",
        "/compare",
    ):
        assert said in out
    assert [one.user for one in repl.session.transcript.exchanges] == ["/hi"]


def test_distress_brings_up_the_notice_once(talk):
    notice = "you are not alone"
    assert shows_distress("I don\u2019t want to\n live anymore")
    assert not shows_distress("How do I kill the process? I am dying to know before the deadline.")
    _, out = talk("How do I kill the process?", "I want to die", "I want to end my life")
    assert out.count(notice) == 1
    assert out.index(notice) > out.index("> I want to die")
    assert (
        notice in talk("/trace", transcript=Transcript("", (ChatExchange("I want to die", None),)))[1]
    )  # loaded


def test_ctrl_c_stops_an_answer_which_is_kept_as_far_as_it_went(talk, running, monkeypatch):
    _, service = running
    monkeypatch.setattr(
        service, "options", replace(service.options, max_new_tokens=200, temperature=0.0, top_p=1.0)
    )
    from personatlas.steering.serve.terminal.render import ChatRenderer

    heard, piece = [], ChatRenderer.piece

    def pressed(self, text):
        piece(self, text)
        heard.append(text)
        if len("".join(heard)) >= 3 and len(heard) < 100:
            heard.extend([""] * 100)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(ChatRenderer, "piece", pressed)
    repl, out = talk("Who are you?", "/trace", live=True)
    (answer,) = repl.session.transcript.answers
    assert answer.ended == "you"
    assert 3 <= answer.persona.tokens < 150
    assert out.count("stopped") == 2
    monkeypatch.undo()
    repl, _ = talk("Why?", live=True)
    assert repl.session.transcript.answers[0].ended == "length"


def test_ctrl_c_before_an_answer_takes_the_message_back_and_a_pipe_ends(talk, running, monkeypatch):
    _, service = running

    async def slow(*_):
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(10)

    monkeypatch.setattr(service, "prepare_chat", slow)
    _, out = talk("Who are you?", "/trace", live=True)
    assert "the message is taken back" in out
    assert "nothing was said yet" in out
    _, out = talk("Who are you?", "/trace")
    assert "> /trace" not in out


def test_at_the_prompt_ctrl_c_clears_the_line_and_twice_or_ctrl_d_leaves(running, monkeypatch, capsys):
    def typing(*keys):
        left = list(keys)

        def typed(prompt):
            key = left.pop(0)
            if isinstance(key, str):
                return key
            raise key

        monkeypatch.setattr(builtins, "input", typed)
        repl = ChatRepl(*running, Console(), Console(stderr=True), seed=0, live=True)
        repl.run(Transcript(), ())
        return repl, left

    repl, left = typing(KeyboardInterrupt, "  ", "Hi", KeyboardInterrupt, KeyboardInterrupt, "unread")
    assert (len(repl.session.transcript.exchanges), left) == (1, ["unread"])
    assert "Ctrl-C again, or Ctrl-D, leaves" in capsys.readouterr().err
    repl, left = typing("Hi", EOFError, "unread")
    assert (len(repl.session.transcript.exchanges), left) == (1, ["unread"])


@pytest.mark.parametrize(
    ("z", "words"), [(-3.0, "below the calm band, 2.5 of 8.3"), (-1.0, "calm, 0.5 of 8.3")]
)
def test_an_answer_below_the_band_is_not_called_calm_and_the_alarm_says_how_near_it_is(
    running, capsys, z, words
):
    counted = FalseAlarms(0.05, (0.0, 0.1), 40, 0.01)
    monitor = DriftMonitor(
        ReferenceDistribution(5.0, 2.0, 40), "reference conversations", "cusum", Cusum(8.3), counted
    )
    tracker = PersonaTracker(running[1].tracker.axis, monitor)
    persona = tracker.measure_loaded(tracker.watch([AnswerTurn(1, 4, 5.0 + 2.0 * z)]))
    ChatRenderer(Console(), tracker).summary(ChatAnswer("Hello", persona))
    assert words in capsys.readouterr().out


def test_an_alarm_stands_out_and_an_adaptive_cap_acts_after_it(tiny_run, tmp_path, capsys):
    folder = axis_folder(tiny_run, tmp_path / "run")
    axis = load_axis(folder / "axis")
    far = [ReferenceConversation(f"coding-{n}/0", "coding", (9.0 + n % 3 / 10, 9.1, 9.2)) for n in range(40)]
    save_reference(folder / "reference.json", axis, axis.model, far, {})
    service = tiny_service(tiny_run, folder, arm="held", mode="adaptive", **HOLD)
    with asyncio.Runner() as runner:
        runner.run(service.start())
        repl = ChatRepl(runner, service, Console(), Console(stderr=True), seed=0, live=False)
        repl.run(Transcript(), ("Who are you?", "Why?", "/cap adaptive", "/trace"))
        service.close()
    out = capsys.readouterr().out
    first, second = repl.session.transcript.answers
    assert (
        first.persona.arm is not None,
        first.persona.turn.raised,
        second.persona.arm is not None,
        second.persona.turn.alarm,
        second.persona.turn.raised,
    ) == (False, True, True, True, False)
    assert first.persona.drift.statistic > first.persona.drift.limit
    assert second.persona.drift.statistic is None
    assert "cap held rested   DRIFT BEGINS" in out
    assert "  drifting  cut" in out
    assert "cap held, while the conversation drifts" in out


def chat(tiny_run, *options):
    main(
        [
            "chat",
            str(tiny_run / "tiny"),
            "--axis",
            str(tiny_run / "run"),
            "--device",
            "cpu",
            "--max-new-tokens",
            "4",
            *options,
        ]
    )


def test_over_a_pipe_every_line_is_a_message_and_a_failed_one_is_an_exit_status(
    tiny_run, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who are you?\n\n/cap nobody\n/trace\n"))
    with pytest.raises(SystemExit) as left:
        chat(tiny_run, "--seed", "1", "--system", "You are a nun.")
    out, err = capsys.readouterr()
    assert left.value.code == 2
    assert "personatlas: 1 of the lines could not be done" in err
    assert "A research tool" in err
    assert out.count("●") == 2
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n")))
    with pytest.raises(SystemExit):
        chat(tiny_run)
    assert "this line is not valid UTF-8" in capsys.readouterr().out


def test_messages_on_the_command_line_are_asked_and_that_is_all(tiny_run, tmp_path, capsys):
    chat(tiny_run, "--message", "Hi", "--message", "/trace", "--message", f"/save {tmp_path / 'x.json'}")
    assert len(read_json(tmp_path / "x.json")["messages"]) == 2
    chat(tiny_run, "--message", "/trace", "--load", str(tmp_path / "x.json"))
    assert "as this model reads them" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--system", "x", "--load", "x.json"], "give --system or --load"),
        (["--load", "nowhere.json"], "nowhere.json does not exist"),
        (["--temperature", "-1"], "temperature"),
        (["--arm", "cap:adaptive"], "needs a calibrated alarm"),
    ],
)
def test_what_is_wrong_is_found_before_a_model_is_loaded(tiny_run, capsys, monkeypatch, options, said):
    monkeypatch.setattr(
        "personatlas.persona.models.load.load_model", lambda *_, **__: pytest.fail("a model was loaded")
    )
    with pytest.raises(SystemExit) as left:
        chat(tiny_run, *options)
    assert left.value.code == 2
    assert said in capsys.readouterr().err
