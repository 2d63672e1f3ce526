"""Sentence embeddings by any encoder that `transformers` loads: the last layer's mean over tokens, of length
1.

embed = load_embedding("path/to/some-sentence-model", "cpu")
embed(["a text", "another"])                 # (2, D)
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from personatlas.analysis.next_message import Embedding
from personatlas.persona.errors import UserError

BATCH = 64
MAX_TOKENS = 512  # of a text


def load_embedding(name: str, device: str) -> Embedding:
    """Returns a function from texts (N) to unit rows (N, D).

    Raises `UserError` for a model that cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    from personatlas.persona.models.hub import hub_or_cache
    from personatlas.persona.models.load import quiet_transformers

    try:
        with hub_or_cache(name), quiet_transformers():
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModel.from_pretrained(name).to(device).eval()
    except (OSError, ValueError) as error:
        raise UserError(
            f"--embedding {name} cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    longest = min(MAX_TOKENS, getattr(model.config, "max_position_embeddings", MAX_TOKENS))

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        rows = []
        for first in range(0, len(texts), BATCH):
            part = list(texts[first : first + BATCH])
            batch = tokenizer(
                part, padding=True, truncation=True, max_length=longest, return_tensors="pt"
            ).to(device)
            mask = batch["attention_mask"]
            hidden = model(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state.float()
            weights = mask[..., None].float()
            mean = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)  # over real tokens, fp32
            rows.append(torch.nn.functional.normalize(mean, dim=1).cpu().numpy())
        return np.concatenate(rows).astype(np.float64)

    return embed
