"""What a template does to texts, to time and to memory: proved when its format is made, and for every message."""

import json
import re
import time
from datetime import datetime
from pathlib import Path
from threading import Thread

import pytest
from chat_tokenizers import CHATML, chat_tokenizer
from families import save_tiny
from test_chat_template import FAMILIES, messages_of, tokenizer_of

from personatlas.persona.errors import UserError
from personatlas.persona.models import template_process
from personatlas.persona.models.chat_template import ChatFormat, chat_format
from personatlas.persona.models.load import load_model
from personatlas.persona.models.template_process import render_template
from personatlas.persona.runs import open_run

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TYPED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for part in m.content if part.type == 'text' %}"
    "{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


def format_of(template: str, now: datetime | None = None) -> ChatFormat:
    return chat_format(chat_tokenizer("byte-level", template), now=now)


def with_content(expression: str) -> str:
    return PLAIN.replace("{{ m.content }}", "{{ " + expression + " }}")


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_rendered_as_transformers_renders_them(name: str) -> None:
    tokenizer = tokenizer_of(name, "bytes")
    format = chat_format(tokenizer)
    for messages in (
        messages_of("Who?\n\n <b>é"),
        messages_of(" a", "b\n", "c"),
        messages_of("a", system="s "),
    ):
        for generation in (True, False):
            if format.system == "merged" and messages[0]["role"] == "system":
                continue
            assert format.render(messages, generation=generation) == tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
            )


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (with_content("m.content | lower"), "user"),
        (with_content("m.content[:500]"), "user"),
        (with_content("m.content | e"), "user"),
        (with_content("m.content | replace('é', 'e')"), "user"),
        (with_content("m.content if m.role != 'assistant' else '...'"), "assistant"),
        (with_content("m.content if m.role != 'assistant' else m.content[:200]"), "assistant"),
        (with_content("m.content if m.role != 'system' else (m.content | upper)"), "system"),
        (with_content("''"), "user"),
        (PLAIN.replace("in messages", "in messages[-1:]"), "user"),
        (PLAIN.replace("in messages", "in messages | reverse"), "assistant"),
    ],
)
def test_a_template_that_changes_or_drops_texts_is_refused_with_the_role(template: str, role: str) -> None:
    with pytest.raises(UserError, match=rf"the text of message \d+ \({role}\)") as caught:
        format_of(template)
    assert "\n" not in str(caught.value)


def test_typed_parts_are_given_to_the_roles_whose_strings_are_not_read() -> None:
    messages = messages_of("Who are you?", "I am.", "Why?", system="Be brief.")
    plain, typed = format_of(PLAIN), format_of(TYPED)
    assert (plain.parts, typed.parts) == (frozenset(), {"system", "user", "assistant"})
    assert typed.render(messages, generation=True) == plain.render(messages, generation=True)
    assert typed.prompt_ids(messages) == plain.prompt_ids(messages)
    mixed = format_of(
        PLAIN.replace("{{ m.content }}", "{{ m.content if m.role == 'assistant' else m.content[0].text }}")
    )
    assert mixed.parts == {"system", "user"}
    assert mixed.render(messages, generation=True) == plain.render(messages, generation=True)


def test_a_template_that_changes_blanks_only_is_taken_and_says_so(capsys: pytest.CaptureFixture) -> None:
    format = format_of(with_content(r"m.content | replace('\n\n', '\n')"))
    assert "changes blanks and line breaks" in capsys.readouterr().err
    assert format.prompt_text(messages_of("a\n\nb")).count("a\nb") == 1
    format_of(with_content("m.content | trim"))
    assert capsys.readouterr().err == ""


def test_a_text_that_does_not_survive_is_found_in_the_very_conversation() -> None:
    format = format_of(with_content("m.content | replace('secret', '******')"))
    assert format.prompt_ids(messages_of("hello"))
    with pytest.raises(UserError, match=r"the text of message 2 \(user\): 'my secret'"):
        format.prompt_ids(messages_of("hello", "I am", "my secret"))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "longer than"),
        ("{{ 'a' * 10 ** 10 }}", "memory"),
        ("{{ 'a' | center(10 ** 10) }}", "memory"),
        ("{{ 'a' * 10 ** 7 }}", "10,000,000 characters"),
        ("{{ 10 ** (10 ** 9) }}", "longer than"),
        (
            "{% set n = namespace(a='ab') %}{% for i in range(50) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
            "the chat template",
        ),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ (" + "(" * 3000 + "1" + ")" * 3000 + ") }}", "recursion"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content.no.such }}", "no attribute"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "__class__"),
        ("{{ cycler.__init__.__globals__ }}", "unsafe"),
        ("{% include 'other' %}", "loader"),
    ],
)
def test_a_template_that_takes_too_much_or_fails_is_one_line(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    monkeypatch.setattr(template_process, "_PROCESS", template_process.TemplateProcess())
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        format_of(template)
    assert "\n" not in str(caught.value)
    assert format_of(PLAIN).prompt_ids(messages_of("hello"))  # the next template is not affected


def test_a_loop_that_a_message_sets_off_does_not_hold_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    monkeypatch.setattr(template_process, "_PROCESS", template_process.TemplateProcess())
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    format = format_of(PLAIN + "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}")
    found: dict[str, str] = {}

    def ask(text: str) -> None:
        try:
            found[text] = format.prompt_text(messages_of(text))
        except UserError as error:
            found[text] = str(error)

    threads = [Thread(target=ask, args=(text,)) for text in ("loop", *map(str, range(8)))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "longer than" in found.pop("loop")
    assert all(text in rendered for text, rendered in found.items())


def test_a_process_that_was_killed_is_started_again() -> None:
    own = template_process.TemplateProcess()
    request = b'{"source": "{{ messages }}", "variables": {"messages": []}, "now": "2026-01-01"}\n'
    assert own.ask(request) == {"text": "[]"}
    assert own._child is not None
    own._child.kill()
    own._child.wait()
    assert own.ask(request) == {"text": "[]"}
    assert own.stop() == 0


def test_rendering_takes_no_noticeable_time() -> None:
    start = time.process_time()
    for _ in range(200):
        render_template(CHATML, {"messages": messages_of("hello")}, datetime.now())
    assert time.process_time() - start < 1  # of this process


def test_all_renderings_hold_one_date() -> None:
    template = "{{ strftime_now('%d %b %Y %H:%M:%S') }}\n" + PLAIN
    format = format_of(template)
    first = format.prompt_text(messages_of("hello"))
    time.sleep(1.1)
    assert format.prompt_text(messages_of("hello")) == first
    assert chat_format(format.tokenizer).prompt_text(messages_of("hello")) == first
    assert "26 Jul 2024 10:00:00" in format_of(template, datetime(2024, 7, 26, 10)).prompt_text(
        messages_of("hello")
    )
    assert format_of(PLAIN).describe_date() == {}


def dated_model(folder: Path) -> Path:
    save_tiny(folder)
    path = folder / "chat_template.jinja"
    text = path.read_text()
    path.write_text("\ufeff{{ strftime_now('%d %b %Y') }}" + text, encoding="utf-8")
    return folder


def test_a_resumed_run_keeps_the_date_that_it_was_begun_with(tmp_path: Path) -> None:
    model = load_model(str(dated_model(tmp_path / "tiny")), device="cpu")
    with open_run(tmp_path / "run", create=True) as run:
        begun = run.as_recorded(model)
        assert begun.now == model.now
        run.claim({"model": begun.describe(), **begun.chat.describe_date()})
        manifest = run.manifest
    manifest["asked"]["template_date"] = "2024-07-26T10:00:00"
    (tmp_path / "run" / "run.json").write_text(json.dumps(manifest))
    with open_run(tmp_path / "run") as run:
        resumed = run.as_recorded(model)
        run.claim({"model": resumed.describe(), **resumed.chat.describe_date()})
        assert run.manifest["asked"]["template_date"] == "2024-07-26T10:00:00"
    assert resumed.chat.prompt_text(messages_of("hi")).startswith(
        "26 Jul 2024<|user|>hi"
    )  # and no byte order mark


def test_a_run_from_before_dates_were_recorded_has_the_date_of_its_beginning(tmp_path: Path) -> None:
    model = load_model(str(dated_model(tmp_path / "tiny")), device="cpu")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"created": "2024-07-26T12:00:00+00:00", "asked": {}}')
    with open_run(tmp_path / "run") as run:
        assert run.date(model).now.date() == datetime(2024, 7, 26).date()


def test_template_files_are_read_in_any_form_that_an_editor_saves(tmp_path: Path) -> None:
    save_tiny(tmp_path / "tiny")
    own = "{% for m in messages %}<|user|>é {{ m.content }}\n{% endfor %}<|assistant|>"
    texts = {
        "plain": own.encode(),
        "mark": b"\xef\xbb\xbf" + own.encode(),
        "lines": own.replace("\n", "\r\n").encode(),
        "wide": own.encode("utf-16"),
    }
    found = set()
    for name, content in texts.items():
        (tmp_path / name).write_bytes(content)
        model = load_model(str(tmp_path / "tiny"), device="cpu", chat_template=tmp_path / name)
        found.add(
            (model.chat.template.replace("\r\n", "\n"), tuple(model.chat.prompt_ids(messages_of("hi"))))
        )
    assert len(found) == 1
    (tmp_path / "latin").write_bytes(own.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.* is not UTF-8 at byte .*save it as UTF-8"):
        load_model(str(tmp_path / "tiny"), device="cpu", chat_template=tmp_path / "latin")


def test_named_templates_use_the_default_and_odd_ones_are_refused() -> None:
    assert format_of({"default": PLAIN, "rag": "x"}).template == PLAIN  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"pass --chat-template FILE\.jinja \(it has rag, tool_use\)"):
        format_of({"rag": "x", "tool_use": "y"})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="is a int, no text"):
        format_of(5)  # type: ignore[arg-type]
