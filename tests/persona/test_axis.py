"""The nouns of persona space keep what they were given, refuse what does not fit, and the kernel is a
floor.
"""

from dataclasses import replace
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from reference import apply_cap
from torch import Tensor

from personatlas.persona.axis import POLES, Axis, PersonaSpace, load_axis, load_space
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Cap, load_cap

D = 48
MODEL = {
    "id": "m",
    "revision": None,
    "weights": "bfloat16",
    "fingerprint": "abc",
    "n_layers": 4,
    "d_model": D,
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unit(*shape: int, seed: int = 0) -> Tensor:
    return torch.nn.functional.normalize(random(*shape, seed=seed).double(), dim=-1).float()


def an_axis(**changes: Any) -> Axis:
    fields: dict[str, Any] = {
        "vectors": unit(4, D),
        "norms": random(4).abs(),
        "layers": (0, 1, 2, 3),
        "layer": 2,
    }
    return Axis(**{**fields, "model": MODEL, "fit": {"seed": 0, "roles": ["bard"]}, **changes})


def a_cap(**changes: Any) -> Cap:
    fields: dict[str, Any] = {"layers": (1, 3), "vectors": unit(2, D), "floor": torch.tensor([0.3, -1.5])}
    return Cap(**{**fields, "level": 0.25, "population": "default", **changes})


def a_space(**changes: Any) -> PersonaSpace:
    names = ("mean", "components", "variance_ratio", "coordinates")
    shapes = ((D,), (3, D), (3,), (2, 3))
    tensors = {name: random(*shape) for name, shape in zip(names, shapes, strict=True)}
    tensors |= {"components": unit(3, D), "variance_ratio": torch.tensor([0.5, 0.3, 0.1])}
    return PersonaSpace(**{"layer": 2, "roles": ("default", "bard"), "model": MODEL, **tensors, **changes})


def same(one: Any, other: Any) -> bool:
    """Every field equal, tensors bit by bit."""
    assert type(one) is type(other)
    for name, value in vars(one).items():
        if name == "stem":  # where it was loaded from
            continue
        found = getattr(other, name)
        if isinstance(value, Tensor):
            torch.testing.assert_close(found, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert found == value, name
    return True


def bits(h: Tensor) -> Tensor:
    return h.view(torch.int32 if h.dtype == torch.float32 else torch.int16)


@pytest.fixture
def unhooked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape checking is off, as it is for a user: what is refused is refused by the nouns
    themselves.
    """
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def test_an_axis_comes_back_as_it_was_saved(tmp_path):
    quantiles = random(4, 3).sort().values
    quantiles[1] = float("nan")  # a layer that kept no rollout means
    levels = {"levels": (0.05, 0.25, 0.5), "default_quantiles": quantiles, "role_quantiles": quantiles - 1}
    for axis in (
        an_axis(),
        an_axis(**levels),
        an_axis(poles=("villain", "others"), layers=(0, 1, 2, 3), layer=3),
    ):
        axis.save(tmp_path / "axis")
        assert same(load_axis(tmp_path / "axis"), axis)


def test_a_space_comes_back_as_it_was_saved(tmp_path):
    a_space().save(tmp_path / "space")
    assert same(load_space(tmp_path / "space"), a_space())


def test_a_cap_comes_back_as_it_was_saved(tmp_path):
    infinite = torch.tensor([float("-inf"), 1.0])
    for cap in (
        a_cap(),
        a_cap(floor=infinite, ceiling=torch.tensor([2.0, float("inf")]), level=None, model=MODEL),
    ):
        cap.save(tmp_path / "cap")
        assert same(load_cap(tmp_path / "cap"), cap)


def test_saving_what_was_loaded_gives_the_same_bytes(tmp_path):
    an_axis().save(tmp_path / "one")
    load_axis(tmp_path / "one").save(tmp_path / "two")
    for suffix in (".safetensors", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()


def test_an_axis_is_not_read_as_a_cap(tmp_path):
    an_axis().save(tmp_path / "axis")
    with pytest.raises(UserError, match="is of kind 'axis', not 'cap'"):
        load_cap(tmp_path / "axis")
    with pytest.raises(UserError, match="does not exist"):
        load_axis(tmp_path / "nothing")


@pytest.mark.parametrize("change", [{"fingerprint": "def"}, {"d_model": 64}, {"n_layers": 5}])
def test_an_axis_of_another_model_is_refused_in_one_line(change):
    an_axis().require_model(MODEL)
    with pytest.raises(UserError, match="fit an axis on this model") as refusal:
        an_axis().require_model({**MODEL, "id": "other", **change})
    name = next(iter(change))
    assert f"{name} {MODEL[name]} against {change[name]}" in str(refusal.value)
    assert "came from m (bfloat16), not from other" in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_axis_that_knows_only_its_shape_is_checked_by_its_shape():
    axis = an_axis(model={"n_layers": 4, "d_model": D})
    axis.require_model({**MODEL, "fingerprint": "anything"})
    with pytest.raises(UserError, match="n_layers 4 against 6"):
        axis.require_model({**MODEL, "n_layers": 6})


def test_an_axis_gives_the_vector_of_a_layer_by_its_number_not_its_place():
    axis = an_axis(layers=(7, 8, 9, 11), layer=9, model={**MODEL, "n_layers": 12})
    assert torch.equal(axis.at(11), axis.vectors[3])
    for layer in (10, 0, 3, -1):
        with pytest.raises(UserError, match=rf"layer {layer} is not in this axis \(7\.\.11\)"):
            axis.at(layer)
    assert axis.poles == POLES == ("assistant", "role-play")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": 2 * unit(4, D)}, "length 1"),
        ({"vectors": torch.zeros(4, D)}, "length 1"),
        ({"vectors": unit(4, D).where(torch.arange(D) > 0, torch.nan)}, "finite"),
        ({"vectors": unit(4, D).where(torch.arange(D) > 0, torch.inf)}, "finite"),
        ({"vectors": unit(3, D)}, "do not match"),
        ({"vectors": unit(D)}, "unpack"),
        ({"norms": torch.ones(3)}, "do not match"),
        ({"layers": (0, 1, 2)}, "do not match"),
        ({"layer": 4}, "not one of the axis"),
    ],
)
def test_an_axis_that_contradicts_itself_cannot_be_made(unhooked, change, message):
    with pytest.raises(ValueError, match=message):
        an_axis(**change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": 2 * unit(2, D)}, "length 1"),
        ({"vectors": unit(3, D)}, "differ"),
        ({"floor": torch.zeros(3)}, "differ"),
        ({"floor": torch.tensor([0.0, torch.nan])}, "NaN"),
        ({"floor": torch.tensor([0.0, torch.inf])}, "infinity"),
        ({"ceiling": torch.zeros(3)}, "ceiling"),
        ({"ceiling": torch.tensor([1.0, torch.nan])}, "ceiling"),
        ({"ceiling": torch.tensor([0.2, 1.0])}, "ceiling"),
        ({"phase": "always"}, "phase 'always' is not one of prompt, answer, both"),
    ],
)
def test_a_cap_that_contradicts_itself_cannot_be_made(unhooked, change, message):
    with pytest.raises(ValueError, match=message):
        a_cap(**change)


def test_a_space_needs_a_coordinate_for_every_role(unhooked):
    with pytest.raises(ValueError, match="do not match 1 roles"):
        a_space(roles=("default",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_floor_of_minus_infinity_changes_no_bit(dtype):
    h = (random(5, 7, D, seed=1) * 100).to(dtype)
    h[0, 0] = 0.0
    h[0, 1] = -0.0
    cap = a_cap(floor=torch.full((2,), float("-inf")), ceiling=torch.full((2,), float("inf")))
    for capless in (replace(cap, ceiling=None), cap):
        assert torch.equal(bits(apply_cap(h, capless, 0)), bits(h))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_above_the_floor_is_bitwise_untouched_and_one_below_is_lifted(dtype):
    h, cap = random(400, D, seed=1).to(dtype), a_cap()
    before = h.clone()
    capped = apply_cap(h, cap, 0)
    below = h.float() @ cap.vectors[0] < cap.floor[0]
    assert 50 < below.sum() < 350
    assert torch.equal(bits(capped[~below]), bits(h[~below]))
    assert (capped[below] != h[below]).any(dim=1).all()
    lifted = capped[below].float() @ cap.vectors[0]
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(lifted, cap.floor[0].expand_as(lifted), rtol=0, atol=rounding)
    assert capped.dtype == dtype
    assert torch.equal(bits(h), bits(before)), "the kernel must not write into its input"


@pytest.mark.parametrize("dtype", DTYPES)
def test_capping_twice_is_capping_once(dtype):
    cap = a_cap(ceiling=torch.tensor([0.6, 0.0]))
    for row in (0, 1):
        once = apply_cap(random(400, D, seed=1).to(dtype), cap, row)
        # what the first pass left a rounding error outside, the second moves by no more than that error
        step = torch.finfo(dtype).eps * once.float().abs().max()
        torch.testing.assert_close(apply_cap(once, cap, row).float(), once.float(), rtol=0, atol=float(step))


def test_the_kernel_agrees_with_float64():
    h, cap = random(200, D, seed=1) * 3, a_cap(ceiling=torch.tensor([1.0, 2.0]))
    for row in (0, 1):
        v, x = cap.vectors[row].double().numpy(), h.double().numpy()
        assert cap.ceiling is not None
        clipped = np.clip(x @ v, float(cap.floor[row]), float(cap.ceiling[row]))
        expected = x + np.outer(clipped - x @ v, v)
        np.testing.assert_allclose(apply_cap(h, cap, row).numpy(), expected, atol=2e-6)


def test_a_ceiling_alone_holds_the_other_side():
    cap = a_cap(floor=torch.full((2,), float("-inf")), ceiling=torch.tensor([0.3, 0.0]))
    mirrored = a_cap(vectors=-cap.vectors, floor=torch.tensor([-0.3, 0.0]))
    h = random(300, D, seed=1)
    projection = apply_cap(h, cap, 0) @ cap.vectors[0]
    assert projection.max() <= 0.3 + 1e-5
    assert torch.equal(bits(apply_cap(h, cap, 0)), bits(apply_cap(h, mirrored, 0)))


def test_the_cap_moves_a_token_along_the_vector_only():
    h, cap = random(300, D, seed=1), a_cap()
    moved = (apply_cap(h, cap, 1) - h).double()
    along = moved @ cap.vectors[1].double()
    torch.testing.assert_close(moved, along[:, None] * cap.vectors[1].double(), rtol=0, atol=1e-6)
    assert (along >= 0).all()


def test_a_token_is_capped_alike_alone_in_a_sequence_and_in_a_batch():
    h, cap = random(2, 3, D, seed=1), a_cap()
    whole = apply_cap(h, cap, 0)
    assert whole.shape == h.shape
    for b in range(2):
        torch.testing.assert_close(apply_cap(h[b], cap, 0), whole[b], rtol=0, atol=1e-6)
        for t in range(3):
            torch.testing.assert_close(apply_cap(h[b, t], cap, 0), whole[b, t], rtol=0, atol=1e-6)


def test_the_projection_is_fp32_whatever_the_dtype_of_the_model():
    # a dot in bf16 is off by 0.01 at a spread of 0.9: it would cap tokens that are above the floor
    h, cap = random(4000, D, seed=1).bfloat16(), a_cap(floor=torch.tensor([0.0, 0.0]))
    above = h.double() @ cap.vectors[0].double() > 1e-5
    assert torch.equal(bits(apply_cap(h, cap, 0)[above]), bits(h[above]))
    assert ((h @ cap.vectors[0].bfloat16())[above] < 0).any()
