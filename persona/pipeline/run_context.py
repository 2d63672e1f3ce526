"""From a model name and options to a run that is open, checked and ready for its steps.

with open_context("smollm2-135m", folder, ModelOptions(), PlanOptions()) as context:
    rollouts = judge_run(context.run, context.bank, sample(context), JudgeOptions(), context.world)
    recorded = record_rollouts(context.run, context.model, rollouts, context.world)
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from personatlas.persona.distributed import World, get_world
from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import (
    Item,
    Judge,
    items_to_judge,
    judge_rollouts,
    read_scores,
    read_sides,
    role_play_share,
)
from personatlas.persona.judges.rules import RuleJudge
from personatlas.persona.models.hub import require_model_name
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import (
    JudgeOptions,
    ModelOptions,
    PlanOptions,
    recorded_plan,
    require_in_bank,
    selection_of,
)
from personatlas.persona.pipeline.activations import ACTIVATIONS, Activations
from personatlas.persona.pipeline.estimate import estimate_seconds
from personatlas.persona.pipeline.stages import (
    CPU_CHUNK,
    GPU_CHUNK,
    RolloutLog,
    RolloutPlan,
    make_activations,
    make_rollouts,
    plan_rollouts,
)
from personatlas.persona.progress import format_duration, progress, say
from personatlas.persona.roles.bank import Bank, Role, RoleKind, load_bank, role_kind
from personatlas.persona.rollout import Rollout, Selection, of_kind, with_scores
from personatlas.persona.runs import RunFolder, is_training_run, open_run, read_manifest
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import SLOW, Sampling

WORTH_AN_ESTIMATE = 100  # rollouts
GATE_WARNING = 0.25  # a share of role-play that is surely below this is said aloud


@dataclass(frozen=True)
class RunContext:
    """An open run with its model, bank and sampling; `model_name` is the name that the model was asked for by."""

    run: RunFolder
    world: World
    model: Model
    model_name: str
    bank: Bank
    selection: Selection
    sampling: Sampling
    seed: int
    chunk: int
    plan_name: str

    @cached_property
    def plan(self) -> RolloutPlan:
        """The rollouts of this run."""
        return plan_rollouts(self.bank, self.model, self.selection, self.seed, self.chunk)

    @cached_property
    def log(self) -> RolloutLog:
        """What is there of them."""
        return RolloutLog(self.run.folder, self.world)

    def require_room(self) -> None:
        """`UserError` for answers that do not fit behind their prompts: beyond the context nothing is recorded."""
        limit, longest = self.model.context, max(map(len, self.plan.prompt_ids.values()))
        most = self.sampling.max_new_tokens
        if limit and longest + most > limit:
            room = limit - longest
            hint = (
                f"--max-new-tokens {room} is the most" if room > 0 else "give a model with a longer context"
            )
            raise UserError(
                f"prompts of up to {longest} tokens and answers of up to {most} do not fit into the {limit} that "
                f"{self.model.id} holds: {hint}"
            )

    def asked(self) -> dict[str, Any]:
        """What run.json records of the request."""
        chat, traits = self.model.chat, [trait.name for trait in self.selection.traits(self.bank)]
        controls = self.selection.control_roles(self.bank)
        asked = {
            "model_name": self.model_name,
            "model": self.model.describe(),
            "name": self.model.name,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "chat_template": hashlib.sha256(chat.template.encode()).hexdigest()[:16],
            "system": chat.system,
            "injected_system": chat.injected,
            **chat.describe_date(),
            "bank": self.bank.digest,
            "seed": self.seed,
            "chunk": self.chunk,
            "plan": self.plan_name,
            "max_new_tokens": self.sampling.max_new_tokens,
            "temperature": self.sampling.temperature,
            "top_p": self.sampling.top_p,
            "roles": [role.name for role in self.selection.roles(self.bank)],
            "prompts": self.selection.prompts,
            "questions": self.selection.questions,
            "samples": self.selection.samples,
        }
        if traits:
            asked |= {"traits": traits, "traits_bank": self.bank.traits_digest}
        return asked | ({"controls_bank": self.bank.controls_digest} if controls else {})


@contextmanager
def open_context(
    model: str | Model, folder: Path, load: ModelOptions, plan: PlanOptions
) -> Iterator[RunContext]:
    """Opens the run folder, loads the model unless a loaded one is given, and checks that both belong
    together.

    A resumed run keeps the dtype and chunk that it was begun with; other values are refused. A loaded `Model`
    is used as it is, without `load`. Under torchrun every process does this; the first one leads.
    """
    world = get_world()
    if isinstance(model, Model):
        has_gpu = model.device.type == "cuda"
    else:
        has_gpu = (load.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    recorded = read_manifest(folder).get("asked", {}) if (folder / "run.json").is_file() else {}
    # on a CPU the standard plan takes hours
    plan_name = plan.plan or recorded_plan(recorded) or ("standard" if has_gpu else "demo")
    plan = replace(plan, plan=plan_name)
    selection, max_new_tokens = selection_of(plan)
    sampling = Sampling(max_new_tokens, plan.temperature, plan.top_p)
    bank = load_bank(plan.bank)
    selection.roles(bank), selection.traits(bank)  # unknown names fail before a model is loaded
    require_in_bank(plan, bank)
    with open_run(folder, create=True, rank=world.rank) as run:
        try:
            if world.rank:
                world.barrier()
            before = run.manifest.get("asked", {})
            if isinstance(model, Model):
                decoder, name = model, model.id
            else:
                device, dtype = load.device or local_device(world), load.dtype or before.get("dtype")
                decoder = load_model(model, device=device, dtype=dtype, chat_template=load.chat_template)
                # of a training run its newest checkpoint now, not the newest one when this run is resumed
                name = decoder.id if is_training_run(Path(model)) else model
            decoder = run.as_recorded(decoder)
            on_gpu = decoder.device.type == "cuda"
            chunk = plan.chunk or before.get("chunk") or (GPU_CHUNK if on_gpu else CPU_CHUNK)
            context = RunContext(
                run, world, decoder, name, bank, selection, sampling, plan.seed, chunk, plan_name
            )
            context.require_room()
            run.claim(context.asked())
            if not world.rank:
                world.barrier()
            yield context
        finally:
            world.close()


def sample(context: RunContext) -> list[Rollout]:
    """Makes all rollouts of the plan that are not there yet. A long run first tries a few roles and says what came."""
    plan, log, world, model = context.plan, context.log, context.world, context.model
    log.require_plan(plan)
    # traits and controls, which may be added later, must not change how the roles' chunks are decoded
    longest = max(len(ids) for key, ids in plan.prompt_ids.items() if role_kind(key) == "role")
    sampler = fastest_sampler(model, model.chat.end_ids, context.sampling, longest)
    if sampler.decoder.name != "slots" and world.rank == 0:
        say(SLOW)
    if world.rank == 0:
        _say_estimate(context)
    if plan.gate:
        make_rollouts(plan, log, model, sampler, range(plan.gate))
        world.barrier()
        if world.rank == 0:
            _report_gate(context)
    make_rollouts(plan, log, model, sampler, range(plan.gate, len(plan.chunks)))
    log.merge()
    return log.select(plan.keys)


def _say_estimate(context: RunContext) -> None:
    """Says how long what is missing of the plan takes, where that is more than a moment."""
    missing = [key for key in context.plan.keys if key not in context.log.rollouts]
    if len(missing) < WORTH_AN_ESTIMATE:
        return
    most = context.sampling.max_new_tokens
    prompt = sum(len(context.plan.prompt_ids[key]) for key in missing) / len(missing)
    seconds = estimate_seconds(context.model, len(missing), prompt, most) / context.world.size
    larger = "; --plan standard has all roles and longer answers" if context.plan_name == "demo" else ""
    say(
        f"plan {context.plan_name}: {len(missing):,} rollouts of up to {most} tokens and their recording take "
        f"about {format_duration(seconds)} by a short probe{larger}"
    )


def _report_gate(context: RunContext) -> None:
    """Says what share of the first chunk plays its role, by the rules, and notes it in run.json."""
    if context.world.size > 1:
        context.log.reload()
    rollouts, judge = context.log.select([request.key for request in context.plan.chunks[0]]), RuleJudge()
    items = items_to_judge(rollouts, context.bank)
    scores = {verdict.key: verdict.score for verdict in judge.verdicts(items)}
    share, n, (low, high) = role_play_share(with_scores(rollouts, scores))
    context.run.note(gate={"share": share, "n": n, "low": low, "high": high, "judge": judge.id})
    say(
        f"role-play gate: {share:.0%} of {n} answers show their role (95% {low:.0%}..{high:.0%}, judge {judge.id})"
    )
    if high < GATE_WARNING:
        say(
            "by this judge the model hardly plays roles (the rules miss quiet role-play): read the null before the axis"
        )


def judge_run(
    run: RunFolder, bank: Bank, rollouts: list[Rollout], options: JudgeOptions, world: World = World()
) -> list[Rollout]:
    """Scores the rollouts on rank 0, for which the others wait, and returns them with their scores.

    Roles get 0-3. Traits are scored by an endpoint only, 0-100 in their own log; their rollouts carry 1 where
    the score is on the pole's own side and 0 where it is not. Controls ask for no role, and are not judged.
    With the judge "none" every score stays None.
    """
    if options.judge == "none":
        return rollouts
    of_roles, of_traits = of_kind(rollouts, "role"), of_kind(rollouts, "trait")
    judge, trait_judge = load_judge(options, run), None
    if of_traits and options.is_url:
        trait_judge = _endpoint_judge(options, of_traits=True)
    log, trait_log = run.folder / "scores.jsonl", run.folder / "trait_scores.jsonl"
    if world.rank == 0:
        run.note(judge=_judge(of_roles, bank, judge, log, quiet=options.judge == "rules"))
        if trait_judge is not None:
            run.note(trait_judge=_judge(of_traits, bank, trait_judge, trait_log))
        elif run.manifest.get("trait_judge"):
            run.note(trait_judge=None)  # the newest judge scored no traits
    world.barrier()
    of_roles = with_scores(of_roles, read_scores(log, judge.id))
    if trait_judge is not None:
        of_traits = with_scores(of_traits, read_sides(trait_log, trait_judge.id))
    return [*of_roles, *of_traits, *of_kind(rollouts, "control")]


def _judge(
    rollouts: list[Rollout], bank: Bank, judge: Judge, path: Path, quiet: bool = False
) -> dict[str, Any]:
    """Judges what is not judged yet; returns what run.json says of it."""
    with progress("judging", len(items_to_judge(rollouts, bank)), quiet=quiet) as advance:
        tally = judge_rollouts(rollouts, bank, judge, path, advance)
    if tally.problems:
        problems = ", ".join(f"{n} {problem}" for problem, n in sorted(tally.problems.items()))
        if all(score is None for counts in tally.by_role.values() for score in counts):
            raise UserError(
                f"the judge {judge.id} gave a score to none of {tally.unparsable} answers ({problems}); its "
                f"replies are in {path}, and are asked for again when you run this again"
            )
        say(f"the judge gave no score for {tally.unparsable} answers ({problems}); they count as unjudged")
    counts = {str(score): n for score, n in tally.counts.items()}
    return {"id": judge.id, "counts": counts, "unscored": tally.unparsable}


def stored_scores(run: RunFolder) -> dict[str, int | None]:
    """Scores of the newest judge, and traits' sides where that judge scored traits."""
    scores, trait_judge = read_scores(run.folder / "scores.jsonl"), run.manifest.get("trait_judge")
    if trait_judge is None:
        return scores
    return scores | read_sides(run.folder / "trait_scores.jsonl", trait_judge["id"])


def require_judge(options: JudgeOptions) -> None:
    """`UserError` for a judge that there is not or that does not answer, before anything long begins."""
    options.check()
    if options.judge.startswith("local:"):
        require_model_name(options.judge.removeprefix("local:"))
    elif options.is_url and not get_world().rank:
        judge = _endpoint_judge(options)
        item = Item("judge/0/hello/0", Role("assistant", ()), "", "Say hello.", "Hello.")
        for verdict in judge.verdicts([item]):
            if verdict.problem is not None and verdict.problem not in ("unparsable", "refused"):
                raise UserError(
                    f"the judge {judge.id} gives no score: {verdict.problem}: {verdict.reply[:160]}"
                )


def load_judge(options: JudgeOptions, run: RunFolder) -> Judge:
    """The judge of a run that the options ask for, which `require_judge` has let pass."""
    if options.judge == "rules":
        return RuleJudge()
    if options.judge.startswith("local:"):
        from personatlas.persona.judges.local import LocalJudge

        return LocalJudge(run.date(load_model(options.judge.removeprefix("local:"))))
    return _endpoint_judge(options)


def _endpoint_judge(options: JudgeOptions, *, of_traits: bool = False) -> Judge:
    from personatlas.persona.judges.endpoint import EndpointJudge
    from personatlas.persona.judges.wording import ROLE_WORDING, TRAIT_WORDING

    wording = TRAIT_WORDING if of_traits else ROLE_WORDING
    model, tokens = options.judge_model or "", options.judge_tokens
    return EndpointJudge(options.judge, model, max_tokens=tokens, wording=wording)


def record_rollouts(
    run: RunFolder, model: Model, rollouts: list[Rollout], world: World
) -> dict[RoleKind, Activations]:
    """Records the scored rollouts, an artefact for each kind of role: adding traits or controls to a run
    leaves what is there as it is.
    """
    recorded: dict[RoleKind, Activations] = {}
    for kind in ACTIVATIONS:
        own = of_kind(rollouts, kind)
        if kind == "role" or not all(rollout.is_empty for rollout in own):
            recorded[kind] = make_activations(run, model, own, world, kind)
    return recorded


def local_device(world: World) -> str | None:
    """The GPU of this process under torchrun; None elsewhere."""
    return f"cuda:{world.local_rank}" if world.size > 1 and torch.cuda.is_available() else None
