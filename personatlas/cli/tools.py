"""The commands `tools spans`, `show`, `import` and `self-test`."""

import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from rich.text import Text

from personatlas.cli.options import MODEL, STEERING, Json, ModelName, OutFile, SteeringOptions
from personatlas.cli.output import console, print_json, print_line, print_table
from personatlas.persona.errors import UserError
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import find_axis

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from personatlas.persona.models.token_spans import Spans

COLOURS = {"system": "magenta", "user": "cyan", "assistant": "green", "tool": "yellow", "template": "dim"}


def spans(
    model: ModelName,
    /,
    *,
    transcript: Path | None = None,
    system: str = "You are a pirate.",
    user: str = "Who are you?",
    assistant: str = "Arr, I be a pirate.",
    chat_template: Path | None = None,
    json: Json = False,
) -> None:
    """Show which speaker a chat template gives each token to, coloured by speaker.

    Parameters
    ----------
    transcript
        a stored conversation instead of the three messages below, in any form that `trace` reads
    system
        system message; "" sends none
    user
        user message
    assistant
        assistant message
    chat_template
        a Jinja file instead of the tokenizer's chat template
    """
    from personatlas.persona.formats import read_conversations
    from personatlas.persona.models.chat_template import chat_format
    from personatlas.persona.models.load import load_tokenizer
    from personatlas.persona.models.token_spans import conversation_spans

    texts = {"system": system, "user": user, "assistant": assistant}
    messages = [{"role": role, "content": text} for role, text in texts.items() if text]
    if transcript is not None:
        if texts != {
            "system": "You are a pirate.",
            "user": "Who are you?",
            "assistant": "Arr, I be a pirate.",
        }:
            raise UserError("--transcript has its own messages: leave out --system, --user and --assistant")
        stored = read_conversations(transcript, require_user=False)
        messages = list(stored[0].messages)
        if len(stored) > 1:
            say(f"{transcript}: the first of {len(stored)} conversations is shown")
    tokenizer = load_tokenizer(model, chat_template)
    chat = chat_format(tokenizer)
    found = conversation_spans(chat, messages)
    if json:
        tokens = [
            {"id": id, "text": piece, "speaker": speaker}
            for id, piece, speaker in zip(found.ids, found.pieces, found.speakers(), strict=True)
        ]
        print_json({"injected": chat.injected, "system": chat.system, "tokens": tokens})
        return
    console().print(render_spans(found, tokenizer))
    if chat.injected and not any(message["role"] == "system" for message in messages):
        print_line(f"the template adds a system message of its own: {chat.injected!r}")
    if chat.system == "merged":
        print_line("the template takes no system message: its text goes before the first user message")


def render_spans(spans: "Spans", tokenizer: "PreTrainedTokenizerBase") -> Text:
    """Tokens coloured by speaker, separated by ▏, newlines as ⏎, control characters escaped, with a legend.

    A token that only continues a character is shown by its name in the tokenizer's vocabulary.
    """
    text = Text()
    for speaker, colour in COLOURS.items():
        text.append(speaker, style=colour).append(" ")
    text.append("▏ between tokens, ⏎ newline\n\n", style="dim")
    for id, piece, speaker in zip(spans.ids, spans.pieces, spans.speakers(), strict=True):
        name = piece or f"⟨{tokenizer.convert_ids_to_tokens(id)}⟩"
        text.append("".join(map(_visible, name)), style=COLOURS[speaker]).append("▏", style="dim")
    return text


def _visible(character: str) -> str:
    """A newline as ⏎ and a newline; another control, format or unassigned character as its escape."""
    if character == "\n":
        return "⏎\n"
    hidden = unicodedata.category(character) in {"Cc", "Cf", "Co", "Cn", "Cs", "Zl", "Zp"}
    return character.encode("unicode-escape").decode() if hidden else character


def show(path: Path, /) -> None:
    """Print any artefact or run folder as JSON: what it is, its shapes, and where it came from.

    Parameters
    ----------
    path
        a run folder, or an artefact with or without its ending
    """
    from personatlas.persona.artifacts import load_tensors, read_object
    from personatlas.persona.axis import Axis, PersonaSpace
    from personatlas.persona.interventions import Cap
    from personatlas.persona.pipeline.activations import Activations
    from personatlas.persona.roles.traits import TraitSpace
    from personatlas.persona.runs import read_manifest

    if path.is_dir():
        if not (path / "run.json").is_file():
            raise UserError(f"{path} is not a run folder: it has no run.json")
        files = {
            file.name: file.stat().st_size for file in sorted(path.iterdir()) if not file.name.startswith(".")
        }
        print_json({**read_manifest(path), "files": files})
        return
    stem = path.with_suffix("") if path.suffix in (".json", ".safetensors") else path
    record_path, tensor_path = stem.with_name(stem.name + ".json"), stem.with_name(stem.name + ".safetensors")
    if not record_path.is_file():
        raise UserError(f"{path} is neither a run folder nor an artefact (there is no {record_path.name})")
    content = read_object(record_path)
    if tensor_path.is_file():
        kinds = {record.kind: record for record in (Axis, PersonaSpace, Cap, TraitSpace, Activations)}
        if (kind := content.get("kind")) in kinds:
            kinds[kind].load(stem)
        else:
            load_tensors(stem, str(kind))
    print_json(content)


def import_(
    kind: Literal["axis", "caps", "roles"],
    source: Path,
    /,
    *,
    out: OutFile,
    model: str = "unknown",
    json: Json = False,
) -> None:
    """Convert the files of the paper's repository; signs are turned where theirs are opposite.

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
    from personatlas.persona.artifacts import make_folder, require_file_names
    from personatlas.persona.paper_files import import_axis, import_caps
    from personatlas.persona.roles.paper_bank import import_bank, write_bank

    result: dict[str, object]
    if kind == "roles":
        bank = import_bank(source)
        write_bank(bank, out)
        result = {"roles": len(bank.roles), "questions": len(bank.questions), "traits": len(bank.traits)}
        text = f"{len(bank.roles)} roles, {len(bank.questions)} questions and {len(bank.traits)} traits"
    elif kind == "axis":
        require_file_names([out.name], "--out")
        axis = import_axis(source, {"id": model})
        make_folder(out.parent, "--out")
        axis.save(out)
        result = {"layers": list(axis.layers), "width": axis.vectors.shape[1]}
        text = f"axis of {len(axis.layers)} layers, width {axis.vectors.shape[1]},"
    else:
        found = import_caps(source, {"id": model})
        names = [name.replace("/", "_") for name in found]
        require_file_names(names, str(source))
        caps = dict(zip(names, found.values(), strict=True))
        make_folder(out, "--out")
        for name, cap in caps.items():
            cap.save(out / name)
        result, text = {"caps": list(caps)}, f"{len(caps)} caps"
    if json:
        print_json({"kind": kind, "out": str(out), **result})
        return
    print_line(f"{text} written to {out}{'.safetensors' if kind == 'axis' else ''}")
    if kind == "caps":
        print_line("caps: " + ", ".join(caps))


def self_test(
    model: ModelName,
    /,
    *,
    steering: Annotated[SteeringOptions, STEERING] = SteeringOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Test that recording binds on this machine, and with --axis or --arm that steering does, in the sampling
    engine.

    Exits with status 2 when any check fails.
    """
    from personatlas.persona.models.load import load_model
    from personatlas.persona.pipeline.self_test import run_self_test

    if steering.axis is None and not steering.arm:
        decoder = load_model(model, device=load.device, dtype=load.dtype, chat_template=load.chat_template)
        checks = run_self_test(decoder)
    else:
        from personatlas.steering.hooks.binding_check import check_binding, run_cap_test
        from personatlas.steering.session import load_steered_model

        axis = find_axis(model, steering.axis)
        steered = load_steered_model(model, axis, steering.arm, load, force=steering.force)
        checks = [*run_self_test(steered.model), *run_cap_test(steered.model, steered.axis)]
        for name, plan in steered.steered_arms.items():
            own = check_binding(steered.model, plan)
            checks += [replace(check, name=f"{name}: {check.name}") for check in own]
    if json:
        print_json([check.to_json() for check in checks])
    else:
        rows = [
            (
                Text("ok", style="green") if check.passed else Text("FAILED", style="bold red"),
                f"{check.found:.3g}",
                f"{check.allowed:.3g}",
                check.name,
            )
            for check in checks
        ]
        print_table(["", "found", "allowed", "check"], rows, left=(0, 3))
    failed = [check.name for check in checks if not check.passed]
    if failed:
        raise UserError(f"self-test of {model} failed: {', '.join(failed)}")
