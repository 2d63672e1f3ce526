"""The residual stream as hooks capture it, and a model that is left as it was found."""

import pytest
import torch
from families import FAMILIES, tiny_model

from personatlas.persona.models.hooks import capture

IDS = torch.arange(1, 9)[None]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_captured_at_a_layer_is_the_input_of_the_next_block(family):
    model = tiny_model(family)
    with torch.no_grad(), capture(model, range(model.n_layers)) as residuals:
        states = model.base(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert residuals.order == list(range(model.n_layers))
    for layer in range(model.n_layers - 1):
        assert torch.equal(residuals[layer], states[layer + 1])


def test_only_what_the_transform_returns_is_kept():
    model = tiny_model("llama")
    with torch.no_grad(), capture(model, [1], lambda layer, h: h[:, :, 0] * layer) as kept:
        model.base(input_ids=IDS, use_cache=False)
    assert list(kept) == [1]
    assert kept[1].shape == (1, 8)


def test_capturing_before_others_sees_the_stream_before_their_step():
    model = tiny_model("llama")
    handle = model.blocks[0].register_forward_hook(lambda m, a, out: out + 1)
    with torch.no_grad(), capture(model, [0], before_others=True) as before, capture(model, [0]) as after:
        model.base(input_ids=IDS, use_cache=False)
    handle.remove()
    assert torch.equal(before[0] + 1, after[0])


def test_no_hook_is_left_behind_by_an_exception():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), capture(model, [0, 1]):
        1 / 0  # noqa: B018
    assert not any(block._forward_hooks for block in model.blocks)
