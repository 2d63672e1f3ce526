"""Inspect's tasks through the provider and the verb, offline, on a tiny random model."""

import asyncio
import gc
import json
import logging
import socket
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

pytest.importorskip("inspect_ai")

from inspect_ai import eval as run_task
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageTool,
    ChatMessageUser,
    ContentImage,
    ContentText,
    GenerateConfig,
    get_model,
)
from inspect_ai.tool import ToolInfo

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.sampling.sampler import Sampling
from personatlas.steering.evals.harnesses import inspect_provider as inspect_model
from personatlas.steering.evals.harnesses.batch_answerer import AnswerRequest, BatchAnswerer
from personatlas.steering.evals.harnesses.inspect_compare import (
    InspectComparison,
    compare_inspect_arms,
    read_inspect_arm,
    read_inspect_log,
)
from personatlas.steering.evals.harnesses.inspect_provider import CallBatcher, InspectRefusal, PersonatlasAPI
from personatlas.steering.session import load_steered_model
from personatlas.steering.traces import trace_answer

# Inspect's: a deprecated word to tenacity, and streams that are left to the garbage collector
pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'initial' parameter is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]

ROOT = Path(__file__).parents[3]
CAP = "p75@0-2"
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import Score, accuracy, includes, mean, scorer
from inspect_ai.solver import generate, use_tools
from inspect_ai.tool import tool

QUESTIONS = ("Who are you?", "What is rain?", "Sell my boat?", "Name a bird.", "Why?", "Tell me of the sea.")
def samples(count=6):
    return [Sample(id=i, input=QUESTIONS[i], target="e", metadata={"role": "pirate" if i % 2 else "nun"}) for i in range(count)]

@scorer(metrics={"long": [mean()], "word": [mean()]})
def shape():
    async def score(state, target):
        text = state.output.completion
        return Score(value={"long": len(text) / 10, "word": "no number here"})
    return score

@task
def questions():
    return Task(dataset=samples(), solver=generate(), scorer=[includes(), shape()])

@task
def fewer():
    return Task(dataset=samples(5), solver=generate(), scorer=includes())

@tool
def bell():
    async def execute():
        "Ring a bell."
        return "rung"
    return execute

@task
def bells():
    return Task(dataset=samples(1), solver=[use_tools(bell()), generate()], scorer=includes())
"""


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    """No network, and Inspect's handlers and hooks gone afterwards."""

    def refuse(*_args, **_more):
        raise AssertionError("a test went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    hook, handlers, level = sys.excepthook, list(logging.root.handlers), logging.root.level
    yield
    sys.excepthook, logging.root.handlers = hook, handlers
    logging.root.setLevel(level)


@pytest.fixture(scope="module")
def answerer(tiny_run):
    how = ModelOptions(device="cpu", dtype="float32")
    return BatchAnswerer(
        load_steered_model(str(tiny_run / "tiny"), str(tiny_run / "run"), [f"cap:{CAP}"], how)
    )


@pytest.fixture
def api(answerer):
    def build(cap=CAP, **more):
        return PersonatlasAPI(model_name="tiny", axis="run", cap=cap, answerer=answerer, **more)

    return build


@pytest.fixture(scope="module")
def place(tiny_run, tmp_path_factory):
    """A folder with task.py, and what runs one of its tasks; the same run is made once."""
    folder = tmp_path_factory.mktemp("inspect")
    (folder / "task.py").write_text(TASK)
    arguments = {"axis": str(tiny_run / "run"), "device": "cpu", "dtype": "float32"}

    @cache
    def run(task="questions", cap=CAP, **settings):
        settings = {"max_tokens": 12, "log_format": "json", "display": "none", "ctl_server": False} | settings
        model, given = f"personatlas/{tiny_run / 'tiny'}", arguments | {"cap": cap}
        return run_task(f"{folder}/task.py@{task}", model, model_args=given, log_dir=str(folder), **settings)[
            0
        ]

    run.folder = folder
    yield run
    gc.collect()  # while the warnings above are not errors


def ask(api, text="Who are you?", tools=(), **config):
    messages = [ChatMessageUser(content=text)] if isinstance(text, str) else text
    return asyncio.run(
        api.generate(messages, list(tools), "auto", GenerateConfig(**{"max_tokens": 12, **config}))
    )


def test_a_task_runs_capped_and_every_answer_says_what_was_done_to_it(place, tiny_run):
    log = place()
    assert log.status == "success", log.error
    assert log.eval.model == f"personatlas/{tiny_run / 'tiny'}"
    for sample in log.samples:
        usage, own = sample.output.usage, sample.output.metadata["personatlas"]
        assert usage.input_tokens > 0
        assert usage.total_tokens == usage.input_tokens + usage.output_tokens
        assert (
            own["model"]["fingerprint"]
            == json.loads((tiny_run / "run" / "axis.json").read_text())["model"]["fingerprint"]
        )
        assert (own["cap"], own["dtype"]) == (CAP, "float32")
        (choice,) = own["choices"]
        assert choice["tokens"] <= usage.output_tokens <= 12
        assert 0 < choice["fired"] <= 1


def test_calls_that_wait_together_are_one_batch(place, monkeypatch):
    sizes, sampled = [], BatchAnswerer._sample
    monkeypatch.setattr(
        BatchAnswerer,
        "_sample",
        lambda self, asked, how: sizes.append(len(asked)) or sampled(self, asked, how),
    )
    monkeypatch.setattr(inspect_model, "GATHER", 0.5)
    place(seed=7)
    assert sizes == [6]


def test_runs_repeat_whatever_the_batch_and_epochs_and_seeds_differ(place):
    def texts(log):
        return {(sample.id, sample.epoch): sample.output.completion for sample in log.samples}

    first = texts(place(epochs=2))
    assert first == texts(place(epochs=2, max_connections=1))
    assert any(first[i, 1] != first[i, 2] for i in range(6))
    assert any(first[i, 1] != text for (i, _), text in texts(place(seed=7)).items())


def test_both_arms_share_seeds_and_a_strong_cap_changes_the_answers(place, api):
    assert api().base_url != api(cap=None).base_url  # by which Inspect's cache tells them apart
    plain, capped = place(cap="none", epochs=2), place(epochs=2)
    for one, other in zip(plain.samples, capped.samples, strict=True):
        (before,), (after,) = (x.output.metadata["personatlas"]["choices"] for x in (one, other))
        assert before["seed"] == after["seed"]
        assert before["fired"] is None
        assert before["projection"] is not None
    assert [s.output.completion for s in plain.samples] != [s.output.completion for s in capped.samples]


def test_projection_and_fired_share_are_those_of_a_trace(answerer):
    model, axis, cap = answerer.steered.model, answerer.steered.axis, answerer.interventions[0]
    texts = ("Who are you?", "Rain", "A long question about boats and birds, and about the sea.")
    asked = [
        AnswerRequest(
            answerer.prompt_ids([{"role": "user", "content": text}]),
            seed,
            Sampling(14 if seed else 9),
            seed != 1,
        )
        for seed, text in enumerate(texts)
    ]
    for one, found in zip(asked, answerer.answers(asked), strict=True):
        alone = trace_answer(model, one.ids, found.ids, [cap] if one.steered else [], axis)
        assert found.projection == pytest.approx(float(alone.answer.mean()), abs=1e-4)
        if one.steered:
            share = float((alone.corrections[:, 1:] > 0).float().mean())  # the first token is spared
            assert found.fired == pytest.approx(share)
        assert answerer.answers([one])[0].text == found.text


def test_a_stop_text_ends_the_answer_before_it(api):
    whole = ask(api()).choices[0]
    stop = whole.message.text[4:6]
    cut = ask(api(), stop_seqs=["nowhere to be found", stop])
    assert cut.completion == whole.message.text[: whole.message.text.index(stop)]
    assert cut.stop_reason == "stop"
    assert cut.metadata["personatlas"]["choices"][0]["tokens"] < cut.usage.output_tokens


def test_choices_have_seeds_of_their_own_and_the_first_is_the_only_one(api):
    one, three = ask(api()), ask(api(), num_choices=3)
    assert len({choice.message.text for choice in three.choices}) == 3
    assert three.completion == one.completion
    assert len({row["seed"] for row in three.metadata["personatlas"]["choices"]}) == 3


def test_messages_longer_than_the_context_end_with_model_length(api):
    long = ask(api(), "x" * 600)
    assert (long.stop_reason, long.completion, long.usage.output_tokens) == ("model_length", "", 0)
    near = ask(api(), "x" * 490, max_tokens=100, temperature=0.0)
    assert near.usage.total_tokens <= 512
    assert near.stop_reason in ("stop", "model_length")


IMAGE = ContentImage(image="data:image/png;base64,AAAA")


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("gives the model tools (bell)", {"tools": [ToolInfo(name="bell", description="rings")]}),
        ("logprobs=True is not something", {"logprobs": True}),
        ("top_k=4 is not something", {"top_k": 4}),
        ("frequency_penalty=0.5", {"frequency_penalty": 0.5}),
        ("num_choices=0 is below 1", {"num_choices": 0}),
        ("temperature -1.0 is outside", {"temperature": -1.0}),
        ("max_tokens 0 is below 1", {"max_tokens": 0}),
        ("a user message holds image", {"text": [ChatMessageUser(content=[ContentText(text="see"), IMAGE])]}),
        ("holds tool calls", {"text": [ChatMessageTool(content="rung")]}),
        ("the last message is the assistant's", {"text": [ChatMessageAssistant(content="I am")]}),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(api, said, given):
    with pytest.raises(InspectRefusal) as caught:
        ask(api(), **given)
    assert said in str(caught.value).replace("max_new_tokens", "max_tokens")
    assert "\n" not in str(caught.value)


def test_a_task_with_tools_ends_with_that_line(place):
    log = place("bells")
    assert log.status == "error"
    assert log.error.message.startswith("this task gives the model tools (bell)")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "Give -M axis=RUN"),
        ({"axis": "nowhere"}, "no axis at nowhere"),
        ({"axis": "RUN", "cap": "firm"}, "'firm' is not"),
        ({"axis": "RUN", "caps": "firm"}, "-M caps is not one of axis, cap"),
        ({"axis": "RUN", "batch": 0}, "-M batch=0"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_runs(tiny_run, arguments, said):
    given = {name: str(tiny_run / "run") if value == "RUN" else value for name, value in arguments.items()}
    with pytest.raises(UserError, match=said) as caught:
        get_model(f"personatlas/{tiny_run / 'tiny'}", memoize=False, **given)
    assert caught.value.message == str(caught.value)


def test_tokens_are_counted_by_the_models_own_tokenizer(api):
    conversation = [ChatMessageSystem(content="Be brief."), ChatMessageUser(content="Hi")]
    assert asyncio.run(api().count_tokens("four")) == 4  # its tokens are bytes
    assert asyncio.run(api().count_tokens(conversation)) == 9 + 2 + 5  # and five markers
    assert len(asyncio.run(api().tokenize("sea"))) == 3


def test_a_failure_is_that_of_every_call_in_the_batch_and_the_next_batch_is_answered():
    def answers(asked):
        if "bad" in asked:
            raise RuntimeError("out of memory")
        return [one.upper() for one in asked]

    async def calls():
        gatherer = CallBatcher(answers, 2)
        asked = (["bad"], ["a"], ["b", "c", "d"], ["e"])
        return await asyncio.gather(*map(gatherer.ask, asked), return_exceptions=True)

    bad, also, three, last = asyncio.run(calls())
    assert str(bad) == str(also) == "out of memory"
    assert (three, last) == (["B", "C", "D"], ["E"])


def test_logs_are_compared_scorer_by_scorer(place):
    before, after = place(cap="none", epochs=2), place(epochs=2)
    comparison = compare_inspect_arms(read_inspect_arm(before), read_inspect_arm(after))
    found = comparison.to_json()
    assert InspectComparison.from_json(found).to_json() == found
    assert found["pairs"] == 12
    assert set(found["scorers"]) == {"includes", "shape.long", "shape.word"}
    scored = found["scorers"]["includes"]
    assert scored["before"] == pytest.approx(before.results.scores[0].metrics["accuracy"].value)
    assert scored["after"] == pytest.approx(after.results.scores[0].metrics["accuracy"].value)
    assert scored["change"]["value"] == pytest.approx(scored["after"] - scored["before"])
    assert scored["change"]["clusters"] == 2  # roles
    assert scored["p_holm"] >= scored["change"]["p"]
    assert 0 < found["scorers"]["shape.long"]["change"]["p"] <= 1
    assert found["scorers"]["shape.word"] == {"n": 0, "left_out": 12, "is_shown": False}
    assert found["arms"][0]["fired"] is None
    assert found["projection"]["n"] == 12
    same = compare_inspect_arms(read_inspect_arm(after), read_inspect_arm(after)).to_json()["scorers"][
        "includes"
    ]
    assert (same["change"]["value"], same["change"]["p"], same["is_shown"]) == (0, 1, False)


def test_logs_that_differ_in_more_than_the_cap_are_refused(place):
    log = place(cap="none", epochs=2)

    def refused(other, said):
        with pytest.raises(UserError, match=said) as caught:
            compare_inspect_arms(read_inspect_arm(log), read_inspect_arm(other))
        assert "\n" not in str(caught.value)

    refused(place("fewer"), "are not of one task: task 'questions' and 'fewer'")
    refused(place(epochs=2, limit=2), "sample 2 of epoch 1 is in .* only, with 7 more")
    refused(place(epochs=2, temperature=0.0), "differ in more than the cap: temperature 0.7 and 0.0")
    for what, value in (
        ("dtype", "bfloat16"),
        ("direction", "ff"),
        ("fingerprint", "ff"),
        ("weights", "gguf Q4_1"),
    ):
        other = log.model_copy(deep=True)
        for sample in other.samples:
            own = sample.output.metadata["personatlas"]
            (own["model"] if what in own["model"] else own)[what] = value
        refused(other, f"differ in more than the cap: {what} .* and {value}")
        other.samples = [other.samples[0], *log.samples[1:]]
        refused(other, "several models, caps or samplings")
    other = log.model_copy(deep=True)
    other.samples[3].input = "Something else?"
    refused(other, "sample 3 is not the same")
    other.samples[3].output.metadata = None
    refused(other, "did not come from --model personatlas/NAME")
    refused(log.model_copy(update={"status": "cancelled"}), "ended with cancelled")
    refused(log.model_copy(update={"samples": None}), "holds no samples")


def test_what_is_no_log_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.eval").write_text("no zip")
    for name, said in (("a.json", "is not a log"), ("a.eval", "is not a log"), ("b.eval", "there is no log")):
        with pytest.raises(UserError, match=said):
            read_inspect_log(tmp_path / name)


def test_the_verb_runs_both_arms_with_one_model_and_compares_logs_that_are_there(
    place, tiny_run, tmp_path, capsys
):
    def told(task, *more):
        how = f"--axis {tiny_run / 'run'} --arm cap:{CAP} --device cpu --dtype float32 --max-new-tokens 8 --log-dir {tmp_path}"
        return ["eval", str(tiny_run / "tiny"), "--inspect", f"{place.folder}/{task}", *how.split(), *more]

    main(told("task.py@questions", "--limit", "400", "--json"))
    output, error = capsys.readouterr()
    assert f"questions there are {json.loads(output)['pairs']}, and all are used" in error
    main(told("task.py@questions", "--limit", "4", "--json"))
    output, error = capsys.readouterr()
    found = json.loads(output)
    assert "all are used" not in error
    assert found["pairs"] == 4
    assert [arm["cap"] for arm in found["arms"]] == [None, CAP]
    logs = [arm["log"] for arm in found["arms"]]
    assert all(Path(log).parent == tmp_path for log in logs)
    main(["eval", "--compare", *logs, "--json"])
    assert json.loads(capsys.readouterr().out) == found
    main(["eval", "--compare", *logs])
    shown = capsys.readouterr().out
    assert all(said in shown for said in ("includes", "projection", "the cap changed"))
    for wrong, said in (
        (told("task.py"), "task.py has 3 tasks"),
        (told("task.py@fever"), "has no task 'fever', only"),
        (told("tusk.py"), "there is no task file"),
        (told("task.py@bells"), "gives the model tools"),
        (told("task.py@questions", "--limit", "0"), "--limit 0 is below 1"),
        (["eval"], "give MODEL, or two logs"),
        (["eval", "smollm2-135m", "--compare", *logs], "no MODEL or task beside them"),
    ):
        with pytest.raises(SystemExit):
            main(wrong)
        assert said in capsys.readouterr().err


def test_without_inspect_the_verb_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["eval", "smollm2-135m", "--inspect", "task.py", "--axis", "run"])
    assert "run `pip install personatlas[inspect]`" in capsys.readouterr().err


def test_the_entry_point_leads_to_the_provider_and_loads_no_torch():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["inspect_ai"]
    assert EntryPoint("personatlas", points["personatlas"], "inspect_ai").load() is inspect_model
    code = f"import sys, {points['personatlas']}; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "False"
