"""Building a Model: the one check refuses what is not a causal decoder, and layer l means the same everywhere."""

import warnings

import pytest
import torch
from families import FAMILIES, save_tiny, tiny_hf, tiny_model, tokenizer
from torch import nn
from transformers import AutoTokenizer

from personatlas.persona.errors import UserError
from personatlas.persona.models.load import build_model, load_model, model_from_bridge
from personatlas.persona.models.packaged import weight_format
from personatlas.persona.pipeline.record import record
from personatlas.persona.rollout import Rollout


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_are_found_and_met_once_in_order(family):
    model = tiny_model(family)
    assert (model.n_layers, model.d_model) == (3, 32)


def test_a_fingerprint_tells_weights_apart_and_not_dtypes():
    first, same, other = tiny_model(seed=0), tiny_model(seed=0), tiny_model(seed=1)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    half = build_model(tiny_hf("llama").bfloat16(), tokenizer(), id="half")
    assert half.fingerprint == first.fingerprint


def test_a_source_json_of_somebody_else_is_not_read_as_the_caches(tmp_path, monkeypatch):
    for content in ("[]", "{", '{"weights": [1]}', '{"weights": "int4"}'):
        (tmp_path / "source.json").write_text(content)
        assert weight_format(tmp_path) is None
    monkeypatch.setenv("PERSONATLAS_CACHE", str(tmp_path.parent))
    with pytest.raises(UserError, match=r"source\.json is damaged: sha256 is missing; delete it"):
        weight_format(tmp_path)


def test_a_model_that_looks_ahead_is_refused():
    model = tiny_hf("llama")
    attention = model.model.layers[1].self_attn

    def look_ahead(module, args, kwargs, output):
        return (output[0] + kwargs["hidden_states"].flip(1), *output[1:])

    attention.register_forward_hook(look_ahead, with_kwargs=True)
    with pytest.raises(
        UserError, match="a later token changes earlier ones at block 1: not a causal decoder"
    ):
        build_model(model, tokenizer(), id="ahead")


def test_a_block_that_overflows_is_refused():
    model = tiny_hf("llama").half()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(60000)
    with pytest.raises(
        UserError, match=r"block 2 emits NaN or infinity in torch\.float16; try --dtype float32"
    ):
        build_model(model, tokenizer(), id="broken")


def test_a_block_that_is_skipped_is_refused():
    model = tiny_hf("llama")
    model.model.config.num_hidden_layers = 2  # the model's loop now ends early
    model.model.layers.append(nn.Identity())
    model.config.num_hidden_layers = 4
    with pytest.raises(UserError):
        build_model(model, tokenizer(), id="short")


def test_a_local_folder_loads_with_its_own_dtype_format_and_identity(tmp_path):
    folder = save_tiny(tmp_path / "model")
    model = load_model(str(folder), device="cpu", dtype="float32")
    assert model.id == str(folder.resolve())
    assert model.weights == "float32"
    assert model.dtype == torch.float32
    assert model.fingerprint == tiny_model().fingerprint


def test_an_unknown_dtype_names_those_that_exist(tmp_path):
    with pytest.raises(UserError, match="dtype 'int3' is not one of float32, bfloat16, float16, auto"):
        load_model(str(save_tiny(tmp_path / "model")), dtype="int3")


def test_a_transformer_lens_bridge_records_what_its_model_records(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        from transformer_lens.model_bridge import TransformerBridge

        plain = tiny_model("llama")
        named = AutoTokenizer.from_pretrained(save_tiny(tmp_path / "model"))
        bridge = TransformerBridge.boot_transformers(
            "tiny-llama", hf_model=tiny_hf("llama"), tokenizer=named, device="cpu"
        )
        model = model_from_bridge(bridge, id="tiny-llama")
        rollouts = [Rollout("r/0/q/0", (), (5, 6, 7), (8, 9, 10, 11), "", 0, "end")]
        ((_, expected),) = record(plain, rollouts)
        ((_, found),) = record(model, rollouts)
        _, cache = bridge.run_with_cache(torch.tensor([rollouts[0].prompt_ids + rollouts[0].answer_ids]))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)
    for layer in range(3):
        assert torch.allclose(
            found[0, layer], cache[f"blocks.{layer}.hook_resid_post"][0, 3:].mean(0), rtol=1e-4, atol=1e-5
        )
