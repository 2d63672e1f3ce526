"""Importers of the files that the paper's repository publishes.

    axis = import_axis(Path("assistant_axis.pt"), model.describe())
    caps = import_caps(Path("capping_config.pt"), model.describe())

The sign trap: the paper writes a cap as a floor along the axis, its released code takes a *ceiling* along the
negated axis (arXiv 2601.10387, section 5, and the files themselves). Both are the same thing, because with v
= -u, floor = -cap

    h - u * clamp(<h,u> - cap, min=0)  =  h + v * clamp(floor - <h,v>, min=0)

A `.pt` file is a pickle in a zip archive. Its pickle is never given anything but tensors and plain values to
build: the names in it are listed first, without running it, and one that is not a tensor's refuses the whole
file.
"""

import pickle
import re
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.artifacts import digest
from personatlas.persona.axis import Axis
from personatlas.persona.errors import UserError, describe_value
from personatlas.persona.formats import require_file
from personatlas.persona.interventions import Cap
from personatlas.persona.records import LARGEST

MOST_LAYERS = 10_000  # of any model: more is damage

# what torch raises for archives and pickles that it cannot make sense of
UNREADABLE = (
    pickle.UnpicklingError,
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
)


def import_axis(path: Path, model: dict[str, Any], layer: int | None = None) -> Axis:
    """The axis in a `.pt` that holds a tensor (L, D), or a dict with one under "axis"; + toward the
    Assistant.

    Row l is the output of block l. `model` is the `Model.describe()` of the model that the file was made
    from: the file does not say. `layer` is the layer to use, None the middle one. Rows are scaled to length 1
    and their lengths kept as `norms`. Raises `UserError` for a file that is not such a tensor, holds NaN or a
    zero row, or has another depth or width than `model`.
    """
    held = _load_pt(path)
    if isinstance(held, dict):
        if "axis" not in held:
            raise UserError(
                f"{path} holds {describe_value(held)}, not a tensor or a dict with one under 'axis'"
            )
        held = held["axis"]
    rows = _floats(held, 2, str(path))
    n_layers, d_model = rows.shape
    _require_shape(model, n_layers, d_model, path)
    layer = n_layers // 2 if layer is None else layer
    if n_layers > MOST_LAYERS or not 0 <= layer < n_layers:
        raise UserError(f"layer {layer} is not in {path} (0..{min(n_layers, MOST_LAYERS) - 1})")
    units, norms = _unit_rows(rows, str(path))
    return Axis(
        vectors=units,
        norms=norms,
        layers=tuple(range(n_layers)),
        layer=layer,
        model={**model, "n_layers": n_layers, "d_model": d_model},
        fit={"imported": path.name, "sha256": digest(path)},
    )


def _require_shape(model: dict[str, Any], n_layers: int, d_model: int, path: Path) -> None:
    depth, width = model.get("n_layers") or n_layers, model.get("d_model") or d_model
    if (depth, width) == (n_layers, d_model):
        return
    hint = "; is row 0 the embedding? Then remove it" if (depth + 1, width) == (n_layers, d_model) else ""
    raise UserError(
        f"{path} has {n_layers} layers of width {d_model}, {model.get('id', 'the model')} has {depth} of {width}: "
        f"not an axis of this model{hint}"
    )


def import_role_vectors(path: Path) -> dict[str, Float[Tensor, "L D"]]:
    """Mean activations by role name, fp32, from one `.pt` or a folder of them, named by the file.

    Each holds a tensor (L, D), or a dict with one tensor, under "vector" or "mean" (and maybe its "role",
    which must be the file's name). Raises `UserError` for anything else, for NaN and for files of different
    shapes.
    """
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .pt file; role vectors are one .pt a role")
    vectors: dict[str, Tensor] = {}
    for file in files:
        vectors[file.stem] = found = _role_vector(_load_pt(file), file)
        first = vectors[files[0].stem]
        if found.shape != first.shape:
            shapes = f"{tuple(found.shape)}, {files[0].name} has {tuple(first.shape)}"
            raise UserError(f"{file} has shape {shapes}: vectors of two models")
    return vectors


def _role_vector(held: Any, path: Path) -> Tensor:
    if isinstance(held, dict):
        names = [name for name, value in held.items() if isinstance(value, Tensor)]
        if len(names) != 1 or names[0] not in ("vector", "mean"):
            raise UserError(
                f"{path} holds {describe_value(held)}, not a tensor or a dict with one, under 'vector' or 'mean'"
            )
        if not isinstance(role := held.get("role", path.stem), str) or role != path.stem:
            said = repr(role[:60]) if isinstance(role, str) else describe_value(role)
            raise UserError(f"{path} says that it is role {said}: a file must be named by its role")
        held = held[names[0]]
    return _floats(held, 2, str(path))


def import_caps(path: Path, model: dict[str, Any], d_model: int | None = None) -> dict[str, Cap]:
    """The caps of a `capping_config.pt` by experiment id ("layers_46:54-p0.25"), as floors toward the
    Assistant.

    The file is {"vectors": {name: {"layer", "vector"}}, "experiments": [{"id", "interventions": [{"vector",
    "cap"}]}]}. Its vectors point away from the Assistant, and `cap` is a ceiling on the projection onto
    vector/|vector|. That reading of the norm is the released code's: it divides before it projects, so a
    vector's length has no effect. Hence v = -vector/|vector| and floor = -cap. Compare `cap.vectors` with an
    axis of the same model before trusting a file of unknown origin: the cosine must be near +1.

    `level` is the id's number as it stands, of population "paper" (a quantile along the negated axis, as it
    seems: p0.25 would be the 75th percentile Assistant-ward). An experiment without any cap (a baseline arm)
    is left out. `d_model` is the width to expect, None `model["d_model"]`. Raises `UserError` when the file
    has another form, when the layers differ from the "layers_a:b" (half-open) of the id, or when nothing in
    it caps.
    """
    held = _load_pt(path)
    named, experiments = (
        (held.get("vectors"), held.get("experiments")) if isinstance(held, dict) else (None, None)
    )
    if not isinstance(named, dict) or not isinstance(experiments, list):
        raise UserError(
            f"{path} holds {describe_value(held)}, not a dict with a dict 'vectors' and a list 'experiments'"
        )
    width = model.get("d_model") if d_model is None else d_model
    vectors = {}
    for name, entry in named.items():
        if not isinstance(name, str):
            raise UserError(f"{path}: a vector is named {describe_value(name)}, not by a text")
        vectors[name] = _, vector = _cap_vector(entry, f"{path}: vector {name[:60]!r}", model.get("n_layers"))
        width = len(vector) if width is None else width
        if len(vector) != width:
            raise UserError(
                f"{path}: vector {name[:60]!r} has width {len(vector)}, not {width}: another model's"
            )
    caps: dict[str, Cap] = {}
    for number, experiment in enumerate(experiments, 1):
        id = experiment.get("id") if isinstance(experiment, dict) else None
        if not isinstance(id, str) or id in caps or not isinstance(experiment.get("interventions"), list):
            raise UserError(
                f"{path}: experiment {number} ({repr(id[:60]) if isinstance(id, str) else describe_value(id)}) needs an id of its own and a list 'interventions'"
            )
        steps = experiment["interventions"]
        if any(isinstance(step, dict) and "cap" in step for step in steps):
            caps[id] = replace(_cap(id, steps, vectors, f"{path}: experiment {id[:60]!r}"), model=dict(model))
    if not caps:
        raise UserError(
            f"{path}: none of its {len(experiments)} experiments has an intervention with a 'cap'"
        )
    return caps


def _cap_vector(entry: Any, where: str, n_layers: int | None) -> tuple[int, Tensor]:
    """The layer of an entry and its unit vector (D,), in the file's direction."""
    layer = entry.get("layer") if isinstance(entry, dict) else None
    if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
        raise UserError(
            f"{where} is {describe_value(entry)}, not a dict with 'layer', a number from 0, and 'vector'"
        )
    if layer >= (n_layers or MOST_LAYERS):
        raise UserError(
            f"{where} is at layer {describe_value(layer)}, the model has layers 0..{(n_layers or MOST_LAYERS) - 1}"
        )
    units, _ = _unit_rows(_floats(entry.get("vector"), 1, where)[None], where)
    return layer, units[0]


def _cap(id: str, steps: list[Any], vectors: dict[Any, tuple[int, Tensor]], where: str) -> Cap:
    rows: dict[int, tuple[Tensor, float]] = {}
    for number, step in enumerate(steps, 1):
        name = step.get("vector") if isinstance(step, dict) else None
        if not isinstance(name, str) or name not in vectors:
            raise UserError(
                f"{where}: intervention {number} is {describe_value(step)} and names no vector of the file"
            )
        ceiling = step.get("cap")
        if isinstance(ceiling, Tensor) and ceiling.numel() == 1:
            ceiling = ceiling.item()
        if not isinstance(ceiling, (int, float)) or isinstance(ceiling, bool) or not abs(ceiling) < LARGEST:
            raise UserError(
                f"{where}: intervention {number} has cap {describe_value(ceiling)}, not a finite number"
            )
        layer, vector = vectors[name]
        if layer in rows:  # one after the other, two at a layer are not one floor
            raise UserError(f"{where}: two interventions are at layer {layer}; a cap has one a layer")
        rows[layer] = -vector, -float(ceiling)
    layers = tuple(sorted(rows))
    window = re.search(r"layers_(\d+):(\d+)", id)
    first, stop = (int(min(float(number), MOST_LAYERS)) for number in window.groups()) if window else (0, 0)
    if window and layers != tuple(range(first, stop)):
        raise UserError(f"{where} caps layers {list(layers)}, its id says {first}..{stop - 1}")
    level = re.search(r"-p(\d+(?:\.\d+)?)$", id)
    if level and float(level[1]) > 1:
        raise UserError(f"{where}: level {level[1]} is not a quantile from 0 to 1")
    return Cap(
        layers=layers,
        vectors=torch.stack([rows[layer][0] for layer in layers]),
        floor=torch.tensor([rows[layer][1] for layer in layers]),
        level=float(level[1]) if level else None,
        population="paper",
    )


def _load_pt(path: Path) -> Any:
    """What a `.pt` holds: tensors, numbers, text, lists and dicts. Nothing is run; `UserError` for anything
    more.
    """
    require_file(path)
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path} is empty; fetch it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if not start.startswith(
        b"PK"
    ):  # a bare pickle, torch's form before 1.6, would lack the archive's checksums too
        raise UserError(f"{path} is not a file of `torch.save` (torch 1.6 or newer)")
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise UserError(f"{path} is compressed, not as `torch.save` writes it; save it again")
            damaged = archive.testzip()  # torch.load does not look at the checksums
        if damaged is not None:
            raise UserError(f"{path} is damaged (checksum of {damaged}); fetch it again")
        beyond = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
        if beyond:
            raise UserError(
                f"{path} holds {', '.join(beyond)}: more than tensors and plain values. It was not loaded"
            )
        content = torch.load(path, map_location="cpu", weights_only=True)
        _require_whole_tensors(content, path)
        return content
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path} is cut short or damaged ({error}); fetch it again") from None
    except UNREADABLE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path} is not a file of tensors and plain values; not loaded ({reason})") from None


def _require_whole_tensors(content: Any, path: Path) -> None:
    """`UserError` for a tensor that says to be larger than what it stores: computing with it could take all memory."""
    waiting, seen = [content], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:  # a list may hold itself
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            waiting += [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += value
        elif isinstance(value, Tensor) and value.is_nested:
            raise UserError(f"{path} holds a nested tensor; save dense ones")
        elif isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
            stored = value.untyped_storage().nbytes() // value.element_size()
            if value.numel() > stored:
                raise UserError(
                    f"{path} holds {describe_value(value)} that stores {stored:,} values; save it with .contiguous()"
                )


def _floats(value: Any, ndim: int, where: str) -> Tensor:
    """`value` as fp32, of `ndim` dimensions, finite and not empty."""
    dense = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta
    if not dense or not value.is_floating_point():
        raise UserError(
            f"{where}: found {describe_value(value)}, not a dense tensor of floating-point numbers"
        )
    if value.ndim != ndim or not value.numel():
        raise UserError(
            f"{where}: found {describe_value(value)}, not one of shape {('', '(D,)', '(L, D)')[ndim]}"
        )
    value = value.detach().float().contiguous()
    if not torch.isfinite(value).all():
        row = int((~torch.isfinite(value)).nonzero()[0][0])
        raise UserError(
            f"{where}: a value is NaN or infinite (the first at {'row' if ndim == 2 else 'place'} {row})"
        )
    return value


def _unit_rows(rows: Tensor, where: str) -> tuple[Tensor, Tensor]:
    """Rows (N, D) at length 1 and their lengths (N,), computed in fp64."""
    norms = rows.double().norm(dim=1)
    if not norms.all():
        zeros = (norms == 0).nonzero().flatten().tolist()
        raise UserError(f"{where}: zero has no direction (row {', '.join(map(str, zeros))}, counted from 0)")
    return (rows.double() / norms[:, None]).float(), norms.float()
