"""The verbs of `persona/`: rollout, judge, record, spans, show, import; `bank_verbs` has `roles`.

Progress goes to stderr, results to stdout, `--json` for machines.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from personatlas.cli.options import JUDGE, MODEL, PLAN, ModelName
from personatlas.cli.output import console, print_json, print_line
from personatlas.persona.errors import UserError
from personatlas.persona.options import JudgeOptions, ModelOptions, PlanOptions
from personatlas.persona.roles.bank import Bank


def rollout(
    model: ModelName,
    /,
    *,
    out: Path | None = None,
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    plan: Annotated[PlanOptions, PLAN] = PlanOptions(),
) -> None:
    """Sample answers under role prompts into a run folder (resumes).

    Parameters
    ----------
    out
        the run folder; runs/NAME unless given
    """
    from personatlas.persona.pipeline.run_context import open_context, sample
    from personatlas.persona.runs import default_folder

    folder = out or default_folder(model)
    with open_context(model, folder, load, plan) as work:
        made = sample(work)
        if work.world.rank == 0:
            cut = sum(r.stopped == "length" for r in made)
            print_line(
                f"{len(made)} rollouts in {folder / 'rollouts.jsonl'} ({cut} stopped at the token limit)"
            )


def judge(
    run: Path, /, *, judge: Annotated[JudgeOptions, JUDGE] = JudgeOptions(), bank: Path | None = None
) -> None:
    """Score whether a run's answers play their roles, into scores.jsonl (resumes).

    Parameters
    ----------
    run
        a run folder
    bank
        the bank that the run was made with, if not the packaged one
    """
    from personatlas.persona.pipeline.run_context import judge_run
    from personatlas.persona.roles.bank import load_bank
    from personatlas.persona.rollout import read_rollouts, without_poles
    from personatlas.persona.runs import open_run

    with open_run(run) as folder:
        chosen = load_bank(bank)
        _require_bank(folder.manifest, chosen, run)
        rollouts = read_rollouts(run)
        if not rollouts:
            raise UserError(f"{run} has no rollouts; make them first with `personatlas run rollout`")
        scored = without_poles(judge_run(folder, chosen, rollouts, judge))
        counts = {score: sum(r.score == score for r in scored) for score in (0, 1, 2, 3, None)}
        print_line(", ".join(f"{'unjudged' if score is None else score}: {n}" for score, n in counts.items()))


def record(run: Path, /, *, load: Annotated[ModelOptions, MODEL] = ModelOptions()) -> None:
    """Record a run's activations with the scores of its newest judge (resumes).

    Parameters
    ----------
    run
        a run folder
    """
    from dataclasses import replace

    from personatlas.persona.distributed import get_world
    from personatlas.persona.models.load import load_model
    from personatlas.persona.pipeline.run_context import record_rollouts, stored_scores
    from personatlas.persona.rollout import read_rollouts, with_scores
    from personatlas.persona.runs import open_run

    world = get_world()
    with open_run(run, rank=world.rank) as folder:
        asked = folder.manifest.get("asked", {})
        if "model_name" not in asked:
            raise UserError(
                f"{run} has no run.json with rollouts; make them first with `personatlas run rollout`"
            )
        load = replace(load, dtype=load.dtype or asked["dtype"])
        model = load_model(
            asked["model_name"], device=load.device, dtype=load.dtype, chat_template=load.chat_template
        )
        folder.claim({"model": model.describe(), "dtype": str(model.dtype).removeprefix("torch.")})
        rollouts = with_scores(read_rollouts(run), stored_scores(folder))
        for found in record_rollouts(folder, model, rollouts, world):
            if world.rank == 0 and found is not None:
                print_line(
                    f"{int(found.count.sum())} rollouts of {len(found.roles)} roles or poles, {found.n_layers} layers"
                )
    world.close()


def spans(
    model: ModelName,
    /,
    *,
    transcript: Path | None = None,
    system: str = "You are a pirate.",
    user: str = "Who are you?",
    assistant: str = "Arr, I be a pirate.",
    chat_template: Path | None = None,
) -> None:
    """Show which tokens a chat template gives to whom, coloured by speaker.

    Parameters
    ----------
    transcript
        a stored conversation in place of the three messages below (OpenAI, ShareGPT or plain message list, JSON)
    system
        system message; "" sends none
    user
        user message
    assistant
        assistant message
    chat_template
        a Jinja file in place of the tokenizer's chat template
    """
    from personatlas.persona.formats import read_conversations
    from personatlas.persona.models.chat_template import chat_format
    from personatlas.persona.models.load import load_tokenizer
    from personatlas.persona.models.token_spans import conversation_spans, render_spans

    said = {"system": system, "user": user, "assistant": assistant}
    messages: Any = [{"role": role, "content": text} for role, text in said.items() if text]
    if transcript is not None:
        messages = list(read_conversations(transcript, require_user=False)[0].messages)
    tokenizer = load_tokenizer(model, chat_template)
    chat = chat_format(tokenizer)
    console().print(render_spans(conversation_spans(chat, messages), tokenizer))
    if chat.injected and not any(message["role"] == "system" for message in messages):
        print_line(f"the template adds a system message of its own: {chat.injected!r}")
    if chat.system == "merged":
        print_line("the template takes no system message: its text goes before the first user message")


def show(path: Path, /) -> None:
    """Print any artefact or run folder as JSON: what it is, its shapes, and where it came from.

    Parameters
    ----------
    path
        a run folder, or an artefact with or without its ending
    """
    from personatlas.persona.artifacts import digest, read_json

    if path.is_dir():
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not a run folder: it has no run.json")
        files = {
            file.name: file.stat().st_size for file in sorted(path.iterdir()) if not file.name.startswith(".")
        }
        print_json({**read_json(path / "run.json"), "files": files})
        return
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    record_path, tensor_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")
    if not record_path.is_file():
        raise UserError(f"{path} is neither a run folder nor an artefact (there is no {record_path.name})")
    content = read_json(record_path)
    if tensor_path.is_file() and content.get("sha256") != digest(tensor_path):
        raise UserError(
            f"{tensor_path} does not match the hash in {record_path.name}: damaged; make it again"
        )
    print_json(content)


def import_(
    kind: Literal["axis", "caps", "roles"], source: Path, /, *, out: Path, model: str = "unknown"
) -> None:
    """Turn the paper repository's files into artefacts of this project; signs are turned where theirs are opposite.

    Parameters
    ----------
    kind
        axis: a .pt with an axis; caps: a capping_config.pt; roles: a folder with roles, traits and questions
    source
        the file or folder
    out
        an artefact's stem for axis, a folder for caps and roles; RUN/caps makes caps usable by name
    model
        the id of the model that the vectors came from
    """
    from personatlas.persona.artifacts import make_folder
    from personatlas.persona.paper_files import import_axis, import_caps
    from personatlas.persona.roles.paper_bank import import_bank, write_bank

    described = {"id": model}
    if kind == "roles":
        bank = import_bank(source)
        write_bank(bank, out)
        print_line(
            f"{len(bank.roles)} roles, {len(bank.questions)} questions and {len(bank.traits)} traits written to {out}"
        )
        return
    if kind == "axis":
        found = import_axis(source, described)
        make_folder(out.parent, "--out")
        found.save(out)
        print_line(
            f"axis of {len(found.layers)} layers, width {found.vectors.shape[1]}, written to {out}.safetensors"
        )
        return
    caps = import_caps(source, described)
    make_folder(out, "--out")
    names = [name.replace("/", "_") for name in caps]
    for name, cap in zip(names, caps.values(), strict=True):
        cap.save(out / name)
    print_line(f"{len(caps)} caps written to {out}: {', '.join(names)}")


def _require_bank(manifest: dict[str, Any], bank: Bank, run: Path) -> None:
    asked = manifest.get("asked", {})
    for what, name, digest in (("bank", "bank", bank.digest), ("traits", "traits_bank", bank.traits_digest)):
        if asked.get(name) and asked[name] != digest:
            raise UserError(
                f"{run} was made with {what} {asked[name][:12]}, not {digest[:12]}; name the bank's folder with --bank"
            )
