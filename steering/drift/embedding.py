"""Sentence embeddings by any encoder that `transformers` loads: the mean of the last layer over a text's tokens, scaled to length 1.

embed = embedder("path/to/some-sentence-model", "cpu")
embed(["a text", "another"])                 # (2, D)
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from personatlas.persona.errors import UserError

BATCH = 64
LONGEST = 512  # tokens of a text


def embedder(name: str, device: str) -> Callable[[Sequence[str]], np.ndarray]:
    """A function from texts (N) to unit rows (N, D). Raises `UserError` for a model that cannot be loaded."""
    from transformers import AutoModel, AutoTokenizer

    from personatlas.persona.models.load import quiet_transformers

    try:
        with quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModel.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--embedding {name} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(LONGEST, getattr(model.config, "max_position_embeddings", LONGEST))

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for first in range(0, len(texts), BATCH):
            part = list(texts[first : first + BATCH])
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            kept = {key: batch[key] for key in ("input_ids", "attention_mask")}
            rows.append(_pooled(model(**kept).last_hidden_state, kept["attention_mask"]).cpu().numpy())
        return np.concatenate(rows).astype(np.float64)

    return embed


def _pooled(hidden: Float[Tensor, "N T D"], mask: Tensor) -> Float[Tensor, "N D"]:
    """Mean over real tokens, of length 1, in fp32."""
    weights = mask[..., None].float()
    mean = (hidden.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
    return torch.nn.functional.normalize(mean, dim=1)
