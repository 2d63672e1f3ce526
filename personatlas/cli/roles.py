"""The verb `roles`: look into a bank, check one of your own, and write it in the paper repository's form."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from personatlas.cli.options import Json
from personatlas.cli.output import console, print_json, print_line
from personatlas.persona.errors import UserError
from personatlas.persona.roles.bank import Bank, Question, Role, Trait, check_file, load_bank

Entry = Role | Trait | Question


@Parameter(name="*")
@dataclass(frozen=True)
class View:
    """What of a bank to see."""

    traits: bool = False
    "traits in place of roles"
    questions: bool = False
    "questions in place of roles"
    tag: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ()
    "only what has this tag; several narrow it down"
    search: str | None = None
    "only what has these words in its name, prompts or rubric"


def roles(
    name: str | None = None,
    /,
    *,
    bank: Path | None = None,
    view: View = View(),
    check: Path | None = None,
    export: Path | None = None,
    json: Json = False,
) -> None:
    """Look into a role bank: list it, show one role or trait, check a bank of your own, export it.

    Parameters
    ----------
    name
        show this role (or trait) with its prompts and rubric
    bank
        a bank's folder in place of the packaged bank; the paper repository's form is read too
    check
        validate a bank's folder, or one of its files; a mistake is named with its line
    export
        write the bank into this folder in the paper repository's form, one JSON file a role
    """
    if check is not None:
        _check(check)
        return
    found = load_bank(bank)
    if export is not None:
        _export(found, export)
    elif name is not None:
        _show(_named(found, name), json)
    else:
        _list(found, view, json)


def _list(bank: Bank, view: View, json: bool) -> None:
    entries: Sequence[Entry] = (
        bank.questions if view.questions else bank.traits if view.traits else bank.roles
    )
    tags = {own for entry in entries for own in entry.tags}
    if unknown := sorted(set(view.tag) - tags):
        raise UserError(f"nothing has the tag {unknown[0]!r}; there are {', '.join(sorted(tags))}")
    chosen = [
        entry for entry in entries if set(view.tag) <= set(entry.tags) and _holds(entry, view.search or "")
    ]
    if json:
        print_json([asdict(entry) for entry in chosen])
        return
    console().print(_table(chosen))
    counts = f"{len(bank.roles)} roles, {len(bank.questions)} questions, {len(bank.traits)} traits"
    print_line(f"{len(chosen)} shown; the bank has {counts}")
    print_line(f"content {bank.digest[:12]}, traits {bank.traits_digest[:12]}")


def _check(path: Path) -> None:
    if path.is_file():
        print_line(f"{path}: {check_file(path)} rows, no mistake")
        return
    bank = load_bank(path)
    counts = Counter(tag for role in bank.roles for tag in role.tags)
    print_line(
        f"{path}: {len(bank.roles)} roles, {len(bank.questions)} questions, {len(bank.traits)} traits, no mistake"
    )
    if counts:
        print_line("tags: " + ", ".join(f"{tag} {n}" for tag, n in counts.most_common()))
    few = [role.name for role in bank.roles if len(role.prompts) < 5 and not role.is_default]
    if few:
        print_line(
            f"{len(few)} roles have fewer than 5 prompts (the axis is steadier with several): {', '.join(few[:8])}"
        )


def _export(bank: Bank, folder: Path) -> None:
    from personatlas.persona.roles.paper_bank import export_bank

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; export into a new one")
    export_bank(bank, folder)
    counts = f"{len(bank.roles)} roles, {len(bank.questions)} questions and {len(bank.traits)} traits"
    print_line(f"{counts} written to {folder} in the paper repository's form (tags are not part of it)")


def _named(bank: Bank, name: str) -> Role | Trait:
    trait = next((trait for trait in bank.traits if trait.name == name), None)
    if trait is not None and not any(role.name == name for role in bank.roles):
        return trait
    return bank.role(name)


def _show(entry: Role | Trait, json: bool) -> None:
    if json:
        print_json([asdict(entry)])
        return
    out = console()
    out.print(Text(entry.name, style="bold"), Text(" ".join(entry.tags), style="dim"))
    sides = {"": entry.prompts} if isinstance(entry, Role) else {"+": entry.positive, "-": entry.negative}
    for sign, prompts in sides.items():
        for number, prompt in enumerate(prompts):
            out.print(Text(f"{sign}{number}  {prompt or '(no system message)'}"))
    out.print(Text(f"rubric  {entry.rubric}", style="italic"))


def _holds(entry: Entry, words: str) -> bool:
    text = " ".join(str(value) for value in asdict(entry).values()).casefold()
    return all(word in text for word in words.casefold().split())


def _table(entries: Sequence[Entry]) -> Table:
    head = {Role: ("role", "prompts"), Trait: ("trait", "prompts"), Question: ("id", "question")}
    table = Table(*head[type(entries[0])] if entries else ("role", "prompts"), "tags")
    for entry in entries:
        table.add_row(*(Text(cell) for cell in _cells(entry)), Text(" ".join(entry.tags)))
    return table


def _cells(entry: Any) -> tuple[str, str]:
    if isinstance(entry, Question):
        return entry.id, entry.question
    if isinstance(entry, Trait):
        return entry.name, f"{len(entry.positive)} + {len(entry.negative)}"
    return entry.name, str(len(entry.prompts))
