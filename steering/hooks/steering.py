"""Steering a model: interventions as hooks on its blocks for the length of a context, with an account of what they did.

    with steered(model, [cap]) as held:                     # one plan for all rows
        model.hf(input_ids=ids)
    held.tally.fired                                          # (C, B) tokens that were changed, by layer and row

    with steered(model, [mild], [firm]) as held:            # two plans; -1 is a row that is left alone
        held.begin(torch.tensor([0, 1, -1]))                  # a batch, with an account of its own
        held.describe(lengths=lengths, answer_from=starts)    # what is padding, what is the answer, that it begins here
        model.hf(input_ids=ids)

The same object follows a `Sampler` (`sampler.answers(prompts, held)`), eager or captured as a CUDA graph: each prompt names
its plan, and the account is kept by prompt and checked against the tokens that were fed. `set` gives the plans other numbers
in place, which neither a captured graph nor a compiled forward notices. The step is computed in fp32 whatever the model's
dtype, and a token that it does not change is bitwise what it was. The model is left as it was found, also after an
exception. A hook that did not fire is an error when the account is read.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from personatlas.persona.axis import require_origin
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Intervention
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.sampler import Answer, Prompt, SamplerCallback
from personatlas.steering.hooks.step import ENDLESS, Account, Batch, Done, Looked, act, book, look
from personatlas.steering.hooks.tables import tables_of

Interventions = Sequence[Intervention]


class HookDidNotFire(RuntimeError):
    """A hook did not fire in a forward: something goes around the blocks, and what was made is not steered."""


@dataclass(frozen=True)
class Tally:
    """What was done, by layer and row of the batch (or prompt of a sampler's chunk). C steered layers, B rows.

    `seen` tokens were in a phase of the row's plan at that layer, `fired` were changed; `total` and `most` are the sum and the
    largest size of the corrections (residual units). A layer with several steps counts a token once, with the whole
    correction's length.
    """

    layers: tuple[int, ...]
    seen: Int[Tensor, "C B"]
    fired: Int[Tensor, "C B"]
    total: Float[Tensor, "C B"]
    most: Float[Tensor, "C B"]

    @property
    def share(self) -> float:
        """Fired tokens among those seen, over all layers and rows; NaN when none was seen."""
        seen = int(self.seen.sum())
        return int(self.fired.sum()) / seen if seen else float("nan")

    @property
    def mean(self) -> float:
        """Mean size of the correction of a seen token at a layer (0 where it did not fire), in residual units."""
        seen = int(self.seen.sum())
        return float(self.total.sum()) / seen if seen else float("nan")

    def rows(self, chosen: Sequence[int]) -> "Tally":
        """The same of some rows only."""
        at = torch.tensor(list(chosen), dtype=torch.long)
        return Tally(self.layers, *(value[:, at] for value in (self.seen, self.fired, self.total, self.most)))


class Steering(SamplerCallback):
    """Plans that are on. Without `begin` and `describe` all rows follow plan 0 and all tokens are an answer's."""

    def __init__(self, model: Model, plans: Sequence[Interventions]) -> None:
        _require(model, plans)
        self.model, self.plans = model, tuple(tuple(plan) for plan in plans)
        self._tables = tables_of(plans).to(model.device)
        _stay(self._tables.vectors, self._tables.bounds, self._tables.active)
        self.layers = self._tables.layers
        devices = [next(model.blocks[layer].parameters()).device for layer in self.layers]
        self._own = [
            self._tables.at(place).to(device) for place, device in enumerate(devices)
        ]  # where each block is
        self._only: frozenset[int] | None = None
        self._looked: tuple[Batch, int, Looked] | None = None
        self.begin()

    @contextmanager
    def on(self) -> Iterator[None]:
        """The hooks are on the blocks inside."""
        blocks = self.model.blocks
        handles = [
            blocks[layer].register_forward_hook(self._hook(place)) for place, layer in enumerate(self.layers)
        ]
        handles.append(self.model.base.register_forward_hook(self._forwarded))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """A forward failed half-way: what its layers did is of no account."""
        self._done.clear()
        self._looked = None

    def restrict_layers(self, layers: Collection[int] | None) -> None:
        """Act at these layers alone in the forwards to come, None: at all. For an engine that knows which plans its rows follow."""
        self._only = None if layers is None else frozenset(self.layers.index(layer) for layer in layers)

    def set(self, *plans: Interventions) -> None:
        """Give the plans other numbers, in place: as many plans, with as many steps at the same layers.

        Raises ValueError for plans of another form and `UserError` for those of another model.
        """
        _require(self.model, plans)
        tables = tables_of(plans)
        self._tables.require_form(tables)
        self._looked = None
        for place, own in enumerate(self._own):
            own.take(tables.at(place))
            self._tables.at(place).take(tables.at(place))
        self.plans = tuple(tuple(plan) for plan in plans)

    def begin(self, plans: Int[Tensor, " B"] | None = None) -> None:
        """Start a batch with an account of its own; `plans` is the plan that each row follows, -1 for none."""
        self._rows = 0
        self._forwards, self._fires = 0, [0] * len(self.layers)
        self._done: list[tuple[int, Done]] = []
        self._left: list[tuple[list[int], list[tuple[int, ...]], list[int], Tensor]] = []
        if plans is not None:
            if plans.is_floating_point():
                raise ValueError(f"plans are whole numbers, not {plans.dtype}")
            self.resize(len(plans))
            self._plans.copy_(self._numbered(plans.tolist()))

    def describe(
        self,
        lengths: Int[Tensor, " B"] | None = None,
        answer_from: Int[Tensor, " B"] | None = None,
        opening: bool | None = None,
    ) -> None:
        """What the columns of the next forwards are: real tokens of each row (padding on the right is ignored), the column at
        which its answer begins (0, or nothing, where all are answer tokens, as when decoding), and whether sequences begin
        with the first column (None: in forwards of several tokens)."""
        given = lengths if lengths is not None else answer_from
        if given is not None and not self._rows:
            self.resize(len(given))
        if not self._rows:
            raise ValueError("how many rows? begin() a batch first, or give lengths")
        self._lengths.copy_(lengths if lengths is not None else self._lengths.new_full((), ENDLESS))
        self._starts.copy_(answer_from if answer_from is not None else self._starts.new_zeros(()))
        self._unsaid = opening is None
        self._opening.fill_(bool(opening))
        self._now = self._batch(len(self._plans))

    @property
    def tally(self) -> Tally:
        """The account of this batch, or of the sampler's chunk, in the order of its prompts.

        Raises `HookDidNotFire` when a layer's hook did not fire in every forward, or saw other tokens than were fed.
        """
        if self._left:
            return self._tally_of_answers()
        fired = [count == self._forwards for count in self._fires]
        if not self._forwards:  # compiled: only the account itself can say
            fired = self._account.seen.any(1).tolist() if self._rows else [False] * len(self.layers)
        silent = [layer for layer, own in zip(self.layers, fired, strict=True) if not own]
        if silent:
            raise HookDidNotFire(f"the hooks of layers {silent} did not fire: nothing was steered")
        return _tally(self.layers, self._columns(torch.arange(self._rows)).cpu())

    def resize(self, slots: int) -> None:
        """Make room for so many rows, all of plan 0; the tensors are new unless there are as many already."""
        if slots == self._rows:
            for tensor in self.state():
                tensor.zero_()
        else:
            device = self.model.device
            self._rows = slots
            self._account = Account.empty(len(self.layers), slots, device)
            self._accounts = [self._account.at(place) for place in range(len(self.layers))]
            self._plans, self._lengths, self._starts, self._opening = (
                torch.zeros(slots, dtype=torch.long, device=device) for _ in range(4)
            )
            _stay(*self.state())
        self._lengths.fill_(ENDLESS)
        self._unsaid, self._now = True, self._batch(slots)

    def start(self, prompts: Sequence[Prompt]) -> None:
        """A sampler's chunk: its account begins."""
        self._left = []

    def assign_slots(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """These prompts take these slots."""
        at = torch.tensor(list(slots), device=self._plans.device)
        self._plans[at] = self._numbered([prompt.plan for prompt in prompts])
        for column in self._account.columns:
            column[:, at] = 0

    def before_prefill(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        """The next forward reads prompts."""
        ones = torch.ones_like(lengths)
        self._unsaid, self._now = (
            False,
            Batch(self._plans[slots], lengths, ones * ENDLESS, ones * opening, slots),
        )

    def before_decode(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        """The next forward feeds one token to each of the first slots."""
        n = len(running)
        self._lengths[:n].copy_(running)
        self._starts[:n].copy_(first)
        self._opening[:n].copy_(opening)
        self._unsaid, self._now = False, self._batch(n)

    def before_reread(self, lengths: Tensor, starts: Tensor) -> None:
        """The next forward reads everything once more, so the account begins anew."""
        for column in self._account.columns:
            column.zero_()
        ones = torch.ones_like(lengths)
        self._unsaid, self._now = False, Batch(self._plans[: len(lengths)], lengths, starts, ones)

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes on in slot `target`."""
        self._plans[target] = self._plans[source]
        for column in self._account.columns:
            column[:, target] = column[:, source]

    def finish(self, slots: Sequence[int], prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Keep the account of answered rows, with the prompt and answer tokens that were fed: the last sampled one never is."""
        if answers:
            indices = [answer.index for answer in answers]
            fed: list[tuple[int, ...]] = [
                (len(prompts[answer.index].ids) - 1, len(answer.ids) - (answer.stopped == "length"), 1, 0)
                for answer in answers
            ]
            plans = [prompts[index].plan for index in indices]
            self._left.append((indices, fed, plans, self._columns(torch.tensor(list(slots)))))

    def require_seen(self, slot: int, plan: int, fed: tuple[int, int, int]) -> None:
        """`HookDidNotFire` unless the row in a slot was met at every layer as its plan says: `fed` are tokens of its prompt, of its answer,
        and whether its first one was among them."""
        if plan >= 0:
            weights = torch.tensor([*fed, 0])
            expected = (self._tables.active[:, plan].cpu() * weights).sum(1)
            if not torch.equal(expected, self._account.seen[:, slot].cpu()):
                found = (
                    f"{int(self._account.seen[:, slot].sum())} of {int(expected.sum())} tokens times layers"
                )
                raise HookDidNotFire(f"the steering saw {found}: what was generated is not steered as asked")

    def fired_of(self, slots: int) -> Int[Tensor, " n"]:
        """Tokens times layers changed so far in slots 0..n-1."""
        return self._account.fired[:, :slots].sum(0)

    def state(self) -> list[Tensor]:
        """All that a forward changes, and what describes it."""
        if not self._rows:
            return []
        return [*self._account.columns, self._plans, self._lengths, self._starts, self._opening]

    def _batch(self, n: int) -> Batch:
        return Batch(self._plans[:n], self._lengths[:n], self._starts[:n], self._opening[:n])

    def _columns(self, slots: Tensor) -> Float[Tensor, "C 4 n"]:
        """Accounts of some slots, fp64, on the model's device."""
        at = slots.to(self.model.device)
        return torch.stack([column.index_select(1, at).double() for column in self._account.columns], dim=1)

    def _numbered(self, plans: list[int]) -> Int[Tensor, " n"]:
        """Rows of the tables: -1, a row that is left alone, is the last."""
        wrong = [plan for plan in plans if not -1 <= plan < len(self.plans)]
        if wrong:
            raise ValueError(f"plan {wrong[0]} is not one of the {len(self.plans)}, nor -1")
        numbers = [plan if plan >= 0 else len(self.plans) for plan in plans]
        return torch.tensor(numbers, dtype=torch.long, device=self.model.device)

    def _tally_of_answers(self) -> Tally:
        indices = [index for part in self._left for index in part[0]]
        fed = torch.tensor(
            [one for part in self._left for one in part[1]]
        )  # (N, 4), by side as in the tables
        plans = self._numbered([plan for part in self._left for plan in part[2]]).cpu()
        columns = torch.cat([part[3].cpu() for part in self._left], dim=2)
        tables = self._tables.active.cpu()
        for row, layer in enumerate(self.layers):
            active = tables[row, plans]  # (N, 4)
            expected = (active * fed).sum(1)
            if not torch.equal(expected, columns[row, 0].long()):
                found = f"{int(columns[row, 0].sum())} of {int(expected.sum())} tokens"
                raise HookDidNotFire(
                    f"the steering at layer {layer} saw {found}: what was generated is not steered as asked"
                )
        return _tally(self.layers, columns[:, :, torch.tensor(indices).argsort()])

    def _hook(self, place: int) -> Any:
        def step(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self._only is not None and place not in self._only:
                self._fires[place] += 1
                return None
            h = residual(output)
            if torch.compiler.is_compiling():
                # from the tensors of all layers, since each one that is used is checked every time
                table, account = self._tables.at(place).to(h.device), self._account.at(place)
                moved, done = act(h, table, self._batch_of(h), account)
            else:
                self._meet(place, h)
                looked = self._look(h, place)
                moved, done = act(h, self._own[place], self._batch_of(h), self._accounts[place], looked)
            if done is not None:
                self._done.append((place, done))
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return step

    def _look(self, h: Tensor, place: int) -> Looked | None:
        """What a layer does in this forward, looked up for all layers once; None on a GPU, whose kernel looks for itself."""
        if h.is_cuda or self._tables.vectors.device != h.device:
            return None
        batch, length = self._batch_of(h), h.shape[1]
        if self._looked is None or self._looked[0] is not batch or self._looked[1] != length:
            self._looked = (batch, length, look(self._tables, batch, length))
        return self._looked[2].at(place)

    def _batch_of(self, h: Tensor) -> Batch:
        now = self._now if self._now.plans.device == h.device else self._now.to(h.device)
        if self._unsaid and h.shape[1] > 1:
            return Batch(now.plans, now.lengths, now.starts, torch.ones_like(now.plans), now.slots)
        return now

    def _meet(self, place: int, h: Tensor) -> None:
        """What only an eager forward does: count the call, and make room for its rows if nobody has."""
        if not self._rows and len(self.plans) > 1:
            raise ValueError(
                f"which of the {len(self.plans)} plans does each row follow? begin(plans) says so"
            )
        if not self._rows:
            self.resize(len(h))
        if len(self._now.plans) != len(h):
            raise ValueError(
                f"{len(h)} rows in a batch that began with {self._rows}: call begin() for another batch"
            )
        self._fires[place] += 1
        if (
            self._own[place].vectors.device != h.device
        ):  # a block whose weights are elsewhere until they are used
            self._own[place] = self._tables.at(place).to(h.device)

    def _forwarded(self, *_: Any) -> None:
        """The base model is through: add up what its layers did."""
        if not torch.compiler.is_compiling():
            self._forwards += 1
            self._looked = None  # what describes the rows may change in place before the next forward
        if self._done:
            done, self._done = self._done, []
            book(self._account, self._now.slots, done)


@contextmanager
def steer(model: Model, *plans: Interventions) -> Iterator[Steering]:
    """Plans on the model's blocks inside; nothing of them outside. A plan's interventions act in the order given.

    Enter it before compiling: a forward that was compiled without hooks runs without them, and `tally` then says so.
    Raises `UserError` for an intervention of another model or width, or at a layer that the model does not have.
    """
    held = Steering(model, plans)
    with held.on():
        yield held


def _stay(*tensors: Tensor) -> None:
    """Tell `torch.compile` that these keep their place in memory, so that its CUDA graphs write to them and copy none."""
    if tensors[0].is_cuda:
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)


def _tally(layers: tuple[int, ...], columns: Float[Tensor, "C 4 N"]) -> Tally:
    seen, fired, total, most = columns.unbind(1)
    return Tally(layers, seen.long(), fired.long(), total.float(), most.float())


def _require(model: Model, plans: Sequence[Interventions]) -> None:
    interventions = [intervention for plan in plans for intervention in plan]
    if not any(intervention.layers for intervention in interventions):
        raise UserError("there is nothing to steer with: no intervention, or none with a layer")
    for intervention in interventions:
        outside = [layer for layer in intervention.layers if not 0 <= layer < model.n_layers]
        if outside:
            raise UserError(f"layer {outside[0]} is not in {model.id} (0..{model.n_layers - 1})")
        width = intervention.vectors.shape[1]
        if width != model.d_model:
            raise UserError(
                f"this intervention is {width} wide and {model.id} is {model.d_model}: another model's"
            )
        require_origin("intervention", intervention.model, model.describe())
