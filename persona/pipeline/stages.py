"""The long steps of a run: rollouts, then scores, then activations. Each resumes, and each can be shared by
ranks.

    plan = plan_rollouts(bank, model, Selection(n_roles=48), seed=0, chunk=64)
    log = RolloutLog(run.folder, world)
    make_rollouts(plan, log, model, sampler, range(len(plan.chunks)))
    activations = make_activations(run, model, log.select(plan.keys), world)

A step's work is cut into chunks that depend on the plan alone. Rollouts are cut after sorting by prompt
length; a chunk that was interrupted is sampled again whole, with what it already gave thrown away, so that a
resumed run gives the answers of an uninterrupted one bit for bit. Recording is cut by role, one part file a
chunk.
"""

import hashlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.activations import (
    ACTIVATIONS,
    Activations,
    cell_sums,
    join_activations,
    kept_layers,
    load_activations,
)
from personatlas.persona.pipeline.record import compiled, record, worth_compiling
from personatlas.persona.progress import Advance, progress, say
from personatlas.persona.roles.bank import Bank, RoleKind, role_kind
from personatlas.persona.rollout import Request, Rollout, Selection, read_rollouts, rollout_requests
from personatlas.persona.runs import RunFolder
from personatlas.persona.sampling.sampler import Prompt, Sampler

CPU_CHUNK, GPU_CHUNK = 64, 16384
PART_ROLLOUTS, PART_BYTES = 1024, 1 << 30
GATE_ROLES, GATE_QUESTIONS, GATE_FROM = 8, 2, 200


@dataclass(frozen=True)
class RolloutPlan:
    """Every rollout of a run, cut into chunks. `gate` is how many leading chunks (0 or 1) try a few roles."""

    chunks: tuple[tuple[Request, ...], ...]
    prompt_ids: dict[str, tuple[int, ...]]
    gate: int

    @property
    def keys(self) -> list[str]:
        """All keys of the plan."""
        return [request.key for chunk in self.chunks for request in chunk]


def plan_rollouts(bank: Bank, model: Model, selection: Selection, seed: int, chunk: int) -> RolloutPlan:
    """Cuts a selection into chunks: first a few roles that show whether the model plays roles, then all by
    length.

    Traits and controls have chunks of their own, after the roles': adding them to a run changes nothing of
    what is there.
    """
    requests = rollout_requests(bank, model.name, selection, seed)
    prompt_ids = {request.key: tuple(model.chat.prompt_ids(request.messages)) for request in requests}
    by_kind: dict[RoleKind, list[Request]] = {"role": [], "trait": [], "control": []}
    for request in requests:
        by_kind[role_kind(request.key)].append(request)
    of_roles = by_kind["role"]
    gate = _gate(of_roles) if len(of_roles) >= GATE_FROM else []
    in_gate = {request.key for request in gate}
    chunks = [tuple(gate)] if gate else []
    for part in ([r for r in of_roles if r.key not in in_gate], by_kind["trait"], by_kind["control"]):
        rest = sorted(part, key=lambda r: (len(prompt_ids[r.key]), r.key))
        chunks += [tuple(rest[i : i + chunk]) for i in range(0, len(rest), chunk)]
    return RolloutPlan(tuple(chunks), prompt_ids, int(bool(gate)))


def _gate(requests: Sequence[Request]) -> list[Request]:
    """The first prompt and questions of a few roles spread over the plan, the default left out."""
    roles = list(dict.fromkeys(request.parts.role for request in requests))[1:]
    selected = {roles[i * len(roles) // GATE_ROLES] for i in range(GATE_ROLES)} if roles else set()
    first = [
        request
        for request in requests
        if (parts := request.parts).role in selected and parts.prompt == parts.sample == 0
    ]
    questions = list(dict.fromkeys(request.parts.question for request in first))[:GATE_QUESTIONS]
    return [request for request in first if request.parts.question in questions]


class RolloutLog:
    """The rollouts of a run folder: parsed once, and kept up with what this process appends to its own log."""

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        name = "rollouts.jsonl" if world.size == 1 else f"rollouts.{world.rank:04d}.jsonl"
        self.path = folder / name
        self.reload(mend=world.size == 1)

    def reload(self, *, mend: bool = False) -> None:
        """Reads what is there again, which the logs of other processes need."""
        self.rollouts = {rollout.key: rollout for rollout in read_rollouts(self.folder, mend=mend)}

    def append(self, rollout: Rollout) -> None:
        """Adds one rollout."""
        append_lines(self.path, [rollout.to_json()], sync=False)
        self.rollouts[rollout.key] = rollout

    def merge(self) -> None:
        """Puts the ranks' logs into one, after all are done. A crash in between leaves equal lines twice:
        harmless.
        """
        self.world.barrier()
        shards = sorted(self.folder.glob("rollouts.*.jsonl"))
        if self.world.rank == 0 and shards:
            log = self.folder / "rollouts.jsonl"
            merged = {row["key"] for row in read_lines(log)}
            append_lines(log, [r.to_json() for r in read_rollouts(self.folder) if r.key not in merged])
            for shard in shards:
                shard.unlink()
        self.world.barrier()
        if self.world.size > 1:
            self.reload()

    def require_plan(self, plan: RolloutPlan) -> None:
        """`UserError` for a rollout of another prompt, or with another seed, than the plan has under its key."""
        for request in (request for chunk in plan.chunks for request in chunk):
            stored, prompt = self.rollouts.get(request.key), plan.prompt_ids[request.key]
            if stored is not None and (stored.messages, stored.prompt_ids, stored.seed) != (
                request.messages,
                prompt,
                request.seed,
            ):
                raise UserError(
                    f"{self.path}: {request.key} answers another prompt or has another seed than in this run: it is "
                    "of another run; delete the file"
                )

    def select(self, keys: Iterable[str]) -> list[Rollout]:
        """Those rollouts, sorted by key; `UserError` when some are missing."""
        keys = sorted(keys)
        missing = [key for key in keys if key not in self.rollouts]
        if missing:
            raise UserError(
                f"{self.folder} lacks {len(missing)} rollouts, such as {missing[0]}; run the rollout step again"
            )
        return [self.rollouts[key] for key in keys]


def make_rollouts(plan: RolloutPlan, log: RolloutLog, model: Model, sampler: Sampler, chunks: range) -> None:
    """Samples what is missing in this rank's share of those chunks and appends it to the log, answer by
    answer.
    """
    own = [plan.chunks[i] for i in chunks if log.world.owns(i)]
    done = {request.key for chunk in own for request in chunk if request.key in log.rollouts}
    quiet = log.world.rank > 0
    with progress("rollouts", sum(map(len, own)), "tokens", done=len(done), quiet=quiet) as advance:
        for chunk in own:
            if all(request.key in done for request in chunk):
                continue
            prompts = [Prompt(plan.prompt_ids[request.key], request.seed) for request in chunk]
            for answer in sampler.answers(prompts):
                request, prompt = chunk[answer.index], prompts[answer.index]
                if request.key in done:
                    continue
                text, stopped = model.decode(answer.ids), answer.stopped
                log.append(
                    Rollout(
                        request.key, request.messages, prompt.ids, answer.ids, text, request.seed, stopped
                    )
                )
                advance(1, len(answer.ids) + 1)


def content_of(rollouts: Sequence[Rollout]) -> str:
    """A hash of keys, answers and scores: what recorded activations belong to."""
    sha = hashlib.sha256()
    for rollout in sorted(rollouts, key=lambda r: r.key):
        sha.update(repr((rollout.key, rollout.answer_ids, rollout.score)).encode())
    return sha.hexdigest()


def make_activations(
    run: RunFolder, model: Model, rollouts: Sequence[Rollout], world: World, kind: RoleKind = "role"
) -> Activations:
    """Records those rollouts (empty answers left out) and writes the kind's artefact, unless it is there already."""
    name = ACTIVATIONS[kind]
    stem = run.folder / name
    rollouts = [rollout for rollout in rollouts if not rollout.is_empty]
    if not rollouts:
        raise UserError(f"{run.folder}: every answer is empty; nothing to record")
    layers = kept_layers(model.n_layers, model.d_model, len(rollouts))
    content = content_of(rollouts)
    folder = run.folder / f"{name}.parts"
    if _is_recorded(stem, content, layers):
        if world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed behind the last save
        return load_activations(stem)
    parts = _parts(rollouts, part_rollouts(model))
    folder.mkdir(exist_ok=True)
    own = [rollout for i, part in enumerate(parts) if world.owns(i) for rollout in part]
    compile = worth_compiling(model, sum(rollout.n_tokens for rollout in own))
    title = "recording" if kind == "role" else f"recording {kind}s"
    with (
        progress(title, len(own), "tokens", quiet=world.rank > 0) as advance,
        compiled(model, enabled=compile),
    ):
        for number, part in enumerate(parts):
            part_stem, part_content = folder / f"{number:05d}", content_of(part)
            if world.owns(number) and not _is_recorded(part_stem, part_content, layers):
                _record_part(model, part, layers, part_content, advance).save(part_stem)
    world.barrier()
    if world.rank == 0:
        recorded = []
        for number, part in enumerate(parts):
            recorded.append(load_activations(folder / f"{number:05d}"))
            if recorded[-1].content != content_of(part):
                raise UserError(
                    f"{folder / f'{number:05d}'}: another process recorded other answers or scores than this one "
                    "has; run it again"
                )
        replace(join_activations(recorded), content=content).save(stem)
        shutil.rmtree(folder)
    world.barrier()
    return load_activations(stem)


def _record_part(
    model: Model, part: Sequence[Rollout], layers: tuple[int, ...], content: str, advance: Advance
) -> Activations:
    means = torch.empty(len(part), model.n_layers, model.d_model)
    for indices, batch in record(model, part, compile=False):  # the caller has compiled if it pays
        means[indices] = batch
        advance(len(indices), sum(part[i].n_tokens for i in indices))
    cells, count, mean, square = cell_sums([(rollout.role, rollout.score) for rollout in part], means)
    return Activations(
        cells=cells,
        count=count,
        mean=mean,
        square=square,
        keys=tuple(rollout.key for rollout in part),
        scores=tuple(rollout.score for rollout in part),
        layers=layers,
        rollout_means=means[:, list(layers)].contiguous(),
        model=model.describe(),
        content=content,
    )


def _is_recorded(stem: Path, content: str, layers: tuple[int, ...]) -> bool:
    if not stem.with_name(stem.name + ".json").exists():
        return False
    try:
        activations = load_activations(stem)
    except UserError as error:
        say(f"{error.args[0].partition(';')[0]}: recorded again")
        return False
    return activations.content == content and activations.layers == layers


def part_rollouts(model: Model) -> int:
    """Rollouts that are recorded between two saves: a few minutes' work on a CPU, as much as memory likes on
    a GPU.
    """
    if model.device.type != "cuda":
        return PART_ROLLOUTS
    return max(PART_ROLLOUTS, PART_BYTES // (model.n_layers * model.d_model * 4))


def _parts(rollouts: Sequence[Rollout], size: int) -> list[list[Rollout]]:
    """Whole roles, in order of name, about `size` rollouts together."""
    by_role: dict[str, list[Rollout]] = {}
    for rollout in sorted(rollouts, key=lambda r: r.key):
        by_role.setdefault(rollout.role, []).append(rollout)
    parts: list[list[Rollout]] = []
    for role in sorted(by_role):
        if parts and len(parts[-1]) + len(by_role[role]) <= size:
            parts[-1].extend(by_role[role])
        else:
            parts.append(list(by_role[role]))
    return parts
