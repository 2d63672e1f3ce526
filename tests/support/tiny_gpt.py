"""A tiny GPT whose every part matters, for the tests of training and export."""

import torch

from personatlas.training.model.config import Shape
from personatlas.training.model.gpt import GPT

SHAPE = Shape(vocabulary=97, depth=3, width=32, heads=4, kv_heads=2, head_width=8, inner=48, context=64)


def lively(shape=SHAPE, seed=0, **options):
    """A model whose every part matters: fresh ones have silent blocks and an almost silent head."""
    model, generator = GPT(shape, **options).initialise(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def ids_of(rows, length, seed=1):
    return torch.randint(SHAPE.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))
