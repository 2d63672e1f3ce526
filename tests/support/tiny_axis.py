"""A random axis of a tiny model, and the rows of tokens that its quantiles were taken from."""

import torch
from torch.nn.functional import normalize

from personatlas.persona.axis import Axis
from personatlas.persona.models.hooks import residual
from personatlas.persona.sampling.sampler import pad

ROWS = [
    tuple((i * 37 + row * 11 + 5) % 300 + 3 for i in range(length))
    for row, length in enumerate((9, 14, 6, 11))
]
LENGTHS = torch.tensor([len(row) for row in ROWS])
LEVELS = (0.25, 0.5, 0.75)


def axis_of(model, seed=0):
    """A random axis whose default quantiles are those of plain projections of the rows, so that a cap fires
    on some.
    """
    generator = torch.Generator().manual_seed(seed)
    vectors = normalize(torch.randn(model.n_layers, model.d_model, generator=generator), dim=1)
    places = [(h @ v)[real(h)] for h, v in zip(outputs(model), vectors, strict=True)]
    quantiles = torch.stack([torch.quantile(place, torch.tensor(LEVELS)) for place in places])
    layers = tuple(range(model.n_layers))
    return Axis(
        vectors, torch.ones(len(layers)), layers, 1, model.describe(), LEVELS, quantiles, quantiles - 1
    )


def real(h):
    return torch.arange(h.shape[1]) < LENGTHS[:, None]


def outputs(model, rows=ROWS):
    """Every block's output (B, T, D), as hooks put on after all others see it."""
    found = []
    handles = [b.register_forward_hook(lambda m, a, out: found.append(residual(out))) for b in model.blocks]
    try:
        with torch.no_grad():
            model.base(input_ids=pad(rows, model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
