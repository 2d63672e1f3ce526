"""The verb export: a trained model as a Hugging Face folder, as one GGUF file, or both."""

from pathlib import Path
from typing import Literal

from personaxis.persona.errors import KnownError
from personaxis.persona.verbs import say_result


def export(
    model: Path, /, *, out: Path | None = None, dtype: Literal["bf16", "fp32"] = "bf16", gguf: Path | None = None
) -> None:
    """Write a model that was trained here as an ordinary Hugging Face folder (--out), as one GGUF file (--gguf), or as both.

    Parameters
    ----------
    model
        a training run (its finished model, else its newest checkpoint) or a checkpoint's folder
    out
        the folder to make: for transformers, vLLM, TransformerLens and every MODEL here
    dtype
        of the weights; checkpoints are fp32, which loses nothing, and bf16 is half as large
    gguf
        the file to make: for llama.cpp and what is built on it; its gains stay fp32
    """
    import torch

    from personaxis.persona.store import require_writable
    from personaxis.persona.trained import resolved
    from personaxis.training.export import export as write_folder
    from personaxis.training.export import load_exported
    from personaxis.training.gguf_file import write_gguf

    if out is None and gguf is None:
        raise KnownError("give --out FOLDER, --gguf FILE or both")
    if not model.is_dir():
        raise KnownError(f"{model} is no folder; give a training run or one of its checkpoints")
    source = Path(resolved(str(model)))
    found = load_exported(source)
    if gguf is not None:
        require_writable(gguf, "--gguf")
    what = f"{source}, {found.shape.parameters / 1e6:,.1f} M parameters in {dtype}"
    if out is not None:
        write_folder(found, source, out, torch.bfloat16 if dtype == "bf16" else torch.float32)
        say_result(f"{what}: {out}")
    if gguf is not None:
        write_gguf(source, gguf, "bf16" if dtype == "bf16" else "f32")
        say_result(f"{what}: {gguf}")
