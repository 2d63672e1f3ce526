"""A script that the tests start: steering in a compiled forward. Outside pytest, whose shape checks no
compiler can trace.

python tests/compiled.py cpu|cuda
"""

import sys
from dataclasses import replace

import torch
from families import tiny_model
from tiny_axis import ROWS, axis_of

from personatlas.persona.sampling.sampler import pad
from personatlas.steering.hooks.account import HookDidNotFire
from personatlas.steering.hooks.steering import steer

HOW = {"cpu": {"backend": "aot_eager"}, "cuda": {"mode": "reduce-overhead"}}


@torch.no_grad()
def main(device: str) -> None:
    model = tiny_model("llama", device=device)
    cap = axis_of(tiny_model("llama")).quantile_cap((0, 1), 0.75)
    idle = replace(cap, floor=torch.full((2,), -torch.inf))
    rows, ids = torch.tensor([0, 0, 0, -1]), pad(ROWS, model.device)
    with torch._dynamo.config.patch(error_on_recompile=True), steer(model, [cap]) as held:
        held.begin(rows)
        eager, counts = model.hf(input_ids=ids, use_cache=False).logits, held.tally
        assert counts.fired[:, :3].any()
        assert not counts.seen[:, 3].any()
        compiled = torch.compile(model.hf, fullgraph=True, dynamic=False, **HOW[device])
        for fired in (counts.fired, counts.fired, torch.zeros_like(counts.fired)):
            if not fired.any():
                held.set([idle])
            held.begin(rows)
            found = compiled(input_ids=ids, use_cache=False).logits
            assert torch.equal(held.tally.fired, fired), (held.tally.fired, fired)
            assert torch.equal(held.tally.seen, counts.seen)
            if fired.any():
                torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-3)
    print("steered, compiled once, changed in place")
    torch._dynamo.reset()
    compiled = torch.compile(model.hf, fullgraph=True, dynamic=False, backend="eager")
    compiled(input_ids=ids, use_cache=False)
    with steer(model, [cap]) as held:
        held.begin(rows)
        compiled(input_ids=ids, use_cache=False)
        try:
            print(held.tally)
        except HookDidNotFire as silent:
            print(f"found out: {silent}")


if __name__ == "__main__":
    main(sys.argv[1])
