"""Steering a model: interventions as hooks on its blocks, with an account of what they did.

    with steer(model, [cap]) as steering:                        # one plan for all rows
        model.hf(input_ids=ids)
    steering.fired, steering.tally.fired                  # a share; (C, B) tokens changed, by layer and row

    with steer(model, [mild], [firm]) as steering:               # two plans; -1 is a row that is left alone
        steering.begin(torch.tensor([0, 1, -1]))                 # a batch, with an account of its own
        steering.describe(lengths=lengths, answer_from=starts)   # what is padding, where the answer begins
        model.hf(input_ids=ids)

    with steer(model, [cap]) as steering:
        answers = list(sampler.answers(prompts, steering.callback))   # each prompt names its plan
    steering.callback.tally                               # by prompt, checked against the tokens that were fed

Three classes speak to the same `SteeringHooks`: `Steering` for forwards that people call, `SteeringCallback`
for samplers, eager or captured as a CUDA graph, `SlotSteering` for a server whose rows come and go. `set`
gives the plans other numbers in place, which neither a captured graph nor a compiled forward notices. The
step is computed in fp32 whatever the model's dtype, and a token that it does not change is bitwise what it
was. The model is left as it was found, also after an exception. A hook that did not fire is an error when the
account is read.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from personatlas.persona.axis import require_origin
from personatlas.persona.errors import UserError
from personatlas.persona.interventions import Interventions
from personatlas.persona.models.hooks import residual
from personatlas.persona.models.load import Model
from personatlas.persona.sampling.sampler import Answer, Prompt, SamplerCallback
from personatlas.steering.hooks.account import (
    Account,
    Batch,
    HookDidNotFire,
    SteeringTally,
    StepResult,
    accumulate,
)
from personatlas.steering.hooks.step import TokenBounds, apply_table, gather_bounds
from personatlas.steering.hooks.tables import build_tables

ENDLESS = 2**31 - 1  # the length of a row without padding


class SteeringHooks:
    """Plans on a model's blocks, the rows of the next forward, and their account: what all users of steering
    share.
    """

    def __init__(self, model: Model, plans: Sequence[Interventions]) -> None:
        _require_fit(model, plans)
        self.model, self.plans = model, tuple(tuple(plan) for plan in plans)
        self.tables = build_tables(plans).to(model.device)
        _mark_static(self.tables.vectors, self.tables.bounds, self.tables.active)
        self.layers = self.tables.layers
        devices = [next(model.blocks[layer].parameters()).device for layer in self.layers]
        self._layer_tables = [self.tables.at(index).to(device) for index, device in enumerate(devices)]
        self.restricted_to: frozenset[int] | None = None  # indices of layers
        self.clear()

    def clear(self) -> None:
        """Forgets all rows and their account."""
        self.rows, self.forwards, self.fires = 0, 0, [0] * len(self.layers)
        self.discard_forward()

    def discard_forward(self) -> None:
        """A forward failed half-way: what its layers did is not counted."""
        self._results: list[tuple[int, StepResult]] = []
        self._gathered: tuple[Batch, int, TokenBounds] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The hooks are on the blocks inside."""
        blocks = self.model.blocks
        handles = [blocks[layer].register_forward_hook(self._hook(i)) for i, layer in enumerate(self.layers)]
        handles.append(self.model.base.register_forward_hook(self._end_forward))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def set(self, plans: Sequence[Interventions]) -> None:
        """Gives the plans other numbers, in place: as many plans, with as many steps at the same layers.

        Raises `ValueError` for plans of another form and `UserError` for those of another model.
        """
        _require_fit(self.model, plans)
        tables = build_tables(plans)
        self.tables.require_form(tables)
        self._gathered = None
        for index, table in enumerate(self._layer_tables):
            table.copy_(tables.at(index))
            self.tables.at(index).copy_(tables.at(index))
        self.plans = tuple(tuple(plan) for plan in plans)

    def resize(self, rows: int) -> None:
        """Makes room for `rows` rows of plan 0; the tensors are new unless there are as many rows already."""
        if rows == self.rows:
            for tensor in self.state():
                tensor.zero_()
        else:
            device = self.model.device
            self.rows = rows
            self.account = Account.empty(len(self.layers), rows, device)
            self._layer_accounts = [self.account.at(index) for index in range(len(self.layers))]
            self.row_plans, self.lengths, self.starts, self.opening = (
                torch.zeros(rows, dtype=torch.long, device=device) for _ in range(4)
            )
            _mark_static(*self.state())
        self.lengths.fill_(ENDLESS)
        self.next_forward(self.first_rows(rows), guess_opening=True)

    def state(self) -> list[Tensor]:
        """All that a forward changes, and what describes it."""
        described = [self.row_plans, self.lengths, self.starts, self.opening] if self.rows else []
        return [*self.account.columns, *described] if self.rows else []

    def first_rows(self, n: int) -> Batch:
        """Rows 0..n-1 as they are described, on the same memory."""
        return Batch(self.row_plans[:n], self.lengths[:n], self.starts[:n], self.opening[:n])

    def next_forward(self, batch: Batch, *, guess_opening: bool = False) -> None:
        """Describes the forward to come. With `guess_opening`, one of several tokens begins its sequences."""
        self.batch, self._guesses_opening = batch, guess_opening

    def plan_rows(self, plans: Sequence[int]) -> Int[Tensor, " n"]:
        """Rows of the tables for numbers of plans: -1, a row that is left alone, is the last."""
        wrong = [plan for plan in plans if not -1 <= plan < len(self.plans)]
        if wrong:
            raise ValueError(f"plan {wrong[0]} is not one of the {len(self.plans)}, nor -1")
        rows = [plan if plan >= 0 else len(self.plans) for plan in plans]
        return torch.tensor(rows, dtype=torch.long, device=self.model.device)

    def read_account(self, rows: Tensor) -> Float[Tensor, "C 4 n"]:
        """Account columns of some rows, fp64, on the model's device."""
        index = rows.to(self.model.device)
        return torch.stack([column.index_select(1, index).double() for column in self.account.columns], dim=1)

    def _hook(self, index: int) -> Callable[[nn.Module, Any, Any], Any]:
        def step(_module: nn.Module, _args: Any, output: Any) -> Any:
            if self.restricted_to is not None and index not in self.restricted_to:
                self.fires[index] += 1
                return None
            h = residual(output)
            if torch.compiler.is_compiling():
                # from the tensors of all layers, since each one that is used is checked every time
                table, account, tokens = self.tables.at(index).to(h.device), self.account.at(index), None
            else:
                self._count(index, h)
                table, account = self._layer_tables[index], self._layer_accounts[index]
                tokens = self._token_bounds(index, h)
            moved, result = apply_table(h, table, self._batch_for(h), account, tokens)
            if result is not None:
                self._results.append((index, result))
            return moved if isinstance(output, Tensor) else (moved, *output[1:])

        return step

    def _count(self, index: int, h: Tensor) -> None:
        """What only an eager forward does: counts the call, and makes room for its rows if nobody has."""
        if not self.rows and len(self.plans) > 1:
            raise ValueError(
                f"which of the {len(self.plans)} plans does each row follow? begin(plans) says so"
            )
        if not self.rows:
            self.resize(len(h))
        if len(self.batch.plans) != len(h):
            raise ValueError(
                f"{len(h)} rows in a batch that began with {self.rows}: call begin() for another batch"
            )
        self.fires[index] += 1
        if self._layer_tables[index].vectors.device != h.device:  # weights are elsewhere until they are used
            self._layer_tables[index] = self.tables.at(index).to(h.device)

    def _token_bounds(self, index: int, h: Tensor) -> TokenBounds | None:
        """One layer's bounds in this forward, gathered for all layers once; None on a GPU, whose kernel does
        that.
        """
        if h.is_cuda or self.tables.vectors.device != h.device:
            return None
        batch, length = self._batch_for(h), h.shape[1]
        if self._gathered is None or self._gathered[0] is not batch or self._gathered[1] != length:
            self._gathered = (batch, length, gather_bounds(self.tables, batch, length))
        return self._gathered[2].at(index)

    def _batch_for(self, h: Tensor) -> Batch:
        batch = self.batch if self.batch.plans.device == h.device else self.batch.to(h.device)
        if self._guesses_opening and h.shape[1] > 1:
            return replace(batch, opening=torch.ones_like(batch.plans))
        return batch

    def _end_forward(self, *_: Any) -> None:
        """The base model is through: adds up what its layers did."""
        if not torch.compiler.is_compiling():
            self.forwards += 1
            self._gathered = None  # what describes the rows may change in place before the next forward
        if self._results:
            results, self._results = self._results, []
            accumulate(self.account, self.batch.slots, results)


class Steering:
    """What `steer` gives: plans that are on. Unless told otherwise all rows follow plan 0 and all tokens are
    an answer's.
    """

    def __init__(self, hooks: SteeringHooks) -> None:
        self.hooks, self.layers = hooks, hooks.layers
        self.callback = SteeringCallback(hooks)

    def begin(self, plans: Int[Tensor, " B"] | None = None) -> None:
        """Starts a batch with an account of its own; `plans` is the plan that each row follows, -1 for
        none.
        """
        self.hooks.clear()
        if plans is not None:
            if plans.is_floating_point():
                raise ValueError(f"plans are whole numbers, not {plans.dtype}")
            self.hooks.resize(len(plans))
            self.hooks.row_plans.copy_(self.hooks.plan_rows(plans.tolist()))

    def describe(
        self,
        lengths: Int[Tensor, " B"] | None = None,
        answer_from: Int[Tensor, " B"] | None = None,
        opening: bool | None = None,
    ) -> None:
        """Describes the columns of the next forwards.

        `lengths` are each row's real tokens (padding on the right is ignored), `answer_from` the column at
        which its answer begins (0 where it is not given: all are answer tokens, as when decoding), `opening`
        whether sequences begin with the first column (None: in forwards of several tokens).
        """
        hooks, rows = self.hooks, lengths if lengths is not None else answer_from
        if rows is not None and not hooks.rows:
            hooks.resize(len(rows))
        if not hooks.rows:
            raise ValueError("how many rows? begin() a batch first, or give lengths")
        hooks.lengths.copy_(lengths if lengths is not None else hooks.lengths.new_full((), ENDLESS))
        hooks.starts.copy_(answer_from if answer_from is not None else hooks.starts.new_zeros(()))
        hooks.opening.fill_(bool(opening))
        hooks.next_forward(hooks.first_rows(hooks.rows), guess_opening=opening is None)

    def set(self, *plans: Interventions) -> None:
        """Gives the plans other numbers in place, see `SteeringHooks.set`."""
        self.hooks.set(plans)

    @property
    def tally(self) -> SteeringTally:
        """The account of this batch. Raises `HookDidNotFire` when a layer's hook did not fire in every
        forward.
        """
        hooks = self.hooks
        fired = [count == hooks.forwards for count in hooks.fires]
        if not hooks.forwards:  # compiled: only the account itself can say
            fired = hooks.account.seen.any(1).tolist() if hooks.rows else [False] * len(hooks.layers)
        silent = [layer for layer, ok in zip(hooks.layers, fired, strict=True) if not ok]
        if silent:
            raise HookDidNotFire(f"the hooks of layers {silent} did not fire: nothing was steered")
        return SteeringTally.from_columns(hooks.layers, hooks.read_account(torch.arange(hooks.rows)).cpu())

    @property
    def fired(self) -> float:
        """Share of this batch's tokens times layers that were changed. Raises like `tally`."""
        return self.tally.share


class SteeringCallback(SamplerCallback):
    """Steering that follows a sampler: every prompt names its plan, and the account is kept by prompt."""

    def __init__(self, hooks: SteeringHooks) -> None:
        self.hooks = hooks
        self._finished: list[tuple[list[int], list[tuple[int, ...]], list[int], Tensor]] = []

    def start(self, prompts: Sequence[Prompt]) -> None:
        """A chunk begins, and its account."""
        self._finished = []

    def resize(self, slots: int) -> None:
        """There are `slots` rows from now on."""
        self.hooks.resize(slots)

    def assign_slots(self, slots: Sequence[int], prompts: Sequence[Prompt]) -> None:
        """These prompts take these slots."""
        index = torch.tensor(list(slots), device=self.hooks.row_plans.device)
        self.hooks.row_plans[index] = self.hooks.plan_rows([prompt.plan for prompt in prompts])
        for column in self.hooks.account.columns:
            column[:, index] = 0

    def before_prefill(self, slots: Tensor, lengths: Tensor, opening: bool = True) -> None:
        """The next forward reads prompts."""
        ones = torch.ones_like(lengths)
        plans = self.hooks.row_plans[slots]
        self.hooks.next_forward(Batch(plans, lengths, ones * ENDLESS, ones * opening, slots))

    def before_decode(self, running: Tensor, first: Tensor, opening: Tensor) -> None:
        """The next forward feeds one token to each of the first slots."""
        n = len(running)
        self.hooks.lengths[:n].copy_(running)
        self.hooks.starts[:n].copy_(first)
        self.hooks.opening[:n].copy_(opening)
        self.hooks.next_forward(self.hooks.first_rows(n))

    def before_reread(self, lengths: Tensor, starts: Tensor) -> None:
        """The next forward reads everything once more, so the account begins anew."""
        for column in self.hooks.account.columns:
            column.zero_()
        plans = self.hooks.row_plans[: len(lengths)]
        self.hooks.next_forward(Batch(plans, lengths, starts, torch.ones_like(lengths)))

    def move(self, source: int, target: int) -> None:
        """The row in slot `source` goes on in slot `target`."""
        self.hooks.row_plans[target] = self.hooks.row_plans[source]
        for column in self.hooks.account.columns:
            column[:, target] = column[:, source]

    def finish(self, slots: Sequence[int], prompts: Sequence[Prompt], answers: Sequence[Answer]) -> None:
        """Keeps the account of answered rows, with the tokens that were fed: the last sampled one never
        is.
        """
        if not answers:
            return
        indices = [answer.index for answer in answers]
        fed: list[tuple[int, ...]] = [  # by side, as in the tables
            (len(prompts[answer.index].ids) - 1, len(answer.ids) - (answer.stopped == "length"), 1, 0)
            for answer in answers
        ]
        plans = [prompts[index].plan for index in indices]
        self._finished.append((indices, fed, plans, self.hooks.read_account(torch.tensor(list(slots)))))

    def state(self) -> list[Tensor]:
        """All that a forward changes, and what describes it."""
        return self.hooks.state()

    @property
    def tally(self) -> SteeringTally:
        """The account of the sampler's chunk, in the order of its prompts.

        Raises `HookDidNotFire` when a layer's hook saw other tokens than were fed, or no prompt was answered.
        """
        if not self._finished:
            raise HookDidNotFire("no prompt was answered with this callback: nothing was steered")
        indices, fed, plans, columns = zip(*self._finished, strict=True)
        order = torch.tensor([index for chunk in indices for index in chunk]).argsort()
        tokens = torch.tensor([row for chunk in fed for row in chunk])  # (N, 4)
        rows = self.hooks.plan_rows([plan for chunk in plans for plan in chunk]).cpu()
        account = torch.cat([chunk.cpu() for chunk in columns], dim=2)
        expected = (self.hooks.tables.active.cpu()[:, rows] * tokens).sum(2)  # (C, N)
        for layer, own, seen in zip(self.hooks.layers, expected, account[:, 0].long(), strict=True):
            if not torch.equal(own, seen):
                _raise_unsteered(f"the steering at layer {layer}", seen, own, "tokens")
        return SteeringTally.from_columns(self.hooks.layers, account[:, :, order])


class SlotSteering(SteeringCallback):
    """Steering for a server: rows come and go one by one, and each is checked when it ends."""

    def restrict_layers(self, layers: Collection[int] | None) -> None:
        """Acts at these layers alone in the forwards to come, None: at all."""
        index = self.hooks.layers.index
        self.hooks.restricted_to = None if layers is None else frozenset(map(index, layers))

    def fired_counts(self, slots: int) -> Int[Tensor, " n"]:
        """Tokens times layers changed so far in slots 0..n-1."""
        return self.hooks.account.fired[:, :slots].sum(0)

    def require_seen(self, slot: int, plan: int, fed: tuple[int, int, int]) -> None:
        """Raises `HookDidNotFire` unless the row in a slot was seen at every layer as its plan says.

        `fed` are tokens of its prompt, of its answer, and whether its first one was among them.
        """
        if plan >= 0:
            expected = (self.hooks.tables.active[:, plan].cpu() * torch.tensor([*fed, 0])).sum(1)
            seen = self.hooks.account.seen[:, slot].cpu()
            if not torch.equal(expected, seen):
                _raise_unsteered("the steering", seen, expected, "tokens times layers")


@contextmanager
def steer(model: Model, *plans: Interventions) -> Iterator[Steering]:
    """Plans on the model's blocks inside; nothing of them outside. A plan's interventions act in the order
    given.

    Enter it before compiling: a forward that was compiled without hooks runs without them, and `tally` then
    says so. Raises `UserError` for an intervention of another model or width, or at a layer that the model
    does not have.
    """
    hooks = SteeringHooks(model, plans)
    with hooks.attached():
        yield Steering(hooks)


def _mark_static(*tensors: Tensor) -> None:
    """Tells `torch.compile` that these keep their place in memory, so that its CUDA graphs write to them and
    copy none.
    """
    if tensors[0].is_cuda:
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor, guard=False)


def _raise_unsteered(name: str, seen: Tensor, expected: Tensor, unit: str) -> None:
    counts = f"{int(seen.sum())} of {int(expected.sum())} {unit}"
    raise HookDidNotFire(f"{name} saw {counts}: what was generated is not steered as asked")


def _require_fit(model: Model, plans: Sequence[Interventions]) -> None:
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
