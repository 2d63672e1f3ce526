"""Sentence embeddings: the mean over a text's tokens, of length 1, whatever else is in the batch."""

import numpy as np
import pytest
import torch
from families import save_tiny
from safetensors.torch import load_file, save_file

from personatlas.persona.errors import UserError
from personatlas.steering.drift.embedding import load_embedding


def test_an_embedding_is_the_mean_over_the_texts_own_tokens_and_of_length_one(tmp_path):
    from transformers import AutoModel, AutoTokenizer

    folder = save_tiny(tmp_path / "tiny")
    embed = load_embedding(str(folder), "cpu")
    texts = ["Hello.", "A much longer text than that."]
    found = embed(texts)
    assert np.linalg.norm(found, axis=1) == pytest.approx([1, 1])
    assert embed(texts[:1]) == pytest.approx(found[:1], abs=1e-5)
    ids = AutoTokenizer.from_pretrained(folder)(texts[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        mean = AutoModel.from_pretrained(folder)(input_ids=ids).last_hidden_state[0].mean(0)
    assert found[0] == pytest.approx((mean / mean.norm()).numpy(), abs=1e-5)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match="none does not exist"):
        load_embedding(str(tmp_path / "none"), "cpu")


def test_an_embedding_model_that_is_not_whole_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    file = folder / "model.safetensors"
    weights = load_file(file)
    kept = {key: value for key, value in weights.items() if "layers.1.mlp" not in key}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"its files lack layers\.1\.mlp\.down_proj\.weight"):
        load_embedding(str(folder), "cpu")
    file.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"cannot load --embedding .*damaged or cut short"):
        load_embedding(str(folder), "cpu")
