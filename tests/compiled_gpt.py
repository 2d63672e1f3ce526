"""A script that the tests start: the GPT's training step as one traced graph. Outside pytest, whose shape checks none can trace.

python tests/compiled_gpt.py cpu|cuda
"""

import sys

import torch
from test_gpt import ids_of, lively

HOW = {"cpu": {"backend": "eager"}, "cuda": {}}


def main(device: str) -> None:
    ids = ids_of(2, 33).to(device)
    documents = torch.arange(32, device=device).expand(2, 32) // 12
    for packed in (None, documents):
        torch._dynamo.reset()
        plain, traced = lively().to(device), lively().to(device)
        compiled = torch.compile(traced, fullgraph=True, **HOW[device])
        for model in (plain, compiled):
            model(ids[:, :-1], ids[:, 1:], documents=packed).backward()
        for one, two in zip(plain.parameters(), traced.parameters(), strict=True):
            torch.testing.assert_close(one.grad, two.grad, rtol=1e-3, atol=1e-3)
    print("one graph, the same gradients")


if __name__ == "__main__":
    main(sys.argv[1])
