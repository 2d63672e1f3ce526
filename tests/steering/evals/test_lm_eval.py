"""lm-eval's harness over a model: the same numbers as without steering, others with it, and nothing asked twice."""

import json
import socket
import sys
from pathlib import Path

import pytest
import torch
from families import save_tiny, tiny_model
from tiny_axis import axis_of

from personatlas.analysis.stats import paired_change
from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.logs import read_lines
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import load_model
from personatlas.steering.evals.harnesses.lm_eval_result import (
    LmEvalResult,
    MetricValue,
    TaskMetric,
    TaskResult,
    compare_arms,
    sample_outcome,
)
from personatlas.steering.evals.harnesses.lm_eval_run import compare_tasks
from personatlas.steering.evals.options import LmEvalOptions

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning:(lm_eval|datasets|evaluate|nltk|langdetect|dill).*"
    )
]

CHOICE = """
task: tiny_choice
dataset_path: json
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
WRITE = """
task: tiny_write
dataset_path: json
output_type: generate_until
test_split: test
doc_to_text: question
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
WHOLE = """
task: tiny_whole
dataset_path: json
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
NAMES = ("tiny_choice", "tiny_write", "tiny_whole")
CONTEXTS = ["Who are you?", "Tell me more about the sea, and of the ships.", "Why"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("there is no network in the tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Three tasks in "tasks", their rows in NAME.jsonl, a tiny model and an axis."""
    folder = tmp_path_factory.mktemp("lm_eval")
    (folder / "tasks").mkdir()
    rows = [
        {"question": f"{word}, or not?", "choices": ["yes", "no", "a sea"], "gold": i % 3, "answer": "x", "text": f"{word} and so on"}
        for i, word in enumerate(("ship", "sail", "storm", "harbour"))
    ]  # fmt: skip
    for name, text in zip(NAMES, (CHOICE, WRITE, WHOLE), strict=True):
        (folder / "tasks" / f"{name}.yaml").write_text(text)
        (folder / f"{name}.jsonl").write_text(
            "\n".join(json.dumps(row) for row in rows)
        )  # without a last newline
    save_tiny(folder / "tiny")
    axis_of(load_model(str(folder / "tiny"), dtype="float32")).save(folder / "axis")
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def lm_of(model, plan=(), **how):
    from personatlas.steering.evals.harnesses.lm_eval import PersonatlasLM

    return PersonatlasLM(model, chat_format(model.tokenizer), plan, **how)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def pairs():
    return asked(
        "loglikelihood",
        *[(c, t) for c in CONTEXTS for t in (" yes", " no", " n", " x")],
        ("", "alone"),
        ("A b ", "c"),
    )


def run(model, place, arms, names=NAMES, out=None, **options):
    data = [f"{name}={place / f'{name}.jsonl'}" for name in names]
    options = LmEvalOptions(data=data, tasks_folder=place / "tasks", **options)
    result = compare_tasks(model, arms, names, out, options)
    assert LmEvalResult.from_json(result.to_json()).to_json() == result.to_json()
    return result.to_json()


def test_log_likelihoods_are_those_of_a_plain_forward(model):
    found = lm_of(model).loglikelihood(pairs())
    for request, (value, is_greedy) in zip(pairs()[:12], found, strict=False):
        before, after = (model.tokenizer(text)["input_ids"] for text in request.args)
        with torch.no_grad():
            logits = (
                model.hf(input_ids=torch.tensor([before + after]))
                .logits[0, len(before) - 1 : -1]
                .log_softmax(-1)
            )
        assert value == pytest.approx(float(logits[range(len(after)), after].sum()), abs=1e-4)
        assert is_greedy == (logits.argmax(-1).tolist() == after)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_all_that_is_asked_is_answered_as_by_lm_evals_own_model(family):
    from lm_eval.models.huggingface import HFLM

    model = tiny_model(family)
    ours, theirs = (
        lm_of(model),
        HFLM(pretrained=model.hf, tokenizer=model.tokenizer, device="cpu", batch_size=1),
    )
    assert (ours.max_length, ours.prefix_token_id) == (theirs.max_length, theirs.prefix_token_id)
    long = [("x" * 700, " end"), ("ab" * 300, "c" * 20)]  # more than the 512 that it reads
    for one, other in zip(
        *(lm.loglikelihood(pairs() + asked("loglikelihood", *long)) for lm in (ours, theirs)), strict=True
    ):
        assert one == (pytest.approx(other[0], abs=1e-3), other[1])
    assert ours.counts.cut == 2
    whole = asked("loglikelihood_rolling", ("short",), ("long text " * 120,), ("<bos>begun",))
    torch.testing.assert_close(
        torch.tensor(ours.loglikelihood_rolling(whole)), torch.tensor(theirs.loglikelihood_rolling(whole))
    )
    for until in ([], ["e"], ["\n\n", "qu"]):
        written = asked(
            "generate_until", *[(context, {"until": list(until), "max_gen_toks": 12}) for context in CONTEXTS]
        )
        assert ours.generate_until(written) == theirs.generate_until(written)


def test_a_batch_of_many_says_what_batches_of_one_say(model):
    plan = [axis_of(model).quantile_cap((0, 1), 0.75)]
    many, one = lm_of(model, plan), lm_of(model, plan)
    together, alone = many.loglikelihood(pairs()), [one.loglikelihood([request])[0] for request in pairs()]
    assert [value for value, _ in together] == pytest.approx([value for value, _ in alone], abs=1e-4)
    written = asked("generate_until", *[(context, {"max_gen_toks": 6}) for context in CONTEXTS])
    assert many.generate_until(written) == [one.generate_until([request])[0] for request in written]
    assert many.counts.fired > 0


def test_context_is_prompt_and_continuation_is_answer(model):
    """A change of the answer's phase begins with the continuation, so it cannot touch the first of its tokens."""
    axis = axis_of(model)
    phases = {phase: lm_of(model, [axis.add(5.0, (0,), phase)]) for phase in ("prompt", "answer")}
    first, both = asked("loglikelihood", ("Who", "x")), asked("loglikelihood", ("Who", "xyz"))
    plain = lm_of(model)
    assert phases["answer"].loglikelihood(first)[0][0] == pytest.approx(
        plain.loglikelihood(first)[0][0], abs=1e-5
    )
    assert phases["answer"].loglikelihood(both)[0][0] != pytest.approx(
        plain.loglikelihood(both)[0][0], abs=1e-3
    )
    assert phases["answer"].counts.seen == 2  # y and z are predicted from x and y, which were read as answer
    phases["prompt"].loglikelihood(both)
    assert phases["prompt"].counts.seen == 2  # W is spared
    whole = asked("loglikelihood_rolling", ("abcd",))
    assert phases["prompt"].loglikelihood_rolling(whole)[0] == pytest.approx(
        plain.loglikelihood_rolling(whole)[0], abs=1e-5
    )


def test_what_differs_in_its_last_token_alone_is_read_once(model):
    lm = lm_of(model, [axis_of(model).quantile_cap((0,), 0.75)])
    lm.loglikelihood(asked("loglikelihood", ("Who", "x"), ("Who", "y"), ("Who", "z"), ("Who", "x")))
    assert (lm.counts.requests, lm.counts.seen) == (3, 2)


def test_repeated_samples_differ_and_are_the_same_again(model):
    given = {"max_gen_toks": 10, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", *[("Who?", dict(given)) for _ in range(3)])
    found = lm_of(model).generate_until(requests)
    assert len(set(found)) == 3
    assert lm_of(model).generate_until(requests) == found


def test_a_setting_that_would_be_ignored_and_an_answer_too_long_are_refused(model):
    with pytest.raises(UserError, match="generation setting top_k: 5 is not supported"):
        lm_of(model).generate_until(asked("generate_until", ("Who", {"top_k": 5})))
    with pytest.raises(UserError, match="give fewer with --max-new-tokens"):
        lm_of(model).generate_until(asked("generate_until", ("Who", {"max_gen_toks": 512})))


def test_a_strong_cap_changes_values_and_accounts_for_its_tokens(model, place):
    arms = {"baseline": [], "strong": [axis_of(model).add(60.0, (0, 1, 2))]}
    found = run(model, place, arms)
    for name in NAMES:
        task = found["tasks"][name]
        assert task["n"] == len(task["samples"]) == 4
        assert task["account"]["baseline"]["seen"] == 0
        assert task["account"]["strong"]["fired"] == task["account"]["strong"]["seen"] > 0
        assert any(one["arms"]["strong"] != one["arms"]["baseline"] for one in task["samples"])
    acc = found["tasks"]["tiny_choice"]["metrics"]["acc"]["arms"]
    scores = [
        [one["arms"][arm]["scores"]["acc"] for one in found["tasks"]["tiny_choice"]["samples"]]
        for arm in arms
    ]
    assert acc["strong"]["change"] == pytest.approx(sum(scores[1]) / 4 - sum(scores[0]) / 4)
    whole = found["tasks"]["tiny_whole"]["metrics"]["byte_perplexity"]["arms"]["baseline"]
    assert whole["mean"] == pytest.approx(torch.tensor(whole["value"]).log().item(), abs=1e-5)  # nats a byte
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_an_interrupted_run_goes_on_and_asks_nothing_twice(model, place, tmp_path, monkeypatch):
    from personatlas.steering.evals.harnesses.lm_eval import PersonatlasLM

    arms = {"baseline": [], "capped": [axis_of(model).quantile_cap((0, 1), 0.75)]}
    whole = run(model, place, arms)
    with monkeypatch.context() as patch:
        patch.setattr(
            PersonatlasLM, "loglikelihood_rolling", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            run(model, place, arms, out=tmp_path)
    with (tmp_path / "answers.jsonl").open("a") as file:
        file.write('{"key": "half a li')
    before = read_lines(tmp_path / "answers.jsonl")
    again = run(model, place, arms, out=tmp_path)
    rows = read_lines(tmp_path / "answers.jsonl")
    assert len(before) == 2 * (12 + 4)
    assert len({row["key"] for row in rows}) == len(rows) == 2 * (12 + 4 + 4)
    assert again["tasks"]["tiny_choice"]["account"]["capped"]["reused"] == 12
    for name in NAMES:
        assert again["tasks"][name]["samples"] == whole["tasks"][name]["samples"]
        assert (
            again["tasks"][name]["account"]["capped"]["fired"]
            == whole["tasks"][name]["account"]["capped"]["fired"]
        )
    assert json.loads((tmp_path / "lm_eval.json").read_text()) == again


def test_ifeval_is_checked_without_a_download_and_says_so(model, tmp_path):
    rows = [
        {"key": 1, "prompt": "Say a word.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
        {"key": 2, "prompt": "Two.", "instruction_id_list": ["length_constraints:number_sentences", "punctuation:no_comma"],
         "kwargs": [{"relation": "less than", "num_sentences": 90}, {"relation": None, "num_sentences": None}]},
    ]  # fmt: skip
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = LmEvalOptions(data=[f"ifeval={tmp_path / 'own.jsonl'}"], max_new_tokens=8)
    found = compare_tasks(model, {"baseline": []}, ["ifeval"], options=options).to_json()
    metrics = found["tasks"]["ifeval"]["metrics"]
    assert set(metrics) == {f"{a}_level_{b}_acc" for a in ("prompt", "inst") for b in ("strict", "loose")}
    assert (
        metrics["inst_level_strict_acc"]["arms"]["baseline"]["value"]
        == metrics["inst_level_strict_acc"]["arms"]["baseline"]["mean"]
    )
    noted = [note for note in found["notes"] if "1 instructions are checked" in note]
    assert len(noted) == 1 or Path(sys.prefix, "nltk_data").exists()


def test_examples_from_the_same_file_are_never_the_row_that_is_asked(model, place):
    found = run(model, place, {"baseline": []}, ["tiny_choice"], fewshot=2, raw=True)
    assert found["tasks"]["tiny_choice"]["fewshot"] == 2
    assert "its 2 examples come from" in found["notes"][0]


def task_of(n, **metrics):
    """A task of n samples with the arms plain and capped."""
    values = {
        name: TaskMetric(None, {arm: MetricValue(0.5) for arm in ("plain", "capped")}) for name in metrics
    }
    return TaskResult(n, "generate_until", 0, 1, values, {}), metrics


def test_changes_are_paired_over_samples_and_adjusted_over_metrics():
    before, after = [1.0] * 10 + [0.0] * 10, [0.0] * 9 + [1.0] + [0.0] * 10
    scored = {
        arm: {i: sample_outcome(v) for i, v in enumerate(own)}
        for arm, own in (("plain", before), ("capped", after))
    }
    task, outcomes = task_of(
        20, acc=scored, f1={arm: {0: sample_outcome((1, 0))} for arm in ("plain", "capped")}
    )
    metrics = compare_arms({"t": task}, "plain", {"t": outcomes}, 0.02)["t"].metrics
    capped = metrics["acc"].arms["capped"]
    assert capped.change == pytest.approx(-0.45)
    assert (
        capped.p
        == capped.p_holm
        == pytest.approx(paired_change(before, after, list(range(20)), list(range(20))).p)
    )
    assert 1e-4 < capped.p < 0.01  # McNemar's is 0.004
    assert capped.tost_p > 0.99
    assert metrics["f1"].arms["capped"].mean is None
    assert sample_outcome([True, False, True]) == (2.0, 3.0)
    assert sample_outcome((-6.0, 3), is_whole=True) == (6.0, 3.0)
    assert sample_outcome("text") is None


def test_samples_that_never_differ_prove_no_more_than_their_number():
    task, outcomes = task_of(3, acc={arm: dict.fromkeys(range(3), (0.0, 1.0)) for arm in ("plain", "capped")})
    capped = compare_arms({"t": task}, "plain", {"t": outcomes}, 0.02)["t"].metrics["acc"].arms["capped"]
    assert (capped.p, capped.tost_p) == (1.0, pytest.approx(0.98**3))
    assert capped.interval == pytest.approx((-0.632, 0.632), abs=1e-3)


def told(place, *more, tasks="tiny_choice"):
    how = ["--axis", str(place / "axis"), "--arm", "cap:p75@0-1", "--dtype", "float32", "--device", "cpu"]
    return [
        "eval",
        str(place / "tiny"),
        "--lm-eval",
        tasks,
        *how,
        "--tasks-folder",
        str(place / "tasks"),
        *more,
    ]


def test_the_verb_prints_a_table_and_keeps_every_answer(place, tmp_path, capsys):
    data = f"tiny_choice={place / 'tiny_choice.jsonl'}"
    n = len((place / "tiny_choice.jsonl").read_text().splitlines())
    main(told(place, "--data", data, "--limit", str(n + 1), "--out", str(tmp_path / "more")))
    assert f"--limit {n + 1}: of tiny_choice there are {n}, and all are used" in capsys.readouterr().err
    main(told(place, "--data", data, "--limit", "3", "--out", str(tmp_path / "out")))
    shown, error = capsys.readouterr()
    assert "all are used" not in error
    for word in (
        "tiny_choice",
        "acc",
        "baseline",
        "p75@0-1",
        "tiny_choice: 3 samples",
        "fired",
        "no loss, p",
    ):
        assert word in shown
    main(told(place, "--data", data, "--limit", "3", "--out", str(tmp_path / "out"), "--json"))
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "out" / "lm_eval.json").read_text())
    assert found["tasks"]["tiny_choice"]["account"]["p75@0-1"]["reused"] == 9


@pytest.mark.parametrize(
    ("tasks", "rows", "said"),
    [
        ("tiny_chioce", None, "task 'tiny_chioce' is not one of"),
        ("tiny_choice", "gone", "does not exist"),
        ("tiny_choice", "", "is empty"),
        ("tiny_choice", "[1]\n", ", item 1 is 1; an object is needed"),
        ("tiny_choice", "{\n", ":1 is not valid JSON"),
        (
            "tiny_choice",
            '{"question": "a", "gold": 0}\n',
            "has no column 'choices', which the task tiny_choice needs",
        ),
        ("ifeval", '{"prompt": "a"}\n', "task ifeval needs the column 'key'"),
        ("tiny_write", "other", "is for a task that is not asked for"),
        ("", None, "no task is named"),
    ],
)
def test_what_cannot_be_run_is_one_line(place, tmp_path, capsys, monkeypatch, tasks, rows, said):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", Small)
    file = tmp_path / "own.jsonl"
    if rows not in (None, "gone"):
        file.write_text(rows)
    given = [] if rows is None else ["--data", f"{'tiny_choice' if rows == 'other' else tasks}={file}"]
    with pytest.raises(SystemExit) as stopped:
        main(told(place, *given, "--out", str(tmp_path / "out"), "--max-new-tokens", "4", tasks=tasks))
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("personatlas: ")]
    assert stopped.value.code == 2
    assert len(error) == 1
    assert said in error[0]


class Small:
    """An index without the 14,000 built-in files, but for those in the folders that it is given."""

    def __new__(cls, **how):
        from lm_eval.tasks.manager import TaskManager

        return TaskManager(**how | {"include_defaults": False})


def test_without_lm_eval_the_verb_says_what_to_install(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        main(told(place))
    assert (
        capsys.readouterr().err == "personatlas: lm-eval is not installed: pip install personatlas[lm-eval]\n"
    )


def test_without_an_axis_a_model_is_asked_as_it_is_and_cannot_be_capped(place, tmp_path, capsys):
    rows = ["--data", f"tiny_choice={place / 'tiny_choice.jsonl'}", "--limit", "3", "--out", str(tmp_path)]
    model = [
        "eval",
        str(place / "tiny"),
        "--lm-eval",
        "tiny_choice",
        "--device",
        "cpu",
        "--tasks-folder",
        str(place / "tasks"),
    ]
    main([*model, *rows])
    content = json.loads((tmp_path / "lm_eval.json").read_text())
    assert list(content["tasks"]["tiny_choice"]["account"]) == ["baseline"]
    assert "fired" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*model, *rows, "--arm", "cap:assistant"])
    assert "has no axis in" in capsys.readouterr().err
