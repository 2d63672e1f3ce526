"""An exported folder as one GGUF file, for llama.cpp and what is built on it.

    export_model(model, tokenizer_folder, folder)
    write_gguf(folder, folder / "model-bf16.gguf", "bf16")

llama.cpp's own converter has the architecture, but tells tokenizers apart by a hash of the ids that they give
to a test text and refuses any that it has not seen. What it needs to know is how text is parted into words,
and our tokenizers do that as Llama 3's does, whose name there is "llama-bpe". So the file is written here,
under llama.cpp's own names of fields and tensors, which the package `gguf` holds.
"""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import safe_open

from personatlas.persona.artifacts import atomic, read_json, require_writable
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.records import JsonObject
from personatlas.training.data.tokenizer import PATTERN
from personatlas.training.export.huggingface import read_shape
from personatlas.training.model.config import Shape

if TYPE_CHECKING:
    from gguf import GGUFWriter

PRE_TOKENIZER = "llama-bpe"
FORMATS = ("f32", "bf16", "f16")


def write_gguf(folder: Path, out: Path, format: str = "bf16") -> Path:
    """Writes `out` from an exported folder: matrices in `format`, norm weights in fp32; atomically.

    Raises `UserError` where `out` exists, for a folder of another kind, and for a tokenizer that parts text
    in another way.
    """
    import gguf

    if format not in FORMATS:
        raise UserError(f"format {not_one_of(format, FORMATS)}")
    if out.exists():
        raise UserError(f"{out} is already there; choose another name or remove it")
    require_writable(out, "the GGUF file")
    shape = read_shape(folder)
    tokenizer = read_json(folder / "tokenizer.json")
    if tokenizer["model"]["type"] != "BPE" or json.dumps(PATTERN) not in json.dumps(
        tokenizer["pre_tokenizer"]
    ):
        raise UserError(f"{folder}: its tokenizer was not trained here; llama.cpp's converter may know it")
    template = folder / "chat_template.jinja"
    kind = gguf.GGMLQuantizationType[format.upper()]
    file_type = "ALL_F32" if format == "f32" else f"MOSTLY_{format.upper()}"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, shape.depth)
    with atomic(out) as temporary, safe_open(folder / "model.safetensors", framework="pt") as file:
        writer = gguf.GGUFWriter(temporary, "qwen3")
        _write_sizes(writer, shape, folder.resolve().name)
        writer.add_file_type(int(gguf.LlamaFileType[file_type]))
        _write_tokenizer(writer, tokenizer, read_json(folder / "config.json"), shape.vocabulary)
        if template.is_file() and (text := template.read_text(encoding="utf-8")):
            writer.add_chat_template(plain_template(text))
        for name in sorted(file.keys()):
            value: np.ndarray = file.get_tensor(name).float().numpy()
            stored = kind if value.ndim > 1 else gguf.GGMLQuantizationType.F32
            gguf_name = names.get_name(name, try_suffixes=(".weight",))
            assert gguf_name is not None, name
            writer.add_tensor(gguf_name, gguf.quants.quantize(value, stored), raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return out


def _write_sizes(writer: "GGUFWriter", shape: Shape, name: str) -> None:
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


def _write_tokenizer(
    writer: "GGUFWriter", tokenizer: JsonObject, config: JsonObject, vocabulary: int
) -> None:
    from gguf import TokenType

    tokens = [f"[PAD{id}]" for id in range(vocabulary)]  # embedded but never written by the tokenizer
    types = [int(TokenType.UNUSED)] * vocabulary
    for token, id in tokenizer["model"]["vocab"].items():
        tokens[id], types[id] = token, int(TokenType.NORMAL)
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE_TOKENIZER)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    for name, add in (
        ("bos_token_id", writer.add_bos_token_id),
        ("eos_token_id", writer.add_eos_token_id),
        ("pad_token_id", writer.add_pad_token_id),
    ):
        if config.get(name) is not None:
            add(config[name])
    # before a text by itself; llama.cpp takes it off where a template has written it
    writer.add_add_bos_token(True)


def plain_template(template: str) -> str:
    """The template without its marks of the assistant's words, which not every Jinja knows."""
    return re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template)
