"""The reference step for one layer of a cap, on tensors of any shape."""

import torch

from personatlas.persona.interventions import apply_steps


def apply_cap(h, cap, row):
    """h (..., D) after the cap at its layer number `row`, all tokens taken for an answer's."""
    flat = h.reshape(1, -1, h.shape[-1])
    answer = torch.ones(flat.shape[:2], dtype=torch.bool)
    return apply_steps(flat, cap.steps(row), ~answer, answer, fresh=False)[0].reshape(h.shape)
