"""Other people's files become our nouns, with the right sign, or are refused in one line. None of them is ever run."""

import json
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import apply_cap
from torch import Tensor
from torch.nn.functional import normalize

from personatlas.persona.errors import UserError
from personatlas.persona.paper_files import import_axis, import_caps, import_role_vectors

L, D = 6, 24
MODEL = {"id": "m", "weights": "bfloat16", "fingerprint": "abc", "n_layers": L, "d_model": D}
NAN = float("nan")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def put(path: Path, content: Any) -> Path:
    """Write a `.pt`, or text that is JSON unless it is given as it should stand."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def refused(part: str) -> Any:
    """Expect a UserError of one line that holds the part."""
    return pytest.raises(UserError, match=rf"\A.*{re.escape(part)}.*\Z")


def rejects(*rows: tuple[Any, str]) -> Any:
    return pytest.mark.parametrize(("content", "reason"), rows)


@dataclass
class Shell:
    """Unpickling one of these makes the file."""

    file: Path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.file}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("forced", ["0", "1"])
def test_a_pickle_that_runs_a_command_is_refused_and_does_not_run(tmp_path, monkeypatch, forced):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", forced)
    path, trap = tmp_path / "axis.pt", Shell(tmp_path / "ran")
    hidden = {"axis": random(L, D), "vector": random(L, D), "note": trap}
    forms: list[tuple[Any, dict[str, Any], str]] = [
        (trap, {}, "holds posix.system: more than tensors and plain values. It was not loaded"),
        (hidden, {}, "posix.system"),
        (hidden, {"pickle_protocol": 4}, "not loaded"),
        (hidden, {"_use_new_zipfile_serialization": False}, "not a file of `torch.save`"),
    ]
    for content, form, reason in forms:
        torch.save(content, path, **form)
        for read in (lambda p: import_axis(p, MODEL), import_role_vectors, lambda p: import_caps(p, MODEL)):
            with refused(reason):
                read(path)
    path.write_bytes(pickle.dumps(trap))
    with refused("not a file of `torch.save`"):
        import_axis(path, MODEL)
    assert not trap.file.exists()
    pickle.loads(path.read_bytes())
    assert trap.file.exists(), "the trap itself must work, or this test shows nothing"


def test_a_file_that_is_no_whole_pt_is_refused_with_its_reason(tmp_path):
    path = put(tmp_path / "axis.pt", random(L, D))
    import_axis(path, MODEL)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(random(L, D).numpy().tobytes()) + 9] ^= 16  # torch.load itself would not notice
    for content, reason in [
        (b"", "is empty"),
        (b"just some text\n", "not a file of `torch.save`"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS pointer"),
        (whole[: len(whole) // 2], "cut short or damaged"),
        (bytes(flipped), "is damaged (checksum of"),
    ]:
        path.write_bytes(content)
        with refused(reason):
            import_axis(path, MODEL)
    for member in ("a.txt", "a/data.pkl", "a/constants.pkl"):  # the last is TorchScript's
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(member, b"not a pickle")
        with refused("is not a file of tensors and plain values"):
            import_axis(path, MODEL)
    with refused("is a folder, not a file"):
        import_axis(tmp_path, MODEL)


@pytest.mark.parametrize("form", ["bare", "dict", "bf16", "fp64", "parameter", "transposed"])
def test_an_axis_becomes_unit_rows_and_norms_with_its_sign_kept(tmp_path, form):
    rows = random(L, D) * torch.logspace(-3, 3, L)[:, None]
    rows = rows.bfloat16() if form == "bf16" else rows.double() if form == "fp64" else rows
    others = {
        "dict": {"axis": rows, "n": 1},
        "parameter": torch.nn.Parameter(rows),
        "transposed": rows.T.clone().T,
    }
    axis = import_axis(put(tmp_path / "axis.pt", others.get(form, rows)), MODEL)
    torch.testing.assert_close(axis.vectors.norm(dim=1), torch.ones(L))  # fp32, like everything here
    torch.testing.assert_close(axis.norms[:, None] * axis.vectors, rows.float())
    assert (axis.layers, axis.layer, axis.poles) == (tuple(range(L)), L // 2, ("assistant", "role-play"))
    assert (axis.model, axis.fit["imported"], len(axis.fit["sha256"])) == (MODEL, "axis.pt", 64)


def test_an_axis_is_held_to_its_layers_and_to_the_shape_of_its_model(tmp_path):
    path = put(tmp_path / "axis.pt", random(L, D))
    assert import_axis(path, MODEL, layer=0).layer == 0
    for layer in (L, -1):
        with refused(f"layer {layer} is not in"):
            import_axis(path, MODEL, layer=layer)
    with refused("n_layers 6 against 7"):
        import_axis(path, {}).require_model({**MODEL, "n_layers": 7})
    with refused(f"has {L} layers of width {D + 1}, m has {L} of {D}: not an axis of this model"):
        import_axis(put(path, random(L, D + 1)), MODEL)
    with refused("is row 0 the embedding?"):
        import_axis(put(path, random(L + 1, D)), MODEL)


def broken(row: int, value: float) -> Tensor:
    return random(L, D).index_fill(0, torch.tensor(row), value)


@rejects(
    (broken(3, 0), "zero has no direction (row 3"),
    (broken(2, NAN), "NaN or infinite (the first at row 2)"),
    (random(D), "found a tensor float32 (24,), not one of shape (L, D)"),
    (random(1, L, D), "found a tensor float32 (1, 6, 24), not one of shape (L, D)"),
    (torch.empty(0, D), "not one of shape (L, D)"),
    (
        torch.ones(L, D, dtype=torch.int64),
        "found a tensor int64 (6, 24), not a dense tensor of floating-point",
    ),
    (random(L, D).to_sparse(), "not a dense tensor of floating-point"),
    ({"axis": [1.0]}, "found a list of 1, not a dense tensor"),
    (
        {"axes": random(L, D), "n": 1},
        "holds a dict of 'axes', 'n', not a tensor or a dict with one under 'axis'",
    ),
    ("text", "found a str"),
)
def test_an_axis_that_is_none_is_refused_and_says_what_was_found(tmp_path, content, reason):
    with refused(reason):
        import_axis(put(tmp_path / "axis.pt", content), MODEL)


def test_role_vectors_are_read_by_name_from_a_folder_or_one_file(tmp_path):
    expected = {name: random(L, D, seed=seed) for seed, name in enumerate(("bard", "default", "ghost"))}
    put(tmp_path / "ghost.pt", expected["ghost"].double())
    put(tmp_path / "bard.pt", {"vector": expected["bard"], "type": "pos_3", "role": "bard"})
    put(tmp_path / "default.pt", {"mean": expected["default"], "count": 1200})
    put(tmp_path / "README.md", "not a vector")
    found = import_role_vectors(tmp_path)
    assert list(found) == ["bard", "default", "ghost"]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert list(import_role_vectors(tmp_path / "bard.pt")) == ["bard"]


@rejects(
    (
        {"vector": random(L, D), "mean": random(L, D)},
        "holds a dict of 'vector', 'mean', not a tensor or a dict",
    ),
    (
        {"pos_3": random(L, D)},
        "holds a dict of 'pos_3', not a tensor or a dict with one, under 'vector' or 'mean'",
    ),
    ({"vector": random(L, D), "role": "ghost"}, "says that it is role 'ghost'"),
    (broken(0, NAN), "NaN or infinite"),
    (random(L, D + 1), "has shape (6, 25), angel.pt has (6, 24): vectors of two models"),
)
def test_a_role_vector_that_is_none_is_refused_with_its_file(tmp_path, content, reason):
    put(tmp_path / "angel.pt", random(L, D))
    put(tmp_path / "bard.pt", content)
    with refused(reason):
        import_role_vectors(tmp_path)


def config(layers: range, id: str, lengths: tuple[float, ...] = (1.0,) * L) -> dict[str, Any]:
    """A capping file: at layer l a vector of the given length with cap l/10 - 0.4."""
    vectors = {}
    for layer, length in zip(layers, lengths, strict=False):
        vectors[f"at{layer}"] = {"layer": layer, "vector": length * normalize(random(D, seed=layer), dim=0)}
    steps = [{"vector": f"at{layer}", "cap": layer / 10 - 0.4} for layer in layers]
    return {"vectors": vectors, "experiments": [{"id": id, "interventions": steps}]}


def test_an_imported_floor_acts_like_the_released_ceiling_whatever_the_length_of_the_vector(tmp_path):
    content = config(range(2, 6), "layers_2:6-p0.25", (1.0, 0.01, 37.0, 1.0))
    cap = import_caps(put(tmp_path / "caps.pt", content), MODEL)["layers_2:6-p0.25"]
    h = random(500, D, seed=99)
    for row, step in enumerate(content["experiments"][0]["interventions"]):
        u = content["vectors"][step["vector"]]["vector"].double()
        u, x = u / u.norm(), h.double()
        expected = x - (x @ u - step["cap"]).clamp(min=0)[:, None] * u  # the released code, in float64
        assert 0.1 < (expected != x).any(dim=1).double().mean() < 0.9, (
            "some tokens must be capped and some not"
        )
        torch.testing.assert_close(apply_cap(h, cap, row).double(), expected, rtol=0, atol=2e-6)
    # at length 1 the projection onto the bare vector is the same number, so there the reading of the norm is no choice
    vector = content["vectors"]["at2"]["vector"]
    bare = h - (h @ vector + 0.2).clamp(min=0)[:, None] * vector
    torch.testing.assert_close(apply_cap(h, cap, 0), bare, rtol=0, atol=2e-6)


def test_an_imported_cap_points_to_the_assistant_when_its_vectors_are_the_negated_axis(tmp_path):
    axis = import_axis(put(tmp_path / "axis.pt", random(L, D)), MODEL)
    content = config(range(2, 4), "layers_2:4-p0.25")
    for entry in content["vectors"].values():
        entry["vector"] = -3.0 * axis.at(entry["layer"])
    cap = import_caps(put(tmp_path / "caps.pt", content), MODEL)["layers_2:4-p0.25"]
    torch.testing.assert_close(cap.vectors, axis.vectors[2:4])
    torch.testing.assert_close(cap.floor, torch.tensor([0.2, 0.1]))
    assert (cap.layers, cap.level, cap.population, cap.ceiling, cap.model) == (
        (2, 3),
        0.25,
        "paper",
        None,
        MODEL,
    )


def test_every_experiment_that_caps_is_imported_and_a_baseline_is_left_out(tmp_path):
    content = config(range(1, 5), "layers_1:5-p0.5")
    steps = content["experiments"][0]["interventions"]
    content["experiments"] += [
        {"id": "baseline", "interventions": []},
        {"id": "layers_2:4-p0.10", "interventions": [steps[2], steps[1]]},
        {"id": "by hand", "interventions": [{**steps[3], "cap": torch.tensor(2)}]},
    ]
    caps = import_caps(put(tmp_path / "caps.pt", content), {}, d_model=D)
    assert list(caps) == ["layers_1:5-p0.5", "layers_2:4-p0.10", "by hand"]
    whole, part, by_hand = caps.values()
    assert (whole.layers, part.layers, by_hand.layers) == ((1, 2, 3, 4), (2, 3), (4,))
    assert (whole.level, part.level, by_hand.level) == (0.5, 0.1, None)
    assert (part.floor.tolist(), by_hand.floor.tolist()) == (whole.floor[1:3].tolist(), [-2.0])


def changed(place: str, value: Any) -> dict[str, Any]:
    """A good capping file with one place changed: "vectors at2 layer", with STEP for an intervention's list."""
    content: Any = config(range(2, 4), "layers_2:4-p0.25")
    *parents, last = place.replace("STEP", "experiments 0 interventions").split()
    inner = content
    for part in parents:
        inner = inner[int(part) if part.isdigit() else part]
    inner[int(last) if last.isdigit() else last] = value
    return content


@rejects(
    (changed("experiments 0 id", "layers_2:5-p0.25"), "caps layers [2, 3], its id says 2..4"),
    (changed("experiments 0 id", "layers_2:4-p25"), "level 25 is not a quantile"),
    (changed("experiments 0 id", None), "experiment 1 (None) needs an id"),
    (changed("experiments", []), "none of its 0 experiments has an intervention with a 'cap'"),
    (changed("experiments", config(range(2, 4), "x")["experiments"] * 2), "experiment 2 ('x') needs an id"),
    (changed("STEP 1", {"vector": "at3"}), "intervention 2 has cap None, not a finite number"),
    (changed("STEP 0 cap", NAN), "intervention 1 has cap nan"),
    (changed("STEP 0 cap", 10**400), "has cap a number of more than 20 digits, not a finite number"),
    (changed("STEP 0 cap", torch.tensor(float("inf"))), "has cap inf"),
    (changed("experiments 0 id", f"layers_2:{10**11}-p0.25"), "caps layers [2, 3], its id says 2..9999"),
    (changed("experiments 0 id", "layers_2:4-p" + "9" * 5000), "is not a quantile"),
    (changed("STEP 0 vector", "at9"), "names no vector of the file"),
    (changed("STEP 0 vector", "at3"), "two interventions are at layer 3"),
    (changed("vectors at2 layer", L), f"is at layer {L}, the model has layers 0..{L - 1}"),
    (changed("vectors at2 layer", 10**11), f"is at layer {10**11}, the model has layers 0..{L - 1}"),
    (changed("vectors at2 layer", 10**400), "is at layer a number of more than 20 digits"),
    (changed("vectors at2 layer", -1), "not a dict with 'layer', a number from 0"),
    (changed("vectors at2 vector", torch.zeros(D)), "zero has no direction"),
    (changed("vectors at2 vector", random(D + 1)), f"has width {D + 1}, not {D}"),
    (changed("vectors at2", random(D)), "'at2' is a tensor float32"),
    (random(L, D), "holds a tensor float32 (6, 24), not a dict"),
)
def test_a_capping_file_that_contradicts_itself_is_refused_with_its_place(tmp_path, content, reason):
    with refused(reason):
        import_caps(put(tmp_path / "caps.pt", content), MODEL)


HUGE = random(1).expand(10**6, 10**6)


@pytest.mark.parametrize(
    ("read", "content"),
    [
        (import_axis, HUGE),
        (import_axis, {"axis": HUGE}),
        (import_axis, torch.nn.Parameter(HUGE)),
        (import_axis, random(1).expand(2**31, 2**31)),
        (import_axis, [{"unused": HUGE}]),
        (import_role_vectors, {"mean": HUGE}),
        (import_caps, changed("vectors at2 vector", random(1).expand(10**12))),
        (import_caps, changed("STEP 0 cap", random(1).expand(10**12))),
        (import_caps, changed("vectors at2 vector", random(24).as_strided((D, 10**11), (1, 0)))),
    ],
)
def test_a_tensor_that_says_to_be_larger_than_the_file_is_refused(tmp_path, read, content):
    path = put(tmp_path / "large.pt", content)
    with refused("save it with .contiguous()"):
        read(path) if read is import_role_vectors else read(path, MODEL)


def test_a_layer_of_an_axis_that_no_model_has_is_refused(tmp_path):
    for layer in (L, 10**11, 10**400, -1):
        with refused(f"is not in {tmp_path / 'axis.pt'} (0..{L - 1})"):
            import_axis(put(tmp_path / "axis.pt", random(L, D)), MODEL, layer=layer)


def test_an_empty_place_is_refused(tmp_path):
    with refused("holds no .pt file"):
        import_role_vectors(tmp_path)
