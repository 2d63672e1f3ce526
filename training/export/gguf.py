"""An exported folder as one GGUF file, for llama.cpp and what is built on it.

llama.cpp's own converter has the architecture, but tells tokenizers apart by a hash of the ids that they give to a test
text and refuses a vocabulary that it has not seen, which is any that is trained here. What it needs to know is how text is
parted into words, and our tokenizers do that as Llama 3's does, whose name there is "llama-bpe". So the file is written here,
under llama.cpp's own names of fields and tensors, which the package `gguf` holds; `tests/test_llama_cpp.py` runs it there.

    export(model, tokenizer_folder, folder)
    write_gguf(folder, folder / "model-bf16.gguf", "bf16")
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from personatlas.persona.artifacts import atomic, read_json, require_writable
from personatlas.persona.errors import UserError
from personatlas.training.data.tokenizer import PATTERN
from personatlas.training.export.huggingface import shape_of
from personatlas.training.model.config import Shape

PARTING = "llama-bpe"
FORMATS = ("f32", "bf16", "f16")


def write_gguf(folder: Path, out: Path, format: str = "bf16") -> Path:
    """Write `out` from an exported folder: matrices in `format`, gains in fp32; atomically, and never over another file.

    Raises `UserError` for a folder of another kind, and for a tokenizer that parts text in another way.
    """
    import gguf

    if format not in FORMATS:
        raise UserError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out} is already there; choose another name or remove it")
    require_writable(out, "the GGUF file")
    shape = shape_of(read_json(folder / "config.json"), folder)
    tokenizer = _tokenizer(folder)
    kind = gguf.GGMLQuantizationType[format.upper()]
    with atomic(out) as temporary:
        writer = gguf.GGUFWriter(temporary, "qwen3")
        _write_sizes(writer, shape, folder.resolve().name)
        writer.add_file_type(_file_type(format))
        _write_tokenizer(writer, tokenizer, shape.vocabulary)
        _write_tensors(writer, folder / "model.safetensors", shape.depth, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _tokenizer(folder: Path) -> dict[str, Any]:
    """tokenizer.json, with what stands beside it under `config` and `template`; refused unless it parts words as ours do."""
    made = read_json(folder / "tokenizer.json")
    if made["model"]["type"] != "BPE" or json.dumps(PATTERN) not in json.dumps(made["pre_tokenizer"]):
        raise UserError(f"{folder}: its tokenizer was not trained here; llama.cpp's converter may know it")
    template = folder / "chat_template.jinja"
    made["template"] = template.read_text(encoding="utf-8") if template.is_file() else None
    made["config"] = read_json(folder / "config.json")
    return made


def _file_type(format: str) -> int:
    from gguf import LlamaFileType

    return int(LlamaFileType.ALL_F32 if format == "f32" else LlamaFileType[f"MOSTLY_{format.upper()}"])


def _write_sizes(writer: Any, shape: Shape, name: str) -> None:
    writer.add_name(name)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.depth)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_width)
    writer.add_value_length(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_vocab_size(shape.vocabulary)


def _write_tokenizer(writer: Any, made: dict[str, Any], vocabulary: int) -> None:
    from gguf import TokenType

    tokens = [f"[PAD{id}]" for id in range(vocabulary)]  # embedded but never written by the tokenizer
    types = [int(TokenType.UNUSED)] * vocabulary
    for token, id in made["model"]["vocab"].items():
        tokens[id], types[id] = token, int(TokenType.NORMAL)
    for added in made["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in made["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PARTING)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    config = made["config"]
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if config.get(name) is not None:
            add(config[name])
    writer.add_add_bos_token(
        True
    )  # before a text by itself; llama.cpp takes it off where a template has written it
    if made["template"]:
        writer.add_chat_template(plain_template(made["template"]))


def plain_template(template: str) -> str:
    """The template without its marks of the assistant's words, which only training needs and not every Jinja knows."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)


def _write_tensors(writer: Any, path: Path, depth: int, kind: Any) -> None:
    import gguf
    import torch

    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, depth)
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            value: np.ndarray = file.get_tensor(name).to(torch.float32).numpy()
            stored = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32
            theirs = names.get_name(name, try_suffixes=(".weight",))
            writer.add_tensor(theirs, gguf.quants.quantize(value, stored), raw_dtype=stored)
