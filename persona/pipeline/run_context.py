"""From a model name and options to a run that is open, checked and ready for its steps.

with open_context("smollm2-135m", folder, ModelOptions(), PlanOptions()) as work:
    sample(work); judge(work, JudgeOptions()); activations = record_run(work)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from personatlas.persona.distributed import World, get_world
from personatlas.persona.errors import UserError
from personatlas.persona.judges.base import (
    Judge,
    items_of,
    judge_rollouts,
    read_scores,
    read_sides,
    role_play_share,
)
from personatlas.persona.judges.rules import RuleJudge
from personatlas.persona.models.chat_template import ChatFormat, chat_format
from personatlas.persona.models.load import Model, load_model
from personatlas.persona.options import JudgeOptions, ModelOptions, PlanOptions, selection_of
from personatlas.persona.pipeline.activations import Activations
from personatlas.persona.pipeline.stages import (
    CPU_CHUNK,
    GPU_CHUNK,
    Plan,
    make_activations,
    make_rollouts,
    merge_rollouts,
    plan_rollouts,
    planned,
)
from personatlas.persona.progress import progress, say
from personatlas.persona.roles.bank import Bank, load_bank
from personatlas.persona.roles.traits import is_pole
from personatlas.persona.rollout import Rollout, Selection, only_poles, with_scores, without_poles
from personatlas.persona.runs import RunFolder, is_training_run, open_run
from personatlas.persona.sampling.cuda_graph import fastest_sampler
from personatlas.persona.sampling.sampler import Sampler, Sampling

GATE_WARNING = 0.25  # a share of role-play that is surely below this is said aloud


@dataclass(frozen=True)
class RunContext:
    """An open run with its model, bank and sampling."""

    run: RunFolder
    world: World
    model: Model
    chat: ChatFormat
    bank: Bank
    selection: Selection
    sampling: Sampling
    seed: int
    chunk: int

    @cached_property
    def plan(self) -> Plan:
        """The rollouts of this run."""
        return plan_rollouts(self.bank, self.model, self.chat, self.selection, self.seed, self.chunk)


@contextmanager
def open_context(
    model: str | Model, folder: Path, load: ModelOptions, plan: PlanOptions
) -> Iterator[RunContext]:
    """Opens the run folder, loads the model unless a loaded one is given, and checks that both belong together.

    A resumed run keeps the dtype and chunk that it was begun with; other values are refused. A loaded `Model` is used as
    it is, without `load`. Under torchrun every process does this; the first one leads.
    """
    world = get_world()
    selection, max_new_tokens = selection_of(plan)
    sampling = Sampling(max_new_tokens, plan.temperature, plan.top_p)
    bank = load_bank(plan.bank)
    selection.roles(bank), selection.traits(bank)  # unknown names fail before a model is loaded
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
            chat = chat_format(decoder.tokenizer, _end_ids(decoder))
            on_gpu = decoder.device.type == "cuda"
            chunk = plan.chunk or before.get("chunk") or (GPU_CHUNK if on_gpu else CPU_CHUNK)
            context = RunContext(run, world, decoder, chat, bank, selection, sampling, plan.seed, chunk)
            _require_room(context)
            run.claim(_asked(name, decoder, chat, bank, selection, sampling, plan.seed, chunk))
            if not world.rank:
                world.barrier()
            yield context
        finally:
            world.close()


def sample(work: RunContext) -> list[Rollout]:
    """Make all rollouts of the plan that are not there yet. A long run first tries a few roles and says what came."""
    sampler = _sampler(work)
    if sampler.decoder.name != "slots" and work.world.rank == 0:
        say(
            "this model does not take a key-value cache as it should: every step reads the whole text again, slowly"
        )
    plan, gate = work.plan, work.plan.gate
    if gate:
        make_rollouts(work.run, plan, work.model, sampler, work.world, range(gate))
        work.world.barrier()
        if work.world.rank == 0:
            _report_gate(work, [request.key for request in plan.chunks[0]])
    make_rollouts(work.run, plan, work.model, sampler, work.world, range(gate, len(plan.chunks)))
    merge_rollouts(work.run, work.world)
    return planned(work.run, plan.keys)


def _require_room(work: RunContext) -> None:
    """`UserError` for answers that would not fit behind their prompts: what runs beyond the context cannot be recorded."""
    limit, longest = work.model.context, max(map(len, work.plan.prompt_ids.values()))
    most = work.sampling.max_new_tokens
    if limit and longest + most > limit:
        room = limit - longest
        what = f"--max-new-tokens {room} is the most" if room > 0 else "give a model with a longer context"
        raise UserError(
            f"prompts of up to {longest} tokens and answers of up to {most} do not fit into the {limit} that "
            f"{work.model.id} holds: {what}"
        )


def judge_run(
    run: RunFolder, bank: Bank, rollouts: list[Rollout], options: JudgeOptions, world: World = World()
) -> list[Rollout]:
    """Score the rollouts (rank 0; the others wait for it) and return them with their scores. `--judge none` leaves every score None.

    Roles get 0-3. Traits are scored by an endpoint only, 0-100 in their own log; their rollouts carry 1 where the score is on
    the pole's own side and 0 where it is not.
    """
    if options.judge == "none":
        return rollouts
    of_roles, of_traits = without_poles(rollouts), only_poles(rollouts)
    judge, trait_judge = judge_named(options), _trait_judge(options) if of_traits else None
    logs = run.folder / "scores.jsonl", run.folder / "trait_scores.jsonl"
    if world.rank == 0:
        run.note(judge=_judged(of_roles, bank, judge, logs[0], quiet=options.judge == "rules"))
        if trait_judge is not None:
            run.note(trait_judge=_judged(of_traits, bank, trait_judge, logs[1]))
        elif run.manifest.get("trait_judge"):
            run.note(trait_judge=None)  # the newest judge scored no traits
    world.barrier()
    of_roles = with_scores(of_roles, read_scores(logs[0], judge.id))
    if trait_judge is not None:
        of_traits = with_scores(of_traits, read_sides(logs[1], trait_judge.id))
    return [*of_roles, *of_traits]


def stored_scores(run: RunFolder) -> dict[str, int | None]:
    """Scores of the newest judge, and traits' sides where that judge scored traits."""
    scores = read_scores(run.folder / "scores.jsonl")
    trait_judge = run.manifest.get("trait_judge")
    return (
        scores
        if trait_judge is None
        else scores | read_sides(run.folder / "trait_scores.jsonl", trait_judge["id"])
    )


def _trait_judge(options: JudgeOptions) -> Judge | None:
    if not _is_url(options.judge):
        return None
    from personatlas.persona.judges.endpoint import EndpointJudge
    from personatlas.persona.judges.wording import TRAIT_WORDING

    return EndpointJudge(options.judge, options.judge_model or "", wording=TRAIT_WORDING)


def _judged(
    rollouts: list[Rollout], bank: Bank, judge: Judge, path: Path, quiet: bool = False
) -> dict[str, Any]:
    """Judge what is not judged yet; returns what run.json says of it."""
    with progress("judging", len(items_of(rollouts, bank)), quiet=quiet) as advance:
        tally = judge_rollouts(rollouts, bank, judge, path, advance)
    if tally.problems:
        said = ", ".join(f"{n} {problem}" for problem, n in sorted(tally.problems.items()))
        say(f"the judge gave no score for {tally.unparsable} answers ({said}); they count as unjudged")
    return {
        "id": judge.id,
        "counts": {str(k): n for k, n in tally.counts.items()},
        "unscored": tally.unparsable,
    }


def _is_url(judge: str) -> bool:
    return judge.startswith(("http://", "https://"))


def require_judge(options: JudgeOptions) -> None:
    """`UserError` for a judge that there is not, before anything long begins."""
    is_url = _is_url(options.judge)
    if options.judge not in ("rules", "none") and not options.judge.startswith("local:") and not is_url:
        raise UserError(f"--judge {options.judge!r} is not rules, none, local:MODEL or a http(s) URL")
    if is_url and not options.judge_model:
        raise UserError(f"--judge {options.judge} needs --judge-model NAME")


def judge_named(options: JudgeOptions) -> Judge:
    """The judge that the options ask for."""
    require_judge(options)
    if options.judge == "rules":
        return RuleJudge()
    if options.judge.startswith("local:"):
        from personatlas.persona.judges.local import LocalJudge

        return LocalJudge(load_model(options.judge.removeprefix("local:")))
    from personatlas.persona.judges.endpoint import EndpointJudge

    return EndpointJudge(options.judge, options.judge_model or "")


def record_run(work: RunContext, rollouts: list[Rollout]) -> tuple[Activations, Activations | None]:
    """Record the scored rollouts: those of roles, and those of traits where there are any."""
    return record_rollouts(work.run, work.model, rollouts, work.world)


def record_rollouts(
    run: RunFolder, model: Model, rollouts: list[Rollout], world: World
) -> tuple[Activations, Activations | None]:
    """Two artefacts, `activations` and `trait_activations`, so that adding traits leaves the roles' as they are."""
    of_traits = [
        rollout for rollout in only_poles(rollouts) if rollout.answer.strip()
    ]  # as blank ones of roles are dropped
    roles = make_activations(run, model, without_poles(rollouts), world)
    return roles, make_activations(run, model, of_traits, world, "trait_activations") if of_traits else None


def _sampler(work: RunContext) -> Sampler:
    # traits, which may be added later, must not change how the roles' chunks are decoded
    longest = max(len(ids) for key, ids in work.plan.prompt_ids.items() if not is_pole(key))
    return fastest_sampler(work.model, work.chat.end_ids, work.sampling, longest)


def _report_gate(work: RunContext, keys: list[str]) -> None:
    wanted = set(keys)
    tried = [rollout for rollout in planned(work.run, keys) if rollout.key in wanted]
    judge = RuleJudge()
    verdicts = {verdict.key: verdict.score for verdict in judge.verdicts(items_of(tried, work.bank))}
    share, n, (low, high) = role_play_share(with_scores(tried, verdicts))
    work.run.note(gate={"share": share, "n": n, "low": low, "high": high, "judge": judge.id})
    say(
        f"role-play gate: {share:.0%} of {n} answers show their role (95% {low:.0%}..{high:.0%}, judge {judge.id})"
    )
    if high < GATE_WARNING:
        say(
            "by this judge the model hardly plays roles (the rules miss quiet role-play): read the null before the axis"
        )


def _asked(
    model: str,
    decoder: Model,
    chat: ChatFormat,
    bank: Bank,
    selection: Selection,
    sampling: Sampling,
    seed: int,
    chunk: int,
) -> dict[str, Any]:
    import hashlib

    traits = [trait.name for trait in selection.traits(bank)]
    return {
        "model_name": model,
        "model": decoder.describe(),
        "dtype": str(decoder.dtype).removeprefix("torch."),
        "chat_template": hashlib.sha256(chat.template.encode()).hexdigest()[:16],
        "system": chat.system,
        "injected_system": chat.injected,
        "bank": bank.digest,
        "seed": seed,
        "chunk": chunk,
        "max_new_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "roles": [role.name for role in selection.roles(bank)],
        "prompts": selection.prompts,
        "questions": selection.questions,
        "samples": selection.samples,
    } | ({"traits": traits, "traits_bank": bank.traits_digest} if traits else {})


def _end_ids(model: Model) -> Any:
    config = model.hf.generation_config
    return config.eos_token_id if config is not None else None


def local_device(world: World) -> str | None:
    """The GPU of this process under torchrun; None elsewhere."""
    import torch

    return f"cuda:{world.local_rank}" if world.size > 1 and torch.cuda.is_available() else None
