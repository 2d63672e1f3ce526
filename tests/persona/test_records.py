"""Dataclasses as JSON and back."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from personatlas.persona.records import JsonRecord


@dataclass(frozen=True)
class Share(JsonRecord):
    value: float | None
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Table(JsonRecord):
    omit_none = ("note",)
    arms: dict[str, Share]
    order: tuple[Share, ...]
    file: Path
    note: str | None = None


def test_a_record_comes_back_from_json_as_it_was():
    table = Table({"cap": Share(0.5, (0.4, 0.6))}, (Share(1.0), Share(None)), Path("a/b"), "seen")
    assert Table.from_json(json.loads(json.dumps(table.to_json()))) == table


def test_numbers_that_json_lacks_are_null_and_optional_keys_are_left_out():
    row = Table({}, (Share(float("nan"), (0.0, float("inf"))),), Path("x")).to_json()
    assert row == {"arms": {}, "order": [{"value": None, "interval": [0.0, None]}], "file": "x"}
    assert Table.from_json(row | {"later": 1}).note is None


@dataclass(frozen=True)
class Named(JsonRecord):
    json_names: ClassVar = {"reason": "why"}
    omit_none = ("reason",)
    reason: str | None = None


def test_a_field_can_have_a_key_of_another_name():
    assert Named("tested").to_json() == {"why": "tested"}
    assert Named.from_json({"why": "tested"}) == Named("tested")
    assert Named().to_json() == {}
    assert Named.from_json({}) == Named()
