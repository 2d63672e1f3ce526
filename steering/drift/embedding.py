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

BATCH = 64
MAX_TOKENS = 512  # of a text


def load_embedding(name: str, device: str) -> Embedding:
    """Returns a function from texts (N) to unit rows (N, D).

    Raises `UserError` for a model that cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer

    from personatlas.persona.models.checkpoint import require_finite, require_rows, require_whole
    from personatlas.persona.models.hub import hub_or_cache
    from personatlas.persona.models.load import one_line, quiet_transformers

    with hub_or_cache(name), quiet_transformers(), one_line(f"--embedding {name}"):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        loaded: Any = AutoModel.from_pretrained(
            name, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
        )
        model, info = loaded
        heads = {key for key in info["missing_keys"] if key.startswith("pooler.")}  # not read here
        require_whole(
            name, model, info | {"missing_keys": info["missing_keys"] - heads, "unexpected_keys": ()}
        )
        require_finite(name, model)
        require_rows(name, model, tokenizer)
        model = model.to(device).eval()
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
