"""The long steps of a run: rollouts, then scores, then activations. Each resumes, and each can be shared by ranks.

A step's work is cut into chunks that depend on the plan alone. Rollouts are cut after sorting by prompt length (length
buckets); a chunk that was interrupted is sampled again whole, with what it already gave thrown away, so that a resumed
run gives the answers of an uninterrupted one bit for bit. Recording is cut by role, one part file a chunk.
"""

import hashlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.distributed import World
from personatlas.persona.errors import UserError
from personatlas.persona.logs import append_lines, read_lines
from personatlas.persona.models.chat_template import ChatFormat
from personatlas.persona.models.load import Model
from personatlas.persona.pipeline.activations import (
    Activations,
    cell_sums,
    join,
    kept_layers,
    load_activations,
)
from personatlas.persona.pipeline.record import compiled, record, worth_compiling
from personatlas.persona.progress import progress
from personatlas.persona.roles.bank import Bank
from personatlas.persona.roles.traits import is_pole
from personatlas.persona.rollout import Request, Rollout, Selection, read_rollouts, requests
from personatlas.persona.runs import RunFolder
from personatlas.persona.sampling.sampler import Answer, Prompt, Sampler

CPU_CHUNK, GPU_CHUNK = 64, 16384
PART_ROLLOUTS, PART_BYTES = 1024, 1 << 30
GATE_ROLES, GATE_QUESTIONS, GATE_FROM = 8, 2, 200


@dataclass(frozen=True)
class Plan:
    """Every rollout of a run, cut into chunks. `gate` is the number of leading chunks (0 or 1) that try a few roles."""

    chunks: tuple[tuple[Request, ...], ...]
    prompt_ids: dict[str, tuple[int, ...]]
    gate: int

    @property
    def keys(self) -> list[str]:
        """All keys of the plan."""
        return [request.key for chunk in self.chunks for request in chunk]


def plan_rollouts(
    bank: Bank, model: Model, chat: ChatFormat, selection: Selection, seed: int, size: int
) -> Plan:
    """Cut a selection into chunks of `size`: first a few roles that show whether the model role-plays, then all by length.

    Traits have chunks of their own, after the roles': adding them to a run changes nothing of what is there.
    """
    wanted = requests(bank, model.name, selection, seed)
    prompt_ids = {request.key: tuple(chat.prompt_ids(list(request.messages))) for request in wanted}
    of_roles = [request for request in wanted if not is_pole(request.key)]
    gate = _gate(of_roles) if len(of_roles) >= GATE_FROM else []
    tried = {request.key for request in gate}
    chunks = [tuple(gate)] if gate else []
    for part in ([r for r in of_roles if r.key not in tried], [r for r in wanted if is_pole(r.key)]):
        rest = sorted(part, key=lambda r: (len(prompt_ids[r.key]), r.key))
        chunks += [tuple(rest[i : i + size]) for i in range(0, len(rest), size)]
    return Plan(tuple(chunks), prompt_ids, int(bool(gate)))


def make_rollouts(
    run: RunFolder, plan: Plan, model: Model, sampler: Sampler, world: World, chunks: range
) -> None:
    """Sample what is missing in those chunks of the plan and append it to this rank's log, answer by answer."""
    done = {rollout.key for rollout in read_rollouts(run.folder)}
    path = run.folder / ("rollouts.jsonl" if world.size == 1 else f"rollouts.{world.rank:04d}.jsonl")
    mine = [plan.chunks[i] for i in chunks if world.owns(i)]
    there = sum(request.key in done for chunk in mine for request in chunk)
    with progress("rollouts", sum(map(len, mine)), "tokens", done=there, quiet=world.rank > 0) as advance:
        for chunk in mine:
            if all(request.key in done for request in chunk):
                continue
            prompts = [Prompt(plan.prompt_ids[request.key], request.seed) for request in chunk]
            for answer in sampler.answers(prompts):
                request = chunk[answer.index]
                if request.key in done:
                    continue
                rollout = _rollout(request, prompts[answer.index], answer, model)
                append_lines(path, [rollout.to_json()], sync=False)
                advance(1, len(answer.ids) + 1)


def merge_rollouts(run: RunFolder, world: World) -> None:
    """Put the ranks' logs into one, after all of them are done. A crash in between leaves equal lines twice: harmless."""
    world.barrier()
    shards = sorted(run.folder.glob("rollouts.*.jsonl"))
    if world.rank == 0 and shards:
        log = run.folder / "rollouts.jsonl"
        there = {row["key"] for row in read_lines(log)}
        append_lines(log, [r.to_json() for r in read_rollouts(run.folder) if r.key not in there])
        for shard in shards:
            shard.unlink()
    world.barrier()


def planned(run: RunFolder, plan_keys: Sequence[str]) -> list[Rollout]:
    """The plan's rollouts in the plan's order; `UserError` when some are missing."""
    found = {rollout.key: rollout for rollout in read_rollouts(run.folder)}
    missing = [key for key in plan_keys if key not in found]
    if missing:
        raise UserError(
            f"{run.folder} lacks {len(missing)} rollouts, such as {missing[0]}; run the rollout step again"
        )
    return [found[key] for key in sorted(plan_keys)]


def content_of(rollouts: Sequence[Rollout]) -> str:
    """A hash of keys, answers and scores: what recorded activations belong to."""
    sha = hashlib.sha256()
    for rollout in sorted(rollouts, key=lambda r: r.key):
        sha.update(repr((rollout.key, rollout.answer_ids, rollout.score)).encode())
    return sha.hexdigest()


def make_activations(
    run: RunFolder, model: Model, rollouts: Sequence[Rollout], world: World, name: str = "activations"
) -> Activations:
    """Record those rollouts (empty answers left out) and write the artefact `name`; returns at once if that is done already."""
    stem = run.folder / name
    spoken = [rollout for rollout in rollouts if not rollout.is_empty]
    if not spoken:
        raise UserError(f"{run.folder}: every answer is empty; nothing to record")
    layers = kept_layers(model.n_layers, model.d_model, len(spoken))
    content = content_of(spoken)
    if _recorded(stem, content, layers):
        return load_activations(stem)
    parts = _parts(spoken, part_rollouts(model))
    folder = run.folder / f"{name}.parts"
    folder.mkdir(exist_ok=True)
    mine = [rollout for i, part in enumerate(parts) if world.owns(i) for rollout in part]
    compile = worth_compiling(model, sum(len(r.prompt_ids) + len(r.answer_ids) for r in mine))
    with (
        progress(
            "recording" if name == "activations" else "recording traits",
            len(mine),
            "tokens",
            quiet=world.rank > 0,
        ) as advance,
        compiled(model, enabled=compile),
    ):
        for number, part in enumerate(parts):
            if world.owns(number):
                part_stem = folder / f"{number:05d}"
                part_content = content_of(part)
                if not _recorded(part_stem, part_content, layers):
                    _record_part(model, part, layers, part_content, advance).save(part_stem)
    world.barrier()
    if world.rank == 0:
        whole = join([_whole_part(folder / f"{number:05d}", part) for number, part in enumerate(parts)])
        replace(whole, content=content).save(stem)
        shutil.rmtree(folder)
    world.barrier()
    return load_activations(stem)


def _record_part(
    model: Model, part: Sequence[Rollout], layers: tuple[int, ...], content: str, advance: Any
) -> Activations:
    means = torch.empty(len(part), model.n_layers, model.d_model)
    for indices, batch in record(model, part, compile=False):  # the caller has compiled if it pays
        means[indices] = batch
        advance(len(indices), sum(len(part[i].prompt_ids) + len(part[i].answer_ids) for i in indices))
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


def _whole_part(stem: Path, part: Sequence[Rollout]) -> Activations:
    found = load_activations(stem)
    if found.content != content_of(part):
        raise UserError(
            f"{stem}: another process recorded other answers or scores than this one has; run it again"
        )
    return found


def _recorded(stem: Path, content: str, layers: tuple[int, ...]) -> bool:
    if not stem.with_name(stem.name + ".json").exists():
        return False
    there = load_activations(stem)
    return there.content == content and there.layers == layers


def part_rollouts(model: Model) -> int:
    """Rollouts that are recorded between two saves: a few minutes' work on a CPU, as much as memory likes on a GPU."""
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


def _gate(wanted: Sequence[Request]) -> list[Request]:
    """The first prompt and questions of a few roles spread over the plan, the default left out."""
    roles = list(dict.fromkeys(request.key.split("/")[0] for request in wanted))[1:]
    chosen = {roles[i * len(roles) // GATE_ROLES] for i in range(GATE_ROLES)} if roles else set()
    first = [
        r
        for r in wanted
        if r.key.split("/")[0] in chosen and r.key.split("/")[1] == "0" and r.key.endswith("/0")
    ]
    asked = list(dict.fromkeys(request.key.split("/")[2] for request in first))[:GATE_QUESTIONS]
    return [request for request in first if request.key.split("/")[2] in asked]


def _rollout(request: Request, prompt: Prompt, answer: Answer, model: Model) -> Rollout:
    text = model.decode(answer.ids)
    return Rollout(request.key, request.messages, prompt.ids, answer.ids, text, request.seed, answer.stopped)
