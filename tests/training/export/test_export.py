"""What is exported is the model: the same logits and tokens in transformers, and a model of everything else here."""

import json
import shutil

import gguf
import pytest
import torch
from corpora import write_corpus
from families import tokenizer
from safetensors.torch import load_file, save_file
from tiny_gpt import lively
from transformers import AutoModelForCausalLM

from personatlas.cli.app import main
from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import load_model, model_from_bridge
from personatlas.training.data.corpus import Corpus
from personatlas.training.data.tokenizer import BOS, END, make_tokenizer
from personatlas.training.export.huggingface import (
    end_token_ids,
    export_model,
    load_exported,
    load_hf_tokenizer,
)
from personatlas.training.model.config import Shape

SHAPE = Shape(vocabulary=320, depth=3, width=32, heads=4, kv_heads=2, head_width=8, inner=48, context=64)


def ids_of(rows, length):
    return torch.randint(320, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    tokenizer().save_pretrained(folder / "tokenizer")
    model = lively(SHAPE)
    export_model(model, folder / "tokenizer", folder / "model")
    return model, folder


def test_transformers_gives_the_same_logits(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    ids = ids_of(3, 64)
    with torch.no_grad():
        found, wanted = theirs(ids).logits, model(ids)
    assert wanted.std() > 0.5
    assert (found - wanted).abs().max() < 1e-5


def test_transformers_continues_with_the_same_tokens(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    ids = ids_of(3, 12)
    found = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=40,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(found, model.generate(ids, 40))


def test_it_comes_back_bit_for_bit_and_can_be_trained_on(exported):
    model, folder = exported
    again = load_exported(folder / "model")
    assert again.shape == model.shape
    for one, two in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.requires_grad
    ids = ids_of(1, 9)
    assert torch.equal(again(ids), model(ids))


def test_a_tokenizer_trained_here_goes_along_with_its_template_and_ends(tmp_path, capsys):
    corpus = Corpus.open(write_corpus(tmp_path / "texts"), held_share=0.2)
    make_tokenizer(corpus, tmp_path / "tokenizer", vocabulary=310, quiet=True)
    export_model(lively(SHAPE), tmp_path / "tokenizer", tmp_path / "model")
    model = load_model(str(tmp_path / "model"), device="cpu", dtype="float32")
    end = model.tokenizer.convert_tokens_to_ids(END)
    assert model.hf.generation_config.eos_token_id == [end]
    format = chat_format(model.tokenizer, model.hf.generation_config.eos_token_id)
    assert format.end_ids == {end}
    assert format.prompt_ids([{"role": "user", "content": "Who?"}])[
        0
    ] == model.tokenizer.convert_tokens_to_ids(BOS)
    main(["tools", "self-test", str(tmp_path / "model"), "--device", "cpu", "--dtype", "float32", "--json"])
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))


def test_a_bf16_export_rounds_once(exported, tmp_path):
    model, folder = exported
    again = load_exported(export_model(model, folder / "tokenizer", tmp_path / "half", torch.bfloat16))
    for one, two in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, two.bfloat16())
    assert load_model(str(tmp_path / "half"), device="cpu", dtype="auto").dtype == torch.bfloat16


def test_it_is_a_subject_whose_blocks_are_ours(exported):
    model, folder = exported
    decoder = load_model(str(folder / "model"), device="cpu", dtype="float32")
    ids, ours, theirs = ids_of(2, 10), [], []
    for layer, block in zip(model.layers, decoder.blocks, strict=True):
        layer.register_forward_hook(lambda _m, _i, output: ours.append(output.detach()))
        block.register_forward_hook(lambda _m, _i, output: theirs.append(output))
    model(ids)
    decoder.hf(ids)
    for one, two in zip(ours, theirs, strict=True):
        assert (one - two).abs().max() < 1e-6 * max(
            10, one.abs().max()
        )  # fp32's rounding: residuals here reach 20


def test_the_self_test_passes_on_it(exported, capsys):
    main(
        ["tools", "self-test", str(exported[1] / "model"), "--device", "cpu", "--dtype", "float32", "--json"]
    )
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))


def test_it_loads_in_a_transformer_bridge(exported):
    from transformer_lens.model_bridge import TransformerBridge

    model, folder = exported
    bridge = TransformerBridge.boot_transformers(str(folder / "model"), device="cpu", dtype=torch.float32)
    assert model_from_bridge(bridge).n_layers == 3
    ids = ids_of(1, 10)
    with torch.no_grad():
        assert (bridge(ids) - model(ids)).abs().max() < 1e-4


def test_every_tensor_has_a_name_in_llama_cpp_and_none_is_missing_there(exported):
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, SHAPE.depth)
    stored = load_exported(exported[1] / "model").state_dict()
    full = [name if name.startswith("lm_head") else f"model.{name}" for name in stored]
    theirs = [names.get_name(name, try_suffixes=(".weight",)) for name in full]
    assert None not in theirs
    assert len(set(theirs)) == len(theirs) == 3 + 11 * SHAPE.depth


def test_every_end_of_an_answer_stands_in_the_generation_config(exported):
    _, folder = exported
    config = json.loads((folder / "model" / "generation_config.json").read_text())
    marker = tokenizer().convert_tokens_to_ids("<|end|>")
    assert config["eos_token_id"] == end_token_ids(tokenizer()) == sorted({2, marker})


def test_nothing_is_overwritten_and_nothing_half_written_is_left(exported, tmp_path):
    model, folder = exported
    with pytest.raises(UserError, match="already there"):
        export_model(model, folder / "tokenizer", folder / "model")
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        export_model(model, tmp_path, tmp_path / "out")
    small = lively(Shape(100, 1, 32, 4, 2, 8, 48, 64))
    with pytest.raises(UserError, match=r"has 263 tokens and the model embeds 100"):
        export_model(small, folder / "tokenizer", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"num_hidden_layers": 4}, "does not hold the weights of its config"),
        ({"num_hidden_layers": 10**9}, "does not hold the weights of its config"),
        ({"intermediate_size": 40}, "which its config does not say"),
        ({"rope_parameters": [1]}, "rope_parameters is a list of 1, not an object"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta is null"),
        ({"num_attention_heads": [[]]}, "num_attention_heads is a list of 1, not a number"),
        ({"num_attention_heads": 3}, "cannot share"),
        ({"hidden_size": -8}, "width is -8"),
        ({"rms_norm_eps": None}, "rms_norm_eps is null"),
    ],
)
def test_checkpoints_of_another_kind_are_refused_by_name(exported, tmp_path, change, message):
    source = exported[1] / "model"
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=message):
        load_exported(tmp_path)


def test_a_checkpoint_cut_short_is_one_line(exported, tmp_path):
    source = exported[1] / "model"
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match="damaged or cut short"):
        load_exported(tmp_path)


def test_weights_that_are_no_numbers_and_a_damaged_tokenizer_are_refused(exported, tmp_path):
    folder = shutil.copytree(exported[1] / "model", tmp_path / "model")
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity; take an earlier"):
        load_exported(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="does not hold a tokenizer that can be read"):
        load_hf_tokenizer(folder, SHAPE)
