"""To and from a Qwen3 checkpoint of transformers: what is trained here is an ordinary model folder.

    export(model, run / "tokenizer", out)        # config.json, model.safetensors, generation_config.json, the tokenizer
    load_model(str(out))                       # and AutoModelForCausalLM, TransformerLens, vLLM
    load_exported(out)                           # the GPT again, bit for bit

Weights are copied under the names that they have, with `model.` before all but the head; nothing is transposed, folded or
rescaled, so an fp32 export is the model. For llama.cpp `training/gguf_file.py` makes one file of such a folder.
"""

import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from personatlas.persona.artifacts import make_folder, read_json, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import quiet_transformers
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# fields of a Qwen3 config that a GPT of ours has one value for
FIXED = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
}
SIZES = {
    "vocab_size": "vocabulary",
    "num_hidden_layers": "depth",
    "hidden_size": "width",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_width",
    "intermediate_size": "inner",
    "max_position_embeddings": "context",
    "rms_norm_eps": "eps",
}


def export(model: GPT, tokenizer_folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a checkpoint folder, whole or not at all. fp32 loses nothing; bf16 rounds the fp32 masters once.

    Raises `UserError` when `out` is there and not empty, or the tokenizer is not this model's.
    """
    out = Path(os.path.normpath(out))  # A/x/../B is there if A/B is, whether or not there is an A/x
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there; choose another folder or remove it")
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer_folder} has no tokenizer.json: not a tokenizer's folder")
    tokenizer = load_tokenizer_of(tokenizer_folder, model.shape)
    make_folder(out.parent, "the export's folder")
    temporary = out.with_name(f".{out.name}.{secrets.token_hex(6)}")
    make_folder(temporary, "the export's folder")
    try:
        weights = {
            _theirs(name): value.detach().to("cpu", dtype).contiguous()
            for name, value in _weights(model).items()
        }
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, temporary / name)
        ends = end_tokens(tokenizer)
        write_json(temporary / "generation_config.json", {"eos_token_id": ends, **_first_and_pad(tokenizer)})
        write_json(temporary / "config.json", config_of(model.shape, tokenizer, dtype))
        temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def load_tokenizer_of(folder: Path, shape: Shape) -> Any:
    """The tokenizer in a folder; `UserError` where it has ids that a model of this shape does not embed."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} does not hold a tokenizer that can be read ({' '.join(str(error).split())})"
        ) from None
    if len(tokenizer) > shape.vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model embeds {shape.vocabulary}: "
            "it is not this model's tokenizer"
        )
    return tokenizer


def end_tokens(tokenizer: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's own end, and with a chat template also that of a turn."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        return own
    return sorted({*own, *chat_format(tokenizer, tokenizer.eos_token_id).end_ids})


def config_of(shape: Shape, tokenizer: Any, dtype: torch.dtype) -> dict[str, Any]:
    """config.json. The rotary base stands in it twice: transformers from 5 on reads the second form, others the first."""
    return {
        **FIXED,
        **{theirs: getattr(shape, ours) for theirs, ours in SIZES.items()},
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
        "eos_token_id": tokenizer.eos_token_id,
        **_first_and_pad(tokenizer),
    }


def load_exported(folder: Path) -> GPT:
    """A GPT from a Qwen3 checkpoint with untied head, its parameters in the dtype that they were stored in.

    Raises `UserError` for another architecture, another kind of rotary, or missing and left-over weights.
    """
    config = read_json(folder / "config.json")
    shape = shape_of(config, folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist; a checkpoint in several files must be saved as one first")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error})") from None
    with torch.device("meta"):
        model = GPT(shape)
    wanted, found = {_theirs(name): name for name in _weights(model)}, set(weights)
    if found != set(wanted):
        odd = sorted(found ^ set(wanted))
        raise UserError(f"{path} does not hold the weights of its config: {odd[0]} and {len(odd) - 1} more")
    for theirs, name in wanted.items():
        if weights[theirs].shape != _weights(model)[name].shape:
            raise UserError(
                f"{path}: {theirs} is {tuple(weights[theirs].shape)}, which its config does not say"
            )
    model.load_state_dict({wanted[name]: value for name, value in weights.items()}, assign=True)
    return model.requires_grad_(True)


def shape_of(config: Any, folder: Path) -> Shape:
    """The shape that a config.json describes, or `UserError`."""
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model's configuration")
    for name, value in FIXED.items():
        if config.get(name, value if name != "architectures" else None) != value:
            raise UserError(
                f"{folder}: {name} is {json.dumps(config.get(name))}; a GPT of this kind has {json.dumps(value)}"
            )
    missing = [name for name in SIZES if name not in config]
    if missing:
        raise UserError(f"{folder / 'config.json'} does not say {missing[0]}")
    rope = config.get("rope_parameters") or {
        "rope_type": "default",
        "rope_theta": config.get("rope_theta", 10_000.0),
    }
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise UserError(f"{folder}: a scaled rotary embedding ({rope.get('rope_type')}) is not known here")
    return Shape(
        **{ours: config[theirs] for theirs, ours in SIZES.items()}, rope_base=float(rope["rope_theta"])
    )


def _weights(model: GPT) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def _theirs(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"


def _first_and_pad(tokenizer: Any) -> dict[str, Any]:
    return {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
