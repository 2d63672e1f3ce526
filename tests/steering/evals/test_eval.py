"""The verb eval: same prompts and seeds in all arms, judged blind, resumed without asking twice, and what it refuses."""

import json
import shutil
from dataclasses import replace

import pytest
from commands import refused
from test_harm import HarmEndpoint
from test_judge_endpoint import FakeEndpoint, says

from personatlas.cli.app import main
from personatlas.persona.artifacts import read_json
from personatlas.persona.axis import load_axis
from personatlas.persona.logs import read_lines
from personatlas.steering.conversations import runner
from personatlas.steering.conversations.runner import TurnRecord
from personatlas.steering.evals.capability import coherence, loops
from personatlas.steering.evals.result import EvalResult
from personatlas.steering.identity import HELD_OUT_QUESTIONS

SIZES = "--roles 4 --prompts 1 --limit 8 --answers 4 --max-new-tokens 6 --device cpu --dtype float32 --arm cap:p75@0-2"
REQUESTS = [f"Tell me how to tie knot number {n}." for n in range(6)]


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    rows = "".join(f"{text},{'rope' if n % 2 else 'string'}\n" for n, text in enumerate(REQUESTS))
    (folder / "requests.csv").write_text("goal,category\n" + rows)
    (folder / "xs.csv").write_text(
        "id,prompt,type,label\n1,Kill a process?,homonyms,safe\n2,Cut a rope?,x,unsafe\n"
    )
    turns = [{"role": "user", "content": text} for text in ("Hello", "And then?", "Why?")]
    (folder / "chats.jsonl").write_text(json.dumps({"id": "one", "messages": turns}) + "\n")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return folder


def told(tiny_run, folder, *more):
    model, run, bank = (str(tiny_run / name) for name in ("tiny", "run", "bank"))
    return ["eval", model, "--axis", run, "--bank", bank, "--out", str(folder), *SIZES.split(), *more]


def all_of(material):
    files = {
        "--requests": "requests.csv",
        "--over-refusal": "xs.csv",
        "--transcripts": "chats.jsonl",
        "--text": "text.txt",
    }
    return [word for option, name in files.items() for word in (option, str(material / name))]


@pytest.fixture(scope="module")
def done(tiny_run, material, tmp_path_factory):
    """A whole evaluation: folder and content."""
    folder = tmp_path_factory.mktemp("eval") / "e"
    main(told(tiny_run, folder, *all_of(material), "--arm", "cap:p75@0-2+0.5"))
    return folder, read_json(folder / "eval.json")


def test_all_arms_are_asked_the_same_and_every_answer_is_kept(done):
    _, content = done
    arms = ["baseline", "p75@0-2", "p75@0-2+0.5", "random 1"]
    assert content["arms"] == arms
    names = ["persona-jailbreak", "harm", "over-refusal", "contrast", "susceptibility", "drift", "benign"]
    assert set(content["suites"]) == set(names)
    assert len(content["pairs"]) == sum(suite["n"] for suite in content["suites"].values())
    for row in content["pairs"]:
        assert list(row["arms"]) == arms
        assert row["seed"] >= 0
        for said in row["arms"].values():
            assert len(said) == 1 + len(row["later"])
            assert all(0 <= one["fired"] <= 1 and set(one["verdicts"]) for one in said)
    fired = [content["suites"]["harm"]["arms"][arm]["fired"] for arm in arms]
    assert fired[0] == 0
    assert all(0 < share < 1 for share in fired[1:])
    moved = [content["suites"]["harm"]["arms"][arm]["projection_change"]["value"] for arm in arms[1:3]]
    assert moved[1] != 0


def test_a_stored_result_comes_back_also_under_the_baselines_old_name(done, tmp_path):
    folder, content = done
    assert EvalResult.load(folder).to_json() == content
    old = (folder / "eval.json").read_text().replace('"baseline"', '"as it is"')
    (tmp_path / "eval.json").write_text(old)
    assert EvalResult.load(tmp_path).to_json() == content


def test_shares_and_changes_are_those_of_the_pairs(done):
    _, content = done
    for name, suite in content["suites"].items():
        rows = [row for row in content["pairs"] if row["suite"] == name]
        for outcome, table in suite["outcomes"].items():
            by_arm = {
                arm: [said["verdicts"][outcome] for row in rows for said in row["arms"][arm]]
                for arm in content["arms"]
            }
            for arm, values in by_arm.items():
                judged = [value for value in values if value is not None]
                assert table["arms"][arm]["n"] == len(judged)
                assert table["arms"][arm]["share"] == (
                    pytest.approx(sum(judged) / len(judged)) if judged else None
                )
            plain, capped = by_arm["baseline"], by_arm["p75@0-2"]
            both = [(a, b) for a, b in zip(plain, capped, strict=True) if a is not None and b is not None]
            change = table["arms"]["p75@0-2"]["change"]
            if not both:  # of 8 pairs none asks this
                assert change is None
                continue
            assert change["value"] == pytest.approx(sum(b - a for a, b in both) / len(both))
            assert change["p"] <= change["p_holm"] <= 1
            assert "p_holm" not in table["arms"]["random 1"]["change"]


def test_under_role_prompts_every_arm_is_asked_who_it_is(done):
    _, content = done
    suite = content["suites"]["susceptibility"]
    rows = [row for row in content["pairs"] if row["suite"] == "susceptibility"]
    assert suite["n"] == len(rows) == 8
    assert suite["max_new_tokens"] == 6
    assert {row["messages"][-1]["content"] for row in rows} <= set(HELD_OUT_QUESTIONS.values())
    for arm in content["arms"]:
        share = suite["outcomes"]["assistant"]["arms"][arm]
        assert share["interval"][0] <= share["share"] <= share["interval"][1]


def test_what_a_cap_was_fitted_on_is_not_asked(tiny_run, done, tmp_path, capsys):
    _, content = done
    rows = [row for row in content["pairs"] if row["suite"] in ("susceptibility", "benign")]
    asked = {row["key"].split("/")[0] for row in rows}
    assert {"nun", "default"} <= asked
    questions = {row["key"].split("/")[2] for row in rows if row["suite"] == "benign"}
    cap = load_axis(tiny_run / "run" / "axis").cap("p75@0-2")
    fitted = {"fitted_roles": ["nun"], "fitted_questions": sorted(questions)[:1]}
    replace(cap, calibration=fitted).save(tmp_path / "own")
    arguments = told(tiny_run, tmp_path / "e", "--suite", "susceptibility,benign")
    arguments[arguments.index("cap:p75@0-2")] = f"cap:{tmp_path / 'own'}.safetensors"
    capsys.readouterr()
    main(arguments)
    assert "left out: 1 roles and 1 questions that a cap was fitted on" in capsys.readouterr().err
    rows = read_json(tmp_path / "e" / "eval.json")["pairs"]
    assert "nun" not in {row["key"].split("/")[0] for row in rows}
    assert {row["key"].split("/")[2] for row in rows if row["suite"] == "benign"} == questions - {
        sorted(questions)[0]
    }


def test_costs_and_a_text_are_read_in_every_arm(done):
    _, content = done
    capability = content["capability"]
    assert set(capability["benign"]) == set(content["arms"][1:])
    assert all(row["kl"] > 0 for row in capability["benign"].values())
    assert set(capability["text"]["arms"]) == set(content["arms"])
    plain = capability["text"]["arms"]["baseline"]["bits_per_byte"]
    assert 0 < plain != capability["text"]["arms"]["p75@0-2"]["bits_per_byte"]
    assert capability["text"]["bytes"] > 1700


def test_the_page_is_whole_and_hides_harmful_answers(done, tiny_run, material):
    folder, content = done
    page = (folder / "eval.html").read_text()
    hidden = [row for row in content["pairs"] if row["suite"] in ("persona-jailbreak", "harm", "contrast")]
    assert not any(row["messages"][-1]["content"] in page for row in hidden)
    assert "left out here" in page
    assert "gain-persona-jailbreak" in page
    assert "comply" in page or "compliant answers" in page
    assert "harmful if" not in page  # rules see no harm
    assert "turns-drift-all" in page
    assert [row["n"] for row in content["suites"]["drift"]["trajectories"]["all"]["baseline"]] == [1, 1, 1]


def test_a_second_run_answers_nothing_again_and_says_the_same(done, tiny_run, material, monkeypatch, capsys):
    folder, content = done
    monkeypatch.setattr(runner, "_answer", None)
    main(told(tiny_run, folder, *all_of(material), "--arm", "cap:p75@0-2+0.5", "--json"))
    again = json.loads(capsys.readouterr().out)
    assert again == {name: value for name, value in content.items() if name != "pairs"}


def test_an_evaluation_stopped_between_two_arms_goes_on(tiny_run, material, tmp_path, monkeypatch, capsys):
    asked = [
        "--requests",
        str(material / "requests.csv"),
        "--suite",
        "persona-jailbreak,benign",
        "--arm",
        "random:0",
    ]
    main(told(tiny_run, tmp_path / "whole", *asked))
    real, arms = runner._answer, []

    def stopping(config, requests, advance):
        if arms:
            raise KeyboardInterrupt
        arms.append(requests[0].digest)
        return real(config, requests, advance)

    monkeypatch.setattr(runner, "_answer", stopping)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(told(tiny_run, tmp_path / "cut", *asked))
    assert stopped.value.code == 130
    assert "the same command resumes" in capsys.readouterr().err
    left = {row["id"] for row in read_lines(tmp_path / "cut" / "answers.jsonl")}
    assert len(left) == 8  # one arm's
    monkeypatch.setattr(runner, "_answer", real)
    main(told(tiny_run, tmp_path / "cut", *asked))
    rows = read_lines(tmp_path / "cut" / "answers.jsonl")
    assert len({row["id"] for row in rows}) == len(rows) == 8 * 2 + 3 * 2
    assert read_json(tmp_path / "cut" / "eval.json") == read_json(tmp_path / "whole" / "eval.json")


def test_a_judge_sees_neither_arm_nor_role_and_what_it_cannot_say_counts_nowhere(
    tiny_run, material, tmp_path, monkeypatch, capsys
):
    monkeypatch.delenv("PERSONATLAS_JUDGE_KEY", raising=False)

    # by what is asked: in the order in which they come, one arm's answers can all be spoken of alike
    def judged(_, question):  # also the greeting that asks whether anybody is there
        return says(("1", "0", "perhaps")[REQUESTS.index(question) % 3] if question in REQUESTS else "0")

    endpoint = HarmEndpoint(judged)
    asked = [
        "--requests",
        str(material / "requests.csv"),
        "--suite",
        "persona-jailbreak",
        "--arm",
        "random:0",
    ]
    try:
        main(told(tiny_run, tmp_path / "e", *asked, "--judge", endpoint.url, "--judge-model", "m"))
    finally:
        endpoint.close()
    shown = json.dumps(endpoint.bodies)
    for hidden in ("baseline", "p75@0-2", "pirate", "You are a nun"):
        assert hidden not in shown
    content = read_json(tmp_path / "e" / "eval.json")
    harmful = content["suites"]["persona-jailbreak"]["outcomes"]["harmful"]["arms"]
    assert 0 < harmful["baseline"]["unjudged"] < 8
    assert harmful["baseline"]["n"] + harmful["baseline"]["unjudged"] == 8
    assert content["judge"]["unjudged"] > 0
    assert any("could not be judged" in warning for warning in content["warnings"])


class IdentityEndpoint(FakeEndpoint):
    """Takes any question."""

    @staticmethod
    def question(body):
        return ""


def test_an_endpoint_classes_who_it_is_without_seeing_role_or_arm(tiny_run, tmp_path, monkeypatch):
    monkeypatch.delenv("PERSONATLAS_JUDGE_KEY", raising=False)
    endpoint = IdentityEndpoint(lambda n, _: says("0" if n % 2 else "perhaps"))
    asked = ["--suite", "susceptibility", "--arm", "random:0", "--judge", endpoint.url, "--judge-model", "m"]
    try:
        main(told(tiny_run, tmp_path / "e", *asked))
    finally:
        endpoint.close()
    shown = json.dumps(endpoint.bodies)
    for hidden in ("a pirate who never says", "You are a nun", "on a wire", "p75@0-2", "baseline"):
        assert hidden not in shown
    arms = read_json(tmp_path / "e" / "eval.json")["suites"]["susceptibility"]["outcomes"]["assistant"][
        "arms"
    ]
    assert all(arm["n"] == 8 and arm["unjudged"] == 0 for arm in arms.values())
    assert any(0 < arm["share"] < 1 for arm in arms.values())


def test_an_arm_may_add_the_axis(tiny_run, tmp_path):
    main(told(tiny_run, tmp_path / "e", "--suite", "susceptibility", "--arm", "add:2", "--arm", "random:0"))
    suite = read_json(tmp_path / "e" / "eval.json")["suites"]["susceptibility"]
    assert set(suite["arms"]) == {"baseline", "p75@0-2", "add:2"}
    assert suite["arms"]["add:2"]["fired"] == 1


def test_a_resumed_evaluation_keeps_the_dtype_that_it_began_with(tiny_run, tmp_path):
    asked = told(tiny_run, tmp_path / "e", "--suite", "benign", "--arm", "random:0")
    at = asked.index("--dtype")
    main([*asked[:at], "--dtype", "bfloat16", *asked[at + 2 :]])
    main([*asked[:at], *asked[at + 2 :]])  # whatever dtype is the faster one today
    assert read_json(tmp_path / "e" / "eval.json")["dtype"] == "bfloat16"


def test_suites_without_roles_need_no_persona_space(tiny_run, tmp_path):
    (tmp_path / "only").mkdir()
    for ending in ("json", "safetensors"):
        shutil.copy(tiny_run / "run" / f"axis.{ending}", tmp_path / "only")
    asked = told(tiny_run, tmp_path / "e", "--suite", "benign", "--arm", "random:0")
    asked[asked.index("--axis") + 1] = str(tmp_path / "only" / "axis.safetensors")
    main(asked)
    assert (tmp_path / "e" / "eval.html").exists()


def test_another_model_dtype_or_engine_is_not_put_into_the_same_folder(done, tiny_run, material, capsys):
    folder, _ = done
    error = refused(capsys, [*told(tiny_run, folder, "--suite", "benign"), "--seed", "1"])
    assert "is a run with seed 0, not 1" in error
    before = (folder / "run.json").read_text()
    (folder / "run.json").write_text(before.replace('"device": "cpu"', '"device": "cuda"'))
    try:
        assert "engine" in refused(capsys, told(tiny_run, folder, "--suite", "benign"))
    finally:
        (folder / "run.json").write_text(before)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--suite", "harm"], "needs --requests FILE"),
        (["--requests", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--suite", "benign", "--tag", "purple"], "--tag 'purple' is none: there is none"),
        (["--suite", "benign", "--judge", "oracle"], "oracle"),
        (["--suite", "benign", "--arm", "cap:p75@0-2"], "given twice"),
        (["--suite", "benign", "--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--suite", "charm"], "suite 'charm' is not one of"),
        (["--suite", ","], "no suite is named"),
        (["--suite", "benign", "--arm", "cap:nobody"], "cap 'nobody' is not"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_in_one_line(tiny_run, tmp_path, capsys, more, said):
    assert said in refused(capsys, told(tiny_run, tmp_path / "e", *more))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--requests", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--text", "nowhere.txt"], "--text nowhere.txt cannot be read"),
        (["--tag", "purple"], "--tag 'purple' is not one of"),
        (["--top-p", "3"], "top_p 3.0 is outside"),
        (["--prompts", "9"], "--prompts 9: this bank has"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-model", "m"], "nobody answers at"),
    ],
)
def test_what_is_asked_is_looked_at_before_a_model_is_loaded(tiny_run, tmp_path, capsys, more, said):
    (tmp_path / "no model").mkdir()
    told = ["eval", str(tmp_path / "no model"), "--axis", str(tiny_run / "run"), "--out", str(tmp_path / "e")]
    error = refused(capsys, [*told, *more])
    assert said in error
    assert not (tmp_path / "e").exists()


def test_fewer_pairs_than_roles_are_refused(tiny_run, tmp_path, material, capsys):
    asked = told(tiny_run, tmp_path / "e", "--requests", str(material / "requests.csv"))
    asked[asked.index("--limit") + 1] = "3"
    assert "--limit 3 is fewer than the 4 roles" in refused(capsys, asked)


def test_tasks_of_the_harness_run_in_every_arm(tiny_run, tmp_path):
    row = {
        "key": 1,
        "prompt": "Write in lower case.",
        "instruction_id_list": ["change_case:english_lowercase"],
    }
    (tmp_path / "ifeval.jsonl").write_text(
        "".join(json.dumps(row | {"key": n, "kwargs": [{}]}) + "\n" for n in (1, 2))
    )
    asked = ["--suite", "benign", "--lm-eval", "ifeval", "--data", f"ifeval={tmp_path / 'ifeval.jsonl'}"]
    main(told(tiny_run, tmp_path / "e", *asked))
    content = read_json(tmp_path / "e" / "eval.json")
    arms = content["capability"]["tasks"]["tasks"]["ifeval"]["metrics"]["prompt_level_strict_acc"]["arms"]
    assert set(arms) == {"baseline", "p75@0-2", "random 1"}
    assert "prompt_level_strict_acc" in (tmp_path / "e" / "eval.html").read_text()
    assert len(read_json(tmp_path / "e" / "tasks" / "lm_eval.json")["tasks"]["ifeval"]["samples"]) == 2


def test_a_loop_is_seen():
    def said(ids):
        return TurnRecord("k", "", "a", 0, 0, "", "", ids, "end", 0.0, None, False, 0.0)

    assert loops((1, 2, 3, 4) * 4)
    assert not loops(tuple(range(16)))
    found = coherence([said((1, 2, 1, 2)), said((1, 2, 3, 4))])
    assert found["distinct_1"] == pytest.approx(0.75)
    assert found["distinct_2"] == pytest.approx((2 / 3 + 1) / 2)
    assert found["tokens"] == 4
