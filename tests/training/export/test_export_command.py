"""`personatlas train export`: what comes out is the model of the run."""

import json
import shutil

import gguf
import pytest
import torch
from corpora import write_corpus
from tiny_gpt import lively
from transformers import AutoModelForCausalLM

from personatlas.cli.app import main
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.tokenizer import make_tokenizer
from personatlas.training.export.huggingface import export_model, load_exported
from personatlas.training.model.config import Shape

SHAPE = Shape(vocabulary=310, depth=2, width=32, heads=4, kv_heads=2, head_width=8, inner=48, context=32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A training run with one checkpoint."""
    folder = tmp_path_factory.mktemp("mine")
    corpus = Corpus.open(write_corpus(folder / "texts"), held_share=0.2)
    make_tokenizer(corpus, folder / "tokenizer", vocabulary=310, quiet=True)
    (folder / "run.json").write_text(json.dumps({"kind": "training"}))
    export_model(lively(SHAPE), folder / "tokenizer", folder / "checkpoints" / "step-000008")
    return folder


def test_a_run_becomes_a_folder_and_a_file_of_its_newest_checkpoint(run, tmp_path, capsys):
    main(
        [
            "train",
            "export",
            str(run),
            "--out",
            str(tmp_path / "folder"),
            "--gguf",
            str(tmp_path / "a.gguf"),
            "--dtype",
            "fp32",
        ]
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "step-000008, 0.0 M parameters in fp32" in told
    first, again = load_exported(run / "checkpoints" / "step-000008"), load_exported(tmp_path / "folder")
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert (tmp_path / "folder" / "chat_template.jinja").is_file()
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    assert torch.equal(torch.tensor(tensors["token_embd.weight"].data), first.embed_tokens.weight.data)


def test_a_command_that_was_killed_behind_the_folder_goes_on_with_the_file(run, tmp_path, capsys):
    folder, file = tmp_path / "folder", tmp_path / "a.gguf"
    main(["train", "export", str(run), "--out", str(folder)])
    before = (folder / "model.safetensors").stat().st_mtime_ns
    main(["train", "export", str(run), "--out", str(folder), "--gguf", str(file)])
    assert file.is_file()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    file.unlink()
    with pytest.raises(SystemExit):  # another model than the one that is there
        main(["train", "export", str(run), "--out", str(folder), "--gguf", str(file), "--dtype", "fp32"])
    assert "is already there" in capsys.readouterr().err
    assert not file.exists()


def test_bf16_unless_asked_otherwise_and_it_is_the_rounded_model(run, tmp_path):
    main(["train", "export", str(run / "checkpoints" / "step-000008"), "--out", str(tmp_path / "half")])
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    first = load_exported(run / "checkpoints" / "step-000008")
    assert torch.equal(theirs.lm_head.weight, first.lm_head.weight.bfloat16())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["RUN"], "give --out FOLDER, --gguf FILE or both"),
        (["RUN", "--out", "full"], "is already there"),
        (["RUN", "--gguf", "full/a.txt"], "is already there"),
        (["RUN", "--gguf", "nowhere/a.gguf"], "the folder nowhere does not exist"),
        (["RUN", "--out", "new", "--dtype", "int4"], "int4"),
        (["RUN", "--out", "full/x/../../full"], "is already there"),
        (["RUN", "--out", "full/a.txt/new"], "cannot be made"),
        (["nowhere", "--out", "new"], "is no folder; give a training run"),
        (["full/a.txt", "--out", "new"], "is no folder; give a training run"),
        (["other", "--out", "new"], "a GPT of this kind has"),
        (["empty", "--out", "new"], "a training run without a checkpoint yet"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_exported_is_one_line_and_nothing_is_made(
    run, tmp_path, monkeypatch, capsys, arguments, words
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run / "tokenizer", "other")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    for name, files in (("full", {"a.txt": ""}), ("empty", {"run.json": '{"kind": "training"}'})):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "export", *(str(run) if part == "RUN" else part for part in arguments)])
    assert stopped.value.code == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert not (tmp_path / "new").exists()
