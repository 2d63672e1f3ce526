"""The verb `replay`: stored conversations asked again, with a cap off and on."""

from pathlib import Path
from typing import Annotated, Any

from rich.table import Table
from rich.text import Text

from personatlas.cli.options import MODEL, Json, ModelName
from personatlas.cli.output import console, print_json, print_path
from personatlas.persona.options import ModelOptions
from personatlas.persona.progress import say
from personatlas.persona.runs import default_folder
from personatlas.steering.drift.replay import ReplayOptions

SHORT = 44  # characters of what a user says
SHOWN = 10  # conversations in the terminal


def replay(
    model: ModelName,
    chats: Path,
    /,
    *,
    axis: str,
    cap: str = "assistant",
    out: Path | None = None,
    html: Path | None = None,
    force: bool = False,
    asked: ReplayOptions = ReplayOptions(),
    load: Annotated[ModelOptions, MODEL] = ModelOptions(),
    json: Json = False,
) -> None:
    """Ask the user turns of stored conversations again, as the model is and capped, beside the stored answers (resumes).

    Parameters
    ----------
    chats
        conversations in OpenAI's or ShareGPT's form, JSON or JSONL, or one as plain text (.txt: "User: ...", "Assistant: ...")
    axis
        a run folder, an axis file, or smollm2-135m for the axis that comes with it
    cap
        a cap by name, file or LEVEL@LAYERS
    out
        the folder of the answers and of replay.json; runs/NAME-replay unless given
    html
        write a page here with the answers of all arms beside each other (20 conversations at most)
    force
        use an axis of the same model in another weight format
    """
    from personatlas.persona.artifacts import require_writable
    from personatlas.steering.drift.replay import replay as ask
    from personatlas.steering.drift.replay_page import write_replay_page

    if html is not None:
        require_writable(html, "--html")
    folder = out or default_folder(model, "replay")
    content = ask(model, load, chats, axis, cap, asked, folder, force=force)
    print_json(content) if json else _print(content, folder)
    if html is not None:
        write_replay_page(html, content)
        say(f"page: {html}")


def _print(content: dict[str, Any], folder: Path) -> None:
    out, arms = console(), content["arms"]
    for one in content["conversations"][:SHOWN]:
        table = Table(title=one["name"], title_justify="left")
        for title in ("turn", "the user says", *arms):
            table.add_column(title, justify="left" if title == "the user says" else "right")
        for number, user in enumerate(one["users"], 1):
            cells = [_cell(one["arms"].get(arm, {}).get(str(number))) for arm in arms]
            if any(cells):
                said = " ".join(user.split())
                table.add_row(
                    str(number), Text(said if len(said) <= SHORT else f"{said[: SHORT - 1]}…"), *cells
                )
        out.print(table)
        if one["cut_short"]:
            say(
                f"{one['name']}: {', '.join(one['cut_short'])} filled the model's context before the last turn"
            )
    more = len(content["conversations"]) - SHOWN
    if more > 0:
        out.print(Text(f"and {more} conversations more", style="dim"))
    for arm, row in content["means"].items():
        change = row["change"]
        told = f" [{change['low']:+.1f}, {change['high']:+.1f}]" if change["low"] is not None else ""
        beside = (
            ""
            if arm == "baseline" or change["value"] is None
            else f", {change['value']:+.1f}{told} beside baseline"
        )
        if row["value"] is not None:
            out.print(Text(f"{arm}: mean projection {row['value']:.1f} over {row['n']} answers{beside}"))
    baseline = content["baseline"]
    out.print(Text(f"layer {content['layer']}; z against {baseline['of']}: {baseline['mean']:.1f} ± {baseline['spread']:.1f}; * the alarm is on, + the cap acted", style="dim"))  # fmt: skip
    print_path("every answer", folder / "replay.json")


def _cell(row: dict[str, Any] | None) -> str:
    """An answer's projection, its z, and what was on."""
    if row is None:
        return ""
    if row["projection"] is None:
        return "empty"
    marks = ("*" if row.get("alarm") else "") + ("+" if row["acted"] else "")
    return f"{row['projection']:.1f} (z {row['z']:+.1f}){marks}"
