"""To and from a Qwen3 checkpoint of transformers: what is trained here is an ordinary model folder.

    export_model(model, run / "tokenizer", out)  # config.json, model.safetensors, the tokenizer, ...
    load_model(str(out))                         # and AutoModelForCausalLM, TransformerLens, vLLM
    load_exported(out)                           # the GPT again, bit for bit

Weights are copied under the names that they have, with `model.` before all but the head; nothing is
transposed, folded or rescaled, so an fp32 export is the model. `gguf.py` makes one file of such a folder for
llama.cpp.
"""

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from personatlas.persona.artifacts import atomic_folder, digest, make_folder, read_json, write_json
from personatlas.persona.errors import UserError
from personatlas.persona.models.chat_template import chat_format
from personatlas.persona.models.load import quiet_transformers
from personatlas.persona.records import FieldError, JsonObject, Number, read_field
from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# fields of a Qwen3 config that have one value here
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


def export_model(model: GPT, tokenizer_folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a checkpoint folder, whole or not at all. fp32 loses nothing; bf16 rounds the fp32 masters once.

    Raises `UserError` when `out` is there and not empty, or the tokenizer is not this model's.
    """
    out = Path(os.path.normpath(out))  # A/x/../B is there if A/B is, whether or not there is an A/x
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is already there; choose another folder or remove it")
    if not (tokenizer_folder / "tokenizer.json").is_file():
        raise UserError(f"{tokenizer_folder} has no tokenizer.json: not a tokenizer's folder")
    tokenizer = load_hf_tokenizer(tokenizer_folder, model.shape)
    make_folder(out.parent, "the export's folder")
    with atomic_folder(out) as temporary:
        weights = {
            _exported_name(name): value.detach().to("cpu", dtype).contiguous()
            for name, value in model.named_parameters()
        }
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name in TOKENIZER_FILES:
            if (tokenizer_folder / name).is_file():
                shutil.copyfile(tokenizer_folder / name, temporary / name)
        special = {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
        ends = {"eos_token_id": end_token_ids(tokenizer), **special}
        config = {**qwen3_config(model.shape, dtype), "eos_token_id": tokenizer.eos_token_id, **special}
        write_json(temporary / "generation_config.json", ends)
        write_json(temporary / "config.json", config)
    return out


def is_exported(model: GPT, tokenizer_folder: Path, out: Path, dtype: torch.dtype) -> bool:
    """Whether `out` is what `export_model` makes of a model: a killed command goes on behind it."""
    files = [folder / "tokenizer.json" for folder in (tokenizer_folder, out)]
    if not all(file.is_file() for file in (*files, out / "model.safetensors", out / "config.json")):
        return False
    there = load_exported(out)
    pairs = zip(model.parameters(), there.parameters(), strict=False)
    is_same = there.shape == model.shape and digest(files[0]) == digest(files[1])
    return is_same and all(b.dtype == dtype and torch.equal(a.to(dtype), b) for a, b in pairs)


def load_hf_tokenizer(folder: Path, shape: Shape) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder. Raises `UserError` for ids that a model of this shape does not embed."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # noqa: BLE001 (`tokenizers` raises Exception itself for a damaged file)
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} does not hold a tokenizer that can be read ({reason})") from None
    if len(tokenizer) > shape.vocabulary:
        raise UserError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and the model embeds {shape.vocabulary}"
        )
    return tokenizer


def end_token_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Tokens that end an answer: the tokenizer's own end, and with a chat template also that of a turn."""
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if not tokenizer.chat_template:
        return own
    return sorted({*own, *chat_format(tokenizer, tokenizer.eos_token_id).end_ids})


def qwen3_config(shape: Shape, dtype: torch.dtype) -> JsonObject:
    """config.json without token ids. transformers from 5 on reads the second form of the rotary base."""
    return {
        **FIXED,
        **{theirs: getattr(shape, ours) for theirs, ours in SIZES.items()},
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "initializer_range": 0.02,
        "use_cache": True,
        "dtype": str(dtype).removeprefix("torch."),
    }


def load_exported(folder: Path) -> GPT:
    """A GPT from a Qwen3 checkpoint with untied head, its parameters in the dtype that they were stored in.

    Raises `UserError` for another architecture, another kind of rotary, or missing and left-over weights.
    """
    shape = read_shape(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} does not exist; a checkpoint in several files must be saved as one first")
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({error})") from None
    deepest = f"model.layers.{shape.depth - 1}."
    if not any(name.startswith(deepest) for name in weights):  # before so many layers are made
        raise UserError(f"{path} does not hold the weights of its config: it has no layer {shape.depth - 1}")
    with torch.device("meta"):
        model = GPT(shape)
    parameters = {_exported_name(name): (name, value.shape) for name, value in model.named_parameters()}
    if odd := sorted(set(weights) ^ set(parameters)):
        raise UserError(f"{path} does not hold the weights of its config: {odd[0]} and {len(odd) - 1} more")
    for exported, (_, wanted) in parameters.items():
        if (found := weights[exported].shape) != wanted:
            raise UserError(f"{path}: {exported} is {tuple(found)}, which its config does not say")
        if not torch.isfinite(weights[exported]).all():
            raise UserError(f"{path}: {exported} holds NaN or infinity; take an earlier checkpoint")
    model.load_state_dict({parameters[name][0]: value for name, value in weights.items()}, assign=True)
    return model.requires_grad_(True)


def read_shape(folder: Path) -> Shape:
    """The shape that a folder's config.json describes. Raises `UserError` for another architecture."""
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is not a model's configuration")
    for name, value in FIXED.items():
        if config.get(name, value if name != "architectures" else None) != value:
            has = json.dumps(config.get(name))
            raise UserError(f"{folder}: {name} is {has}; a GPT of this kind has {json.dumps(value)}")
    try:
        rope = {"rope_theta": config.get("rope_theta", 10_000.0)}
        if config.get("rope_parameters"):
            rope = read_field(config, "rope_parameters", JsonObject)
        if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
            raise UserError(
                f"{folder}: a scaled rotary embedding ({rope.get('rope_type')}) is not known here"
            )
        sizes = {ours: read_field(config, theirs, Number) for theirs, ours in SIZES.items()}
        return Shape.from_json({**sizes, "rope_base": read_field(rope, "rope_theta", Number)})
    except FieldError as error:
        raise UserError(f"{folder / 'config.json'} is no model's of this kind: {error}") from None


def _exported_name(name: str) -> str:
    return name if name.startswith("lm_head.") else f"model.{name}"
