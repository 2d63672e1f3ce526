"""What capping costs while decoding: the same engine without and with a cap, in turn, in one run.

    python benchmarks/capping.py --axis smollm2-135m --layers 16-23 --batches 1,64,512

Three engines: transformers' static cache under torch.compile (fullgraph, CUDA graphs), with its guards checked before each
step and, as servers that compile do, without; this project's captured sampler; and plain eager decoding with an ordinary
forward hook in place of ours. Prints tokens/s of both arms and the median of their
paired ratios, and checks that the capped arm saw every token. On a CPU only the sampler and the plain way are run.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import DynamicCache, StaticCache

from personatlas.persona.axis import load_axis
from personatlas.persona.caps import parse_layers
from personatlas.persona.interventions import Cap
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.runs import resolve_axis
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Prompt, Sampling
from personatlas.steering.hooks.steering import steer

PROMPT = 32  # tokens


def seconds(work: Callable[[], object]) -> float:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_turn(arms: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    for arm in arms.values():
        arm()
        arm()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats):
        for name in list(arms) if repeat % 2 == 0 else list(arms)[::-1]:
            times[name].append(seconds(arms[name]))
    return times


def say(engine: str, batch: int, tokens: int, times: dict[str, list[float]]) -> None:
    plain, capped = times.values()
    ratio = statistics.median(b / a for a, b in zip(plain, capped, strict=True))
    rates = [tokens / statistics.median(own) for own in (plain, capped)]
    print(
        f"{engine:<9} batch {batch:>4}: as it is {rates[0]:>9,.0f} tokens/s, capped {rates[1]:>9,.0f}, time x{ratio:.4f} ({ratio - 1:+.2%})",
        flush=True,
    )


def plain_step(model, ids, positions, cache):
    return (
        model(input_ids=ids, position_ids=positions, past_key_values=cache)
        .logits[:, -1]
        .argmax(-1, keepdim=True)
    )


def capped_step(model, ids, positions, cache):
    return (
        model(input_ids=ids, position_ids=positions, past_key_values=cache)
        .logits[:, -1]
        .argmax(-1, keepdim=True)
    )


def decode(model: Model, step: Callable, cache: StaticCache, token: torch.Tensor, steps: int) -> None:
    for i in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        at = torch.full((len(token), 1), PROMPT + i, device=model.device)
        token = step(model.hf, token, at, cache).clone()


@torch.no_grad()
def compiled(model: Model, cap: Cap, batch: int, steps: int, repeats: int) -> None:
    """Two functions, so that neither arm's compiled code can serve the other; hooks are there when the capped one is traced."""
    ids = torch.full((batch, PROMPT), 100, device=model.device)
    length = PROMPT + steps + 8

    def arm(step: Callable) -> Callable[[], None]:
        cache = StaticCache(config=model.hf.config, max_cache_len=length)
        run = torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")

        def work() -> None:
            cache.reset()
            first = model.hf(input_ids=ids, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
            decode(model, run, cache, first, steps)

        return work

    decode_plain = arm(plain_step)

    def plain() -> None:
        with held_off(model):
            decode_plain()

    plain()
    with steer(model, [cap]) as held:
        capped = arm(capped_step)

        def seen() -> list[int]:
            held.begin(torch.zeros(batch, dtype=torch.long))
            capped()
            return held.hooks.account.seen.unique().tolist()

        capped()
        assert seen() == [PROMPT + steps - 1], "the compiled engine's account has not seen what was fed"
        arms = {"plain": plain, "capped": capped}
        times = in_turn(arms, repeats)
        with torch.compiler.set_stance(skip_guard_eval_unsafe=True):
            unguarded = in_turn(arms, repeats)
        assert seen() == [PROMPT + steps - 1], "the compiled engine's account has not seen what was fed"
        held.begin(torch.zeros(batch, dtype=torch.long))
        plain()
        assert not held.hooks.account.seen.any(), "the plain arm was steered"
    say("compiled", batch, batch * steps, times)
    say("unguarded", batch, batch * steps, unguarded)
    torch.compiler.reset()


def sampled(model: Model, cap: Cap, batch: int, steps: int, repeats: int) -> None:
    ids = tuple(range(100, 100 + PROMPT))
    prompts = [Prompt(ids, seed) for seed in range(batch)]
    engines = [fastest_sampler(model, frozenset(), Sampling(max_new_tokens=steps), PROMPT) for _ in range(2)]
    with steer(model, [cap]) as held:
        list(engines[1].answers(prompts, held.callback))
        print(f"          fired on {held.callback.tally.share:.0%} of tokens times layers", flush=True)

        def capped() -> None:
            list(engines[1].answers(prompts, held.callback))

        if model.device.type == "cuda":
            with held_off(model):
                list(engines[0].answers(prompts))  # captured without hooks
        times = in_turn({"plain": lambda: without(model, engines[0], prompts), "capped": capped}, repeats)
        assert held.callback.tally.seen.sum() == len(held.layers) * batch * (
            PROMPT + steps - 2
        )  # but the first and the last
    say("sampler", batch, batch * steps, times)


class held_off:
    """No hooks on the blocks inside."""

    def __init__(self, model: Model) -> None:
        self.blocks = model.blocks

    def __enter__(self) -> None:
        self.kept = [dict(block._forward_hooks) for block in self.blocks]
        for block in self.blocks:
            block._forward_hooks.clear()

    def __exit__(self, *_: object) -> None:
        for block, hooks in zip(self.blocks, self.kept, strict=True):
            block._forward_hooks.update(hooks)


def without(model: Model, engine, prompts: list[Prompt]) -> None:
    with held_off(model):
        list(engine.answers(prompts))


@torch.no_grad()
def hooked(model: Model, cap: Cap, batch: int, steps: int, repeats: int) -> None:
    """What many projects do: eager decoding, and a hook that applies the formula in several torch operations."""
    ids = torch.full((batch, PROMPT), 100, device=model.device)

    def decode() -> None:
        cache = DynamicCache(config=model.hf.config)
        token = ids
        for _ in range(steps):
            logits = model.hf(input_ids=token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)

    def hook_for(vector: torch.Tensor, floor: torch.Tensor) -> Callable:
        def hook(_module, _args, output):
            h = output if isinstance(output, torch.Tensor) else output[0]
            projection = h.float() @ vector
            moved = (h.float() + (floor - projection).clamp(min=0)[..., None] * vector).to(h.dtype)
            return moved if isinstance(output, torch.Tensor) else (moved, *output[1:])

        return hook

    def capped() -> None:
        handles = [
            model.blocks[layer].register_forward_hook(
                hook_for(cap.vectors[row].to(model.device), cap.floor[row].to(model.device))
            )
            for row, layer in enumerate(cap.layers)
        ]
        decode()
        for handle in handles:
            handle.remove()

    say("hooks", batch, batch * steps, in_turn({"plain": decode, "capped": capped}, repeats))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--axis", default="smollm2-135m")
    parser.add_argument("--layers", default="16-23")
    parser.add_argument("--batches", default="1,64,512")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--engines", default="compiled,sampler,hooks")
    given = parser.parse_args()
    model = load_model(given.model)
    cap = load_axis(resolve_axis(given.axis)).quantile_cap(parse_layers(given.layers), 0.5)
    print(f"{model.id} in {model.dtype}, {len(cap.layers)} capped layers, {given.steps} steps", flush=True)
    engines = {"compiled": compiled, "sampler": sampled, "hooks": hooked}
    for name in given.engines.split(","):
        if name == "compiled" and model.device.type != "cuda":
            continue
        for batch in map(int, given.batches.split(",")):
            repeats = given.repeats if name != "hooks" else 3
            engines[name](model, cap, batch, given.steps, repeats)


if __name__ == "__main__":
    main()
