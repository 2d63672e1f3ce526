"""The command `roles`: list, search, show, check and export a bank of roles, traits and questions."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from rich.text import Text

from personatlas.cli.options import OPTIONS, Json, OutFile
from personatlas.cli.output import Cell, console, print_fields, print_json, print_line, print_table
from personatlas.persona.errors import UserError, not_one_of
from personatlas.persona.roles.bank import Bank, Question, Role, Trait, check_file, load_bank

Entry = Role | Trait | Question


@dataclass(frozen=True)
class BankView:
    """Which entries of a bank to list."""

    traits: bool = False
    "traits instead of roles"
    questions: bool = False
    "questions instead of roles"
    tag: tuple[str, ...] = ()
    "only entries with this tag; several narrow the list down"
    search: str | None = None
    "only entries with these words in their name, prompts or rubric"


def roles(
    name: str | None = None,
    /,
    *,
    bank: Path | None = None,
    view: Annotated[BankView, OPTIONS] = BankView(),
    check: Path | None = None,
    export: OutFile | None = None,
    json: Json = False,
) -> None:
    """List a role bank, show one role or trait, check a bank of your own, or export a bank.

    Parameters
    ----------
    name
        show this role (or trait) with its prompts and rubric
    bank
        a bank's folder instead of the packaged bank; the paper repository's form is read too
    check
        validate a bank's folder, or one of its files; an error names its line
    export
        write the bank into this folder in the paper repository's form, one JSON file a role
    """
    given = {"NAME": name, "--check": check, "--export": export}
    if len(asked := [option for option, value in given.items() if value is not None]) > 1:
        raise UserError(f"{asked[0]} and {asked[1]} are two things to do: give one")
    if asked and view != BankView():
        raise UserError(f"--traits, --questions, --tag and --search list a bank: leave out {asked[0]}")
    if view.traits and view.questions:
        raise UserError("--traits and --questions are two lists: give one")
    if check is not None:
        _check(check, json)
        return
    found = load_bank(bank)
    if export is not None:
        _export(found, export, json)
    elif name is not None:
        _show(found, name, json)
    else:
        _list(found, view, json)


def _list(bank: Bank, view: BankView, json: bool) -> None:
    entries: Sequence[Entry] = (
        bank.questions if view.questions else bank.traits if view.traits else bank.roles
    )
    tags = {tag for entry in entries for tag in entry.tags}
    if unknown := sorted(set(view.tag) - tags):
        raise UserError(f"--tag {not_one_of(unknown[0], sorted(tags))}")
    words = (view.search or "").casefold().split()
    entries = [
        entry
        for entry in entries
        if set(view.tag) <= set(entry.tags)
        and all(word in " ".join(map(str, asdict(entry).values())).casefold() for word in words)
    ]
    if json:
        print_json([asdict(entry) for entry in entries])
        return
    rows = [_cells(entry) for entry in entries]
    if view.questions:
        print_table(["id", "tags", "question"], rows, left=(0, 1, 2))
    else:
        print_table(["trait" if view.traits else "role", "prompts", "tags"], rows, left=(0, 2))
    counts = ", ".join(f"{n} {name}" for name, n in _counts(bank).items())
    print_line(f"{len(entries)} shown; the bank has {counts}")
    print_line(f"content {bank.digest[:12]}, traits {bank.traits_digest[:12]}")


def _cells(entry: Entry) -> tuple[str, str, str]:
    tags = " ".join(entry.tags)
    if isinstance(entry, Question):
        return entry.id, tags, entry.question
    if isinstance(entry, Trait):
        return entry.name, f"{len(entry.positive)} + {len(entry.negative)}", tags
    return entry.name, str(len(entry.prompts)), tags


def _check(path: Path, json: bool) -> None:
    if path.is_file():
        rows = check_file(path)
        print_json({"file": str(path), "rows": rows}) if json else print_line(f"{path}: {rows} rows, valid")
        return
    bank = load_bank(path)
    tags = Counter(tag for role in bank.roles for tag in role.tags)
    few = [role.name for role in bank.roles if len(role.prompts) < 5 and not role.is_default]
    counts = _counts(bank)
    if json:
        print_json({"folder": str(path), **counts, "tags": dict(tags.most_common()), "few_prompts": few})
        return
    print_line(f"{path}: {', '.join(f'{n} {name}' for name, n in counts.items())}, valid")
    if tags:
        print_line("tags: " + ", ".join(f"{tag} {n}" for tag, n in tags.most_common()))
    if few:
        print_line(
            f"{len(few)} roles have fewer than 5 prompts (more make the axis steadier): {', '.join(few[:8])}"
        )


def _counts(bank: Bank) -> dict[str, int]:
    return {"roles": len(bank.roles), "questions": len(bank.questions), "traits": len(bank.traits)}


def _export(bank: Bank, folder: Path, json: bool) -> None:
    from personatlas.persona.roles.paper_bank import export_bank

    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder; export into a new one")
    export_bank(bank, folder)
    counts = _counts(bank)
    if json:
        print_json({"folder": str(folder), **counts})
    else:
        text = ", ".join(f"{n} {name}" for name, n in counts.items())
        print_line(f"{text} written to {folder} in the paper repository's form (tags are not part of it)")


def _show(bank: Bank, name: str, json: bool) -> None:
    traits = {trait.name: trait for trait in bank.traits}
    is_role = name not in traits or any(role.name == name for role in bank.roles)
    entry = bank.role(name) if is_role else traits[name]
    if json:
        print_json([asdict(entry)])
        return
    console().print(Text(entry.name, style="bold"), Text(" ".join(entry.tags), style="dim"))
    rows: list[tuple[str, Cell]] = []
    sides = {"": entry.prompts} if isinstance(entry, Role) else {"+": entry.positive, "-": entry.negative}
    for sign, prompts in sides.items():
        for number, prompt in enumerate(prompts):
            rows.append((f"{sign}{number}", prompt or "(no system message)"))
    print_fields([*rows, ("rubric", Text(entry.rubric, style="italic"))])
