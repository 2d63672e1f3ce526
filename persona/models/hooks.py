"""Reading the residual stream: one forward hook a block, there for the length of a context.

with capture(model, [12, 17]) as residuals:
    model.base(input_ids=ids, use_cache=False)
residuals[12]                                              # (B, T, D), the output of block 12

def project(layer, h):
    return (h.float() @ axis.at(layer).to(h.device)).cpu()
with capture(model, axis.layers, project) as projections:  # nothing wider than (B, T) outlives its block
    ...
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from torch import Tensor, nn

if TYPE_CHECKING:
    from personatlas.persona.models.load import Model


BlockOutput = Tensor | tuple[Any, ...]


def residual(output: BlockOutput) -> Tensor:
    """The residual stream (B, T, D) in a block's output: older `transformers` wrap it in a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class Captured(dict[int, Tensor]):
    """What was captured last at each layer; `order` has every layer as often as its block ran, in that order."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[int] = []


@contextmanager
def capture(
    model: "Model",
    layers: Iterable[int],
    transform: Callable[[int, Tensor], Tensor] = lambda layer, h: h,
    *,
    before_others: bool = False,
) -> Iterator[Captured]:
    """Captures the output of those blocks inside; the model is left as it was found, also after an exception.

    `transform` is given the layer and the residual stream (B, T, D) and says what is kept of it. Hooks fire
    in the order of their registration; with `before_others` these fire before those that are there already,
    and see the stream before an intervention's step at the layer.
    """
    captured = Captured()

    def hook(layer: int) -> Callable[[nn.Module, Any, Any], None]:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            captured.order.append(layer)
            captured[layer] = transform(layer, residual(output))

        return keep

    handles = [
        model.blocks[layer].register_forward_hook(hook(layer), prepend=before_others) for layer in layers
    ]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """A forward has come as far as it was to go."""


def run_to(
    model: "Model", ids: Tensor, layer: int, *, resume: int | None = None, output: BlockOutput | None = None
) -> BlockOutput:
    """Returns what block `layer` gives for ids (B, T), and runs no block after it.

    With `resume`, blocks up to that one are not run: `output`, which `run_to` returned for it, is what they
    give. So a text that is read layer by layer costs one forward, not one a layer. Hooks on the blocks before
    `layer` fire, also on those that are not run.
    """
    reached: list[BlockOutput] = []

    def stop(_module: nn.Module, _args: Any, own: BlockOutput) -> None:
        reached.append(own)
        raise _Reached

    skipped = [] if resume is None else model.blocks[: resume + 1]
    with ExitStack() as stack:
        for block in skipped:
            stack.enter_context(patch.object(block, "forward", lambda *_args, **_kwargs: output))
        stack.callback(model.blocks[layer].register_forward_hook(stop, prepend=True).remove)
        with suppress(_Reached):
            model.base(input_ids=ids, use_cache=False)
    return reached[0]


@contextmanager
def without_hooks(model: "Model") -> Iterator[None]:
    """The forward hooks on the blocks and the base model are off inside: for forwards that check an engine."""
    modules = (*model.blocks, model.base)
    hooks = [dict(module._forward_hooks) for module in modules]
    for module in modules:
        module._forward_hooks.clear()
    try:
        yield
    finally:
        for module, own in zip(modules, hooks, strict=True):
            module._forward_hooks.update(own)
