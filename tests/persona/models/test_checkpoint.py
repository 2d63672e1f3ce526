"""A checkpoint that is not whole is refused with the names of what is wrong; what others store beside it is not in the
way."""

import json
import shutil

import gguf
import pytest
import torch
from exported import exported_in
from families import save_tiny, tiny_hf, tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.models.load import build_model, load_model
from personatlas.training.export.gguf import write_gguf

UP = "model.layers.0.mlp.up_proj.weight"


def changed(folder, change=None, **config):
    """A tiny model whose stored weights and config.json were changed."""
    save_tiny(folder)
    file = folder / "model.safetensors"
    if change is not None:
        save_file(change(load_file(file)), file, metadata={"format": "pt"})
    stored = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(stored | config))
    return folder


def without(text):
    return lambda weights: {key: value for key, value in weights.items() if text not in key}


def beside(key, value=None):
    return lambda weights: weights | {key: torch.ones(4, 32) if value is None else value}


def with_value(key, value):
    def change(weights):
        weights[key].reshape(-1)[5] = value
        return weights

    return change


def one_deeper(weights):
    return weights | {
        key.replace("layers.2", "layers.3"): v.clone() for key, v in weights.items() if "layers.2" in key
    }


def load(folder):
    return load_model(str(folder), device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (without("layers.1."), {}, r"lack model\.layers\.1\.input_layernorm\.weight, .* and 6 more"),
        (without("lm_head"), {}, r"its files lack lm_head\.weight;"),
        (lambda own: {"x." + key: v for key, v in own.items()}, {}, r"lack lm_head.* hold x\.lm_head\.weight"),
        (beside("model.layers.0.self_attn.q_proj.bias"), {}, r"hold .*q_proj\.bias, which LlamaForCausalLM has no"),
        (beside("model.layers.0.self_attn.q_proj.lora_A.weight"), {}, r"lora_A\.weight, which"),
        (one_deeper, {}, r"hold model\.layers\.3\.input_layernorm\.weight"),
        (beside(UP, torch.ones(40, 32)), {}, r"up_proj\.weight \(40, 32\) for \(48, 32\) in another shape"),
        (None, {"vocab_size": 400}, r"embed_tokens\.weight \(320, 32\) for \(400, 32\)"),
        (beside(UP, torch.ones(48, 32).to(torch.int8)), {}, r"stores .*up_proj\.weight as I8"),
        (with_value("lm_head.weight", torch.nan), {}, r"1 of 10240 values of lm_head\.weight are NaN"),
        (with_value("lm_head.weight", -torch.inf), {}, r"values of lm_head\.weight are NaN or infinite"),
        (with_value("model.embed_tokens.weight", torch.nan), {}, r"values of model\.embed_tokens\.weight are NaN"),
        (with_value("model.norm.weight", torch.inf), {}, r"1 of 32 values of model\.norm\.weight"),
        (None, {"num_hidden_layers": "3"}, r"cannot load .*num_hidden_layers"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_is_not_whole_is_refused_by_the_names_of_its_weights(
    tmp_path, change, config, message
):
    with pytest.raises(UserError, match=message) as error:
        load(changed(tmp_path / "model", change, **config))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (without("lm_head"), {"tie_word_embeddings": True}),
        (beside("model.layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)), {}),
        (beside("model.layers.0.self_attn.k_scale", torch.ones(1)), {}),
        (beside("mtp.layers.0.fc.weight"), {}),
        (beside("model.vision_tower.patch.weight"), {}),
        (beside("v_head.summary.weight"), {}),
        (one_deeper, {"num_nextn_predict_layers": 1}),
        (beside(UP, torch.ones(48, 32, dtype=torch.float64)), {}),
    ],
)
def test_what_others_store_beside_a_decoder_is_not_in_the_way(tmp_path, change, config):
    assert load(changed(tmp_path / "model", change, **config)).n_layers == 3


def test_a_part_that_no_decoder_has_is_left_out_and_named(tmp_path, capsys):
    load(changed(tmp_path / "model", beside("score.weight")))
    assert "weights that are no part of its decoder are left out (score.weight)" in capsys.readouterr().err


def test_shards_that_are_lost_swapped_or_not_in_the_index_are_refused(tmp_path):
    whole = save_tiny(tmp_path / "whole")
    (whole / "model.safetensors").unlink()
    tiny_hf("llama").save_pretrained(whole, max_shard_size="20KB")
    assert load(whole).n_layers == 3
    lost, swapped, unlisted = (
        shutil.copytree(whole, tmp_path / name) for name in ("lost", "swapped", "unlisted")
    )
    first, second, *_ = sorted(path.name for path in whole.glob("model-0*"))
    (lost / second).unlink()
    with pytest.raises(UserError, match=f"{second}; fetch or export the model again"):
        load(lost)
    shutil.copy(swapped / first, swapped / second)
    with pytest.raises(UserError, match="its files lack"):
        load(swapped)
    index = unlisted / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"] = without("layers.1.")(content["weight_map"])
    index.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"its files lack model\.layers\.1\."):
        load(unlisted)


@pytest.mark.parametrize("gone", [["config.json", "model.safetensors"], ["model.safetensors"], []])
def test_an_adapter_is_refused_without_and_beside_its_base(tmp_path, gone):
    folder = save_tiny(tmp_path / "adapter")
    settings = {"peft_type": "LORA", "base_model_name_or_path": "/moved/base"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(4, 32)}, folder / "adapter_model.safetensors")  # fmt: skip
    for name in gone:
        (folder / name).unlink()
    with pytest.raises(UserError, match="holds an adapter of /moved/base, not a whole model: merge it"):
        load(folder)


def test_the_settings_of_an_adapter_that_was_merged_are_not_in_the_way(tmp_path):
    folder = save_tiny(tmp_path / "merged")
    (folder / "adapter_config.json").write_text("{}")
    assert load(folder).n_layers == 3


def test_a_token_without_a_row_is_refused_and_rows_without_a_token_are_not(tmp_path):
    folder = save_tiny(tmp_path / "model")  # 320 rows, 263 tokens
    own = AutoTokenizer.from_pretrained(folder)
    own.add_tokens([f"<extra{number}>" for number in range(60)])
    own.save_pretrained(folder)
    with pytest.raises(UserError, match=r"'<extra57>' has the id 320, and so do 2 more, but .* 320 rows"):
        load(folder)
    with pytest.raises(UserError, match="'<extra57>' has the id 320"):
        build_model(tiny_hf("llama"), own, id="tiny")


def test_minus_infinity_in_the_heads_bias_masks_a_token_and_other_infinities_are_refused():
    def phi(value):
        model = tiny_hf("phi")
        with torch.no_grad():
            model.lm_head.bias[300:] = value
        return model

    assert build_model(phi(-torch.inf), tokenizer(), id="phi").n_layers == 3
    for value in (torch.inf, torch.nan):
        with pytest.raises(UserError, match=r"20 of 320 values of lm_head\.bias are NaN or infinite"):
            build_model(phi(value), tokenizer(), id="phi")


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("nonesuch", {}, r"is of the type 'nonesuch', which is unknown"),
        ("nonesuch", {"auto_map": {"AutoConfig": "configuration_x.X"}}, "needs code of its own, which is never run"),
        ("t5", {}, r"is an encoder-decoder \(t5\); give a decoder"),
        ("vit", {}, r"is of the type 'vit', which is no decoder of text; give a decoder"),
    ],
)  # fmt: skip
def test_what_is_no_decoder_or_needs_code_of_its_own_is_one_short_line(tmp_path, kind, extra, message):
    folder = changed(tmp_path / "model", None, model_type=kind, **extra)
    (folder / "configuration_x.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(UserError, match=message) as error:
        load(folder)
    assert len(str(error.value).replace(str(folder), "")) < 150


@pytest.fixture(scope="module")
def whole_gguf(tmp_path_factory):
    folder = exported_in(tmp_path_factory.mktemp("gguf"))
    return write_gguf(folder, folder / "whole.gguf", "f32")


def rewritten(source, target, keep, **fields):
    """The same GGUF file with some of its tensors and further numbers."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "qwen3")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, value in fields.items():
        writer.add_uint16(name.replace("_", "."), value)
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_gguf_without_some_of_its_weights_is_refused(whole_gguf, tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path / "cache"))
    same = rewritten(whole_gguf, tmp_path / "same.gguf", lambda name: True)
    assert load(same).fingerprint == load(whole_gguf).fingerprint
    cut = rewritten(whole_gguf, tmp_path / "cut.gguf", lambda name: not name.startswith("blk.1.ffn"))
    with pytest.raises(UserError, match=r"cut\.gguf .*lack model\.layers\.1\.mlp\.down_proj\.weight"):
        load(cut)


def test_one_part_of_a_gguf_is_refused_with_the_names_of_the_others(whole_gguf, tmp_path):
    part = rewritten(whole_gguf, tmp_path / "m-00002-of-00003.gguf", lambda name: True, split_count=3)
    names = r"m-00001-of-00003\.gguf, m-00002-of-00003\.gguf, m-00003-of-00003\.gguf"
    with pytest.raises(UserError, match=rf"one of 3 parts \({names}\): join them"):
        load(part)
