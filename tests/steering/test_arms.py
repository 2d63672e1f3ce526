"""Arms: whatever `ARM_KINDS` names goes through every command that takes `--arm`, and random controls where arms are
compared.
"""

import json
from dataclasses import dataclass, replace

import pytest
import torch
from commands import refused
from families import tiny_model
from tiny_axis import axis_of

from personatlas.cli.app import main
from personatlas.persona.axis import load_axis
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Intervention
from personatlas.persona.runs import packaged_axis_folder
from personatlas.steering.arm_kinds import ARM_KINDS, ArmKind, arm_help, arm_words, as_arm, with_default
from personatlas.steering.arms import InterventionSummary, default_arm, parse_arm, parse_arms, summarise_arms
from personatlas.steering.conversations import runner
from personatlas.steering.drift.result import DriftResult
from personatlas.steering.serve.schema import ChatRequest
from personatlas.steering.session import load_steered_model

HOW = ["--device", "cpu", "--dtype", "float32"]
SHORT = [*HOW, "--max-new-tokens", "4"]


@dataclass(frozen=True)
class Band(Intervention):
    """Keeps the projection between two values."""

    low: float
    high: float

    def steps(self, row):
        """One step."""
        return [self._step(row, self.low, self.high)]


def make_band(axis, match):
    low, high, layer = float(match["low"]), float(match["high"]), int(match["layer"])
    return Band((layer,), axis.at(layer)[None], low, high, spare_first=True, model=axis.model)


@pytest.fixture
def band(monkeypatch):
    """The name of an arm of a kind that nothing but `ARM_KINDS` knows."""
    kind = ArmKind("band:-2:3@21", r":(?P<low>[-.\d]+):(?P<high>[-.\d]+)@(?P<layer>\d+)", make_band)
    monkeypatch.setitem(ARM_KINDS, "band", kind)
    return "band:-0.01:0.01@1"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "scripts.jsonl"
    rows = [
        {"id": f"{domain}-{n}", "domain": domain, "messages": [{"role": "user", "content": f"{domain} {n}"}]}
        for domain in ("coding", "everyday")
        for n in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(name, tiny_run, *more):
    target = [] if name == "calibrate" else [str(tiny_run / "tiny"), "--axis", str(tiny_run / "run")]
    words = {"self-test": ["tools", "self-test"], "calibrate": ["calibrate", str(tiny_run / "run")]}
    return [*words.get(name, [name]), *target, *map(str, more)]


def found(capsys, name, tiny_run, *more):
    """What a command prints as JSON."""
    capsys.readouterr()
    main([*command(name, tiny_run, *more), "--json"])
    return json.loads(capsys.readouterr().out)


def calibrated(capsys, tiny_run, *arms):
    search = (
        "--windows 0-1 --levels 0.5 --budget 5 --roles 4 --prompts 1 --answers 4 --steps 0 --max-new-tokens 4"
    )
    options = [*search.split(), "--bank", tiny_run / "bank", "--device", "cpu"]
    return found(capsys, "calibrate", tiny_run, *options, *arms)


def test_a_kind_that_is_registered_is_taken_by_every_command_that_compares_arms(
    band, tiny_run, scripts, tmp_path, capsys
):
    arms = ["--arm", band, "--arm", "cap:p50@1", "--arm", "random:2"]
    names = ["baseline", band, "p50@1", "random 1", "random 2"]
    page = tmp_path / "page.html"
    answers = found(capsys, "generate", tiny_run, "Who are you?", *arms, *SHORT, "--html", page)
    assert list(answers) == names
    assert sum(answers[band]["account"]["fired"]) > 0
    steered = found(capsys, "generate", tiny_run, "Hi", "--arm", "add:3@2", "--arm", "cap:p50@0,1", *SHORT)
    assert {name: own["steered_layers"] for name, own in steered.items()} == {"baseline": [], "add:3@2": [2], "p50@0,1": [0, 1]}  # fmt: skip
    assert all(
        len(own["account"]["seen"]) == len(own["steered_layers"]) for own in list(steered.values())[1:]
    )
    assert f"{band}: band, layers 1, prompt and answer" in page.read_text()
    out = tmp_path / "eval"
    bank = tiny_run / "bank"
    result = found(capsys, "eval", tiny_run, "--suite", "benign", "--out", out, "--bank", bank, *arms, *SHORT)
    assert result["arms"] == names
    assert result["caps"][band] == {"kind": "band", "layers": "1", "level": None, "phase": "both", "population": None, "spare_first": True}  # fmt: skip
    assert result["asked"]["random"] == 2
    drift = found(capsys, "drift", tiny_run, "--scripts", scripts, "--out", tmp_path / "drift", *arms, *SHORT)
    assert drift["arms"][:5] == names
    assert drift["wrote"][band]["fired"] > 0
    assert set(drift["cost"]["arms"]) == set(names[1:])
    report = calibrated(capsys, tiny_run, *arms)["report"]
    own = {*names, "chosen", "add 4", "add 8", "add 16"}
    assert own <= set(report)
    assert all(name.endswith((", same KL", ", fitted")) for name in set(report) - own)
    assert report[band]["fired"] > 0
    checks = found(capsys, "self-test", tiny_run, "--arm", band, *HOW)
    own = [check for check in checks if check["name"].startswith(f"{band}: steered blocks")]
    assert [check["passed"] for check in own] == [True]


def test_a_kind_that_is_registered_is_the_default_of_chats_and_servers(band, tiny_run, capsys, monkeypatch):
    asked = command("chat", tiny_run, "--arm", band, "--message", "Who are you?", "--message", "/arm", *HOW)
    main([*asked, "--max-new-tokens", "4"])
    shown = capsys.readouterr().out
    assert f"{band} fired" in shown
    assert f"\n{band}\narms: " in shown
    services = []
    monkeypatch.setattr(
        "personatlas.steering.serve.http.uvicorn_server.listen",
        lambda app, service, host, port: services.append(service),
    )
    main(command("serve", tiny_run, "--arm", band, "--port", "18377", *HOW))
    (service,) = services
    assert service.default_arm.name == band
    assert service.arms.describe()[band]["kind"] == "band"
    messages = [{"role": "user", "content": "Hi"}]
    for persona, name in (
        ({}, band),
        ({"arm": "add:2@1"}, "add:2@1"),
        ({"arm": "cap:p50@1"}, "p50@1"),
        ({"cap": "p50@1"}, "p50@1"),
        ({"arm": "band:-1:1@0"}, "band:-1:1@0"),
        ({"arm": "baseline"}, None),
        ({"arm": None}, None),
        ({"cap": None}, None),
    ):
        arm, _ = service.resolve_arm(ChatRequest(messages=messages, persona=persona))
        assert (arm and arm.name) == name
    with pytest.raises(ValueError, match="arm and cap say the same"):
        ChatRequest(messages=messages, persona={"arm": band, "cap": None})
    for text in ("cap:../caps/held", "random:2", "band:x", "cap:/etc/passwd"):
        with pytest.raises(UserError):
            service.resolve_arm(ChatRequest(messages=messages, persona={"arm": text}))


@pytest.mark.parametrize(
    "arm", ["add:3", "add:-3@0-2", "ablate", "ablate@1", "mean-ablate:0.5@0,2", "cap:p50@1"]
)
def test_every_kind_of_arm_is_compared_with_the_baseline(arm, tiny_run, capsys):
    answers = found(capsys, "generate", tiny_run, "Who are you?", "--arm", arm, *SHORT)
    assert set(answers) == {"baseline", arm.removeprefix("cap:")}
    main(command("generate", tiny_run, "Who are you?", "--arm", arm, *SHORT))
    assert f"{arm.removeprefix('cap:')} changed " in " ".join(capsys.readouterr().out.split())


def test_random_controls_are_refused_in_one_line_where_nothing_is_compared(tiny_run, tmp_path, capsys):
    task = tmp_path / "task.py"
    task.write_text("from inspect_ai import Task, task\n\n\n@task\ndef hello():\n    return Task()\n")
    controls = ["--arm", "cap:p50@1", "--arm", "random:3", *HOW]
    for name, more in (
        ("chat", ["--message", "Hi", "--arm", "random:3", *HOW]),
        ("serve", ["--port", "18378", "--arm", "random:3", *HOW]),
        ("self-test", controls),
        ("eval", ["--inspect", task, *controls]),
        ("eval", ["--lm-eval", "ifeval", *controls]),
    ):
        if name == "eval":
            pytest.importorskip("inspect_ai" if "--inspect" in more else "lm_eval")
        line = refused(capsys, command(name, tiny_run, *more))
        assert "random:3 has no place here: random controls are for eval, generate, drift and" in line


def test_random_controls_need_a_cap_to_be_matched_to(tiny_run, tmp_path, capsys):
    arms = ["--arm", "add:3", "--arm", "random:1"]
    for name, more in (("generate", ["Hi"]), ("drift", ["--out", tmp_path]), ("eval", ["--out", tmp_path])):
        line = refused(capsys, command(name, tiny_run, *more, *arms, *HOW))
        assert "random:1 is matched to a cap, and no arm is one: add --arm cap:..." in line


def test_arms_that_cannot_be_are_refused_in_one_line(tiny_run, capsys):
    def says(name, *more):
        return refused(capsys, command(name, tiny_run, *more, *HOW))

    assert "one arm acts at a time, and 2 are given" in says("chat", "--arm", "add:2", "--arm", "ablate")
    assert "the arm add:2 is given twice" in says("generate", "Hi", "--arm", "add:2", "--arm", "add:2")
    assert "is not baseline, random:3, or such as cap:p50@18-23" in says("generate", "Hi", "--arm", "add")
    assert "layer 9 is not in this axis" in says("generate", "Hi", "--arm", "add:2@9")
    assert "a layer is named twice" in says("generate", "Hi", "--arm", "add:2@1,1")
    model = tiny_model()
    axis = axis_of(model)
    with pytest.raises(UserError, match="chosen is the name of another arm here"):
        load_steered_model(model, axis, {"chosen": [axis.add(1.0, [1])]}, reserved="chosen")


def test_a_study_in_the_names_of_earlier_versions_goes_on_without_asking_again(
    tiny_run, scripts, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "drift"
    asked = [
        "--arm",
        "cap:p90@1",
        "--scripts",
        scripts,
        "--seeds",
        "9",
        "--false-alarms",
        "0.4",
        "--out",
        out,
    ]
    before = found(capsys, "drift", tiny_run, *asked, *SHORT)
    adaptive = "p90@1, adaptive"
    assert before["arms"] == ["baseline", "p90@1", adaptive]
    log = out / "turns.jsonl"
    old_names = {"baseline": "as it is", "p90@1": "capped", adaptive: "adaptive"}
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(row | {"arm": old_names[row["arm"]]}) + "\n" for row in rows))
    monkeypatch.setattr(runner, "_answer", None)
    assert found(capsys, "drift", tiny_run, *asked, *SHORT) == before
    old = json.loads(json.dumps(before).replace(adaptive, "adaptive").replace("p90@1", "capped"))
    summary = old.pop("interventions")["capped"]
    old["cap"] = {"name": "p90@1"} | {name: summary[name] for name in ("layers", "phase", "level")}
    old["cost"] = {"n": old["cost"]["n"], **old["cost"]["arms"]}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "drift.json").write_text(json.dumps(old | {"examples": []}))
    result = DriftResult.load(tmp_path / "old")
    assert result.interventions["adaptive"].layers == "1"
    assert list(result.cost.arms) == ["capped", "adaptive"]


def test_an_arms_text_its_name_and_its_words():
    axis = axis_of(tiny_model())
    assert [arm.name for arm in parse_arms(["cap:p50@1", "add:2"], axis)] == ["baseline", "p50@1", "add:2"]
    assert as_arm("p50@1") == as_arm("cap:p50@1") == "cap:p50@1"
    assert as_arm("roles:p75@1") == "cap:roles:p75@1"
    assert (arm_words("assistant"), arm_words("add:8@21")) == ("cap assistant", "add:8@21")
    assert with_default(["random:3"], lambda: "cap:assistant") == ["cap:assistant", "random:3"]
    assert with_default(["random:3"], lambda: None) == ["random:3"]
    assert with_default(["add:2", "random:3"], lambda: "cap:assistant") == ["add:2", "random:3"]
    two = [axis.add(1.0, [1]), axis.ablate([0, 2])]
    summaries = summarise_arms({"baseline": [], "two": two})
    assert {name: (own.kind, own.layers) for name, own in summaries.items()} == {"two": ("add", "1"), "two (2)": ("ablate", "0, 2")}  # fmt: skip
    good = summaries["two"].to_json()
    assert InterventionSummary.from_json(good) == summaries["two"]
    for change in ({"layers": "x"}, {"layers": "9-2"}, {"phase": "all"}, {"level": 1.5}, {"spare_first": 1}):
        with pytest.raises(ValueError, match=next(iter(change))):
            InterventionSummary.from_json(good | change)
    arm = parse_arm("ablate@0-2", axis)
    assert (arm.is_uniform, arm.answer_layers, arm.floor_at(1)) == (True, {0, 1, 2}, None)


def test_the_help_of_arm_is_one_text_with_every_kind(capsys):
    for name in ("generate", "chat", "serve", "drift", "eval", "calibrate", "tools self-test"):
        main([*name.split(), "--help"])
        shown = "".join(capsys.readouterr().out.replace("│", " ").split())
        assert "".join(arm_help().split()) in shown, name
    assert all(kind.example in arm_help() for kind in ARM_KINDS.values())


def test_without_a_saved_cap_the_default_arm_is_the_median_around_the_axis_layer(tmp_path, capsys):
    axis = load_axis(packaged_axis_folder("smollm2-135m") / "axis")
    assert default_arm(axis) == "cap:assistant"
    assert not capsys.readouterr().err
    axis.save(tmp_path / "axis")
    bare = load_axis(tmp_path / "axis")
    assert default_arm(bare) == "cap:p50@18-24"
    assert bare.cap("p50@18-24").level == 0.5
    assert f"personatlas calibrate {tmp_path}" in capsys.readouterr().err
    none = torch.full_like(bare.default_quantiles, torch.nan)
    assert default_arm(replace(bare, default_quantiles=none)) is None
    assert "baseline alone" in capsys.readouterr().err
    (tmp_path / "caps").mkdir()
    axis.cap("p25@20").save(tmp_path / "caps" / "mine")
    assert default_arm(bare) == "cap:mine"
