"""A script that the tests start: the GPT's training step as one traced graph. Outside pytest, whose shape checks none can trace.

python tests/compiled_gpt.py cpu|cuda
"""

import sys
from dataclasses import replace

import torch
from tiny_gpt import SHAPE, ids_of, lively

# aot_eager rewrites what is changed in place, where torch 2.11 once lost all gradients
HOW = {"cpu": {"backend": "aot_eager"}, "cuda": {}}


def main(device: str) -> None:
    shape = replace(SHAPE, head_width=16)  # the least that flex_attention takes
    ids = ids_of(2, 33).to(device)
    documents = torch.arange(32, device=device).expand(2, 32) // 12
    for packed in (None, documents):
        torch._dynamo.reset()
        plain, traced = lively(shape).to(device), lively(shape).to(device)
        compiled = torch.compile(traced, fullgraph=True, **HOW[device])
        for model in (plain, compiled):
            model(ids[:, :-1], ids[:, 1:], documents=packed).backward()
        for one, two in zip(plain.parameters(), traced.parameters(), strict=True):
            # by norm: on a GPU products may be TF32, and single entries of a sum that cancels are off by more
            assert (one.grad - two.grad).norm() < 5e-3 * one.grad.norm(), one.shape
    print("one graph, the same gradients")


if __name__ == "__main__":
    main(sys.argv[1])
