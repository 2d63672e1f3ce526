"""A GGUF file written here says what the folder says."""

import shutil

import gguf
import pytest
import torch
from corpora import CHAT
from exported import SHAPE, exported_in
from families import tokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.models.load import load_model
from personatlas.training.data.tokenizer import TEMPLATE
from personatlas.training.export.gguf import plain_template, write_gguf
from personatlas.training.export.huggingface import load_exported


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return exported_in(tmp_path_factory.mktemp("gguf"))


@pytest.mark.parametrize(("format", "close"), [("f32", 1e-4), ("bf16", 0.3), ("f16", 0.05)])
def test_transformers_reads_the_same_model_from_it(exported, tmp_path, monkeypatch, format, close):
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    path = write_gguf(exported, tmp_path / "model.gguf", format)
    model = load_model(str(path), device="cpu", dtype="float32")
    ids = torch.randint(310, (2, 20), generator=torch.Generator().manual_seed(0))
    wanted = load_exported(exported)(ids)
    assert wanted.std() > 0.5
    assert (model.hf(ids).logits - wanted).abs().max() < close
    assert model.weights.lower().endswith(format)


def test_its_tokenizer_and_fields_are_those_of_the_folder(exported, tmp_path):
    reader = gguf.GGUFReader(write_gguf(exported, tmp_path / "model.gguf"))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == "qwen3"
    assert fields["qwen3.attention.head_count_kv"] == 1
    assert fields["qwen3.attention.key_length"] == 32
    assert fields["tokenizer.ggml.pre"] == "llama-bpe"
    tokens = fields["tokenizer.ggml.tokens"]
    assert len(tokens) == SHAPE.vocabulary
    assert tokens[:4] == ["<|bos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    assert tokens[319] == "[PAD319]"
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert len(reader.tensors) == 3 + 11 * SHAPE.depth


def test_its_template_renders_the_same_conversation(exported):
    auto = load_model(str(exported), device="cpu", dtype="float32").tokenizer
    whole = auto.apply_chat_template(CHAT, tokenize=False)
    assert "generation" not in plain_template(TEMPLATE).replace("add_generation_prompt", "")
    assert auto.apply_chat_template(CHAT, tokenize=False, chat_template=plain_template(TEMPLATE)) == whole


def test_other_tokenizers_formats_and_files_that_are_there_are_refused(exported, tmp_path):
    with pytest.raises(UserError, match="'q4' is not one of f32, bf16, f16"):
        write_gguf(exported, tmp_path / "model.gguf", "q4")
    (tmp_path / "there.gguf").touch()
    with pytest.raises(UserError, match="already there"):
        write_gguf(exported, tmp_path / "there.gguf")
    tokenizer().save_pretrained(tmp_path / "bytes")
    shutil.copytree(exported, tmp_path / "other")
    shutil.copyfile(tmp_path / "bytes" / "tokenizer.json", tmp_path / "other" / "tokenizer.json")
    with pytest.raises(UserError, match="was not trained here"):
        write_gguf(tmp_path / "other", tmp_path / "model.gguf")
    assert not (tmp_path / "model.gguf").exists()
