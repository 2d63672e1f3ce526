"""Damage to files: a place of their JSON, their bytes, their tensors; hashes are right again afterwards.

damage(folder / "axis.safetensors", random.Random(0))
"""

import copy
import json
import signal
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from hashlib import sha256

import numpy as np
import torch
from safetensors.torch import load_file, save, save_file

from personatlas.persona.artifacts import load_tensors

DEEP = "[" * 3000 + "]" * 3000
STRANGE = [
    None,
    True,
    -1,
    -0.5,
    10**30,
    10**400,
    "",
    "x",
    "\ud800",
    [],
    {},
    [[]],
    {"a": 1},
    DEEP,
    "NaN",
    "1e999",
]
RAW = (DEEP, "NaN", "1e999")  # written as they stand


@contextmanager
def within(seconds):
    """A reader that hangs is an error of its own."""

    def stop(*_):
        raise AssertionError(f"no answer within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def places(value, path=()):
    """Every place in a JSON tree."""
    yield path
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        yield from places(child, (*path, key))


def damage_tree(tree, draw):
    """A JSON tree with one place changed, and whether no reader may take what it says there."""
    tree = copy.deepcopy(tree)
    path = draw.choice([path for path in places(tree) if path])
    parent = tree
    for key in path[:-1]:
        parent = parent[key]
    before = parent[path[-1]]
    if draw.random() < 0.3:
        if isinstance(parent, dict) or draw.random() < 0.5:
            del parent[path[-1]]
        else:
            parent.append(copy.deepcopy(before))
    else:
        parent[path[-1]] = draw.choice(STRANGE)
    return tree


def as_json(tree):
    text = json.dumps(tree)
    for raw in RAW:
        text = text.replace(json.dumps(raw), raw)
    return text


def damage_text(content, draw):
    """Bytes that are cut short, longer, empty, or of no encoding."""
    cut = draw.randrange(len(content))
    return draw.choice(
        [
            content[:cut],
            content + b"}",
            b"",
            content[:cut] + b"\xff\xfe" + content[cut:],
            content[:cut] + content[cut + 1 :],
        ]
    )


def damage_bytes(content, draw):
    """The same, or bytes of the header with other values."""
    if draw.random() < 0.5:
        return damage_text(content, draw)
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 4])):
        at = draw.randrange(min(len(content), draw.choice([64, 2000, 20_000])))
        content[at] = draw.choice([0, 255, 127, 1, draw.randrange(256)])
    return bytes(content)


def damage_array(path, draw):
    """Another shape, dtype, value, or objects, which are a pickle."""
    values = np.load(path)
    changed = {
        "rows": values.reshape(1, -1),
        "dtype": values.astype("float32"),
        "value": np.where(np.arange(len(values)) == draw.randrange(len(values)), 65535, values).astype(
            "uint16"
        ),
        "objects": np.array([{"a": 1}], dtype=object),
    }
    np.save(path, changed[draw.choice(sorted(changed))], allow_pickle=True)


def damage_tensors(tensors, draw):
    """Tensors of which one has another shape, dtype or content."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = draw.choice(sorted(tensors))
    tensor = tensors[name]
    kind = draw.choice(
        ["nan", "inf", "negative", "empty", "rows", "columns", "flat", "dtype", "missing", "extra", "zero"]
    )
    if kind in ("nan", "inf", "negative", "zero"):
        values = {"nan": float("nan"), "inf": float("inf"), "negative": -7, "zero": 0}
        if not tensor.is_floating_point() and kind in ("nan", "inf"):
            kind = "negative"
        tensor.view(-1)[draw.randrange(tensor.numel())] = values[kind]
    elif kind == "missing":
        del tensors[name]
    elif kind == "extra":
        tensors["more"] = torch.zeros(2)
    else:
        changed = {
            "empty": tensor[:0],
            "rows": torch.cat([tensor, tensor[:1]]),
            "columns": tensor[..., :-1],
            "flat": tensor.reshape(-1),
            "dtype": tensor.double() if tensor.dtype == torch.float32 else tensor.float(),
        }
        tensors[name] = changed[kind].clone()
    return tensors


def beside(stem, ending):
    """The file of an artefact, whose name may hold dots."""
    return stem.with_name(stem.name + ending)


def write_artefact(stem, tensors, meta):
    """The two files of an artefact whose hash and shapes are right, whatever it holds."""
    meta = as_json(meta)
    content = save(tensors, metadata={"meta": meta})
    shapes = {name: [str(t.dtype).removeprefix("torch."), *t.shape] for name, t in tensors.items()}
    own = as_json({"tensors": shapes, "sha256": sha256(content).hexdigest()})
    beside(stem, ".safetensors").write_bytes(content)
    beside(stem, ".json").write_text(
        f"{meta[:-1]}, {own[1:]}" if meta.startswith("{") and len(meta) > 2 else own
    )


def damage(path, draw):
    """Damages one file. Hashes of it in JSON files beside it (or in the folder above) are right again."""
    before = sha256(path.read_bytes()).hexdigest()
    _damage(path, draw)
    after = sha256(path.read_bytes()).hexdigest()
    for record in {*path.parent.glob("*.json"), *path.parent.parent.glob("*.json")} - {path}:
        if before in (text := record.read_text()):
            record.write_text(text.replace(before, after))


def _damage(path, draw):
    if path.suffix == ".npy":
        damage_array(path, draw)
    elif path.suffix not in (".json", ".jsonl", ".safetensors"):
        path.write_bytes(damage_bytes(path.read_bytes() or b"x", draw))
    elif path.suffix == ".safetensors" and not path.with_suffix(".json").is_file():
        tensors = load_file(path)
        if draw.random() < 0.3:
            path.write_bytes(damage_text(path.read_bytes(), draw))
        else:
            save_file(damage_tensors(tensors, draw), path, metadata={"format": "pt"})
    elif path.suffix == ".safetensors":
        stem = path.with_suffix("")
        tensors, meta = load_tensors(stem, json.loads(beside(stem, ".json").read_text())["kind"])
        if draw.random() < 0.5:
            tensors = damage_tensors(tensors, draw)
        else:
            meta = damage_tree(meta, draw)
        write_artefact(stem, tensors, meta)
    elif draw.random() < 0.2:
        path.write_bytes(damage_text(path.read_bytes(), draw))
    elif path.suffix == ".json":
        path.write_text(as_json(damage_tree(json.loads(path.read_text()), draw)))
    else:
        lines = path.read_text().splitlines()
        at = draw.randrange(len(lines))
        lines[at] = as_json(damage_tree(json.loads(lines[at]), draw))
        path.write_text("\n".join(lines) + "\n")


def faults(value, place=""):
    """What no artefact may hold, wherever it was read from: an oracle that shares no code with the readers."""
    if isinstance(value, torch.Tensor):
        open_ended = place.endswith(("floor", "ceiling", "quantiles"))
        if value.is_floating_point() and not open_ended and not torch.isfinite(value).all():
            yield f"{place} is not finite"
        if place.endswith(("norms", "count", "counts")) and not (value > 0).all():
            yield f"{place} is not above 0"
        if place.endswith("vectors") and not torch.allclose(value.norm(dim=-1), torch.ones(()), atol=1e-3):
            yield f"{place} are no unit vectors"
    elif is_dataclass(value):
        for field in fields(value):
            yield from faults(getattr(value, field.name), f"{place}.{field.name}")
        if isinstance(getattr(value, "layers", None), tuple) and all(
            isinstance(n, int) for n in value.layers
        ):
            if len(set(value.layers)) != len(value.layers) or min(value.layers) < 0:
                yield f"{place}.layers are {value.layers}"
            for name in ("vectors", "norms", "floor"):
                tensor = getattr(value, name, None)
                if tensor is not None and len(tensor) != len(value.layers):
                    yield f"{place}.{name} has {len(tensor)} rows for {len(value.layers)} layers"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from faults(item, f"{place}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value[:200]):
            yield from faults(item, f"{place}[{index}]")
    elif isinstance(value, float) and value in (float("inf"), float("-inf")):
        yield f"{place} is infinite"
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        name = place.rpartition(".")[2].partition("[")[0]
        if abs(value) > 2.0**63:
            yield f"{place} is {str(value)[:30]}"
        if (
            name in ("n", "layer", "step", "steps", "tokens", "n_rollouts", "prompt_ids", "answer_ids")
            and value < 0
        ):
            yield f"{place} is {value}"
        if name in ("share", "p_norm", "fired") and not 0 <= value <= 1:
            yield f"{place} is {value}"
