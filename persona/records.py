"""Frozen dataclasses that are stored as JSON objects.

    >>> @dataclass(frozen=True)
    ... class Share(JsonRecord):
    ...     value: float | None
    ...     interval: tuple[float, float] | None = None
    >>> Share.from_json(Share(0.5, (0.4, 0.6)).to_json())
    Share(value=0.5, interval=(0.4, 0.6))

A field is a key of the same name; tuples become lists, nested records objects, paths strings, and numbers
that are not finite null, since JSON has none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

JsonObject = dict[str, Any]  # what json.loads gives for an object
Record = TypeVar("Record", bound="JsonRecord")


@dataclass(frozen=True)
class JsonRecord:
    """Base of the dataclasses that `to_json` turns into a JSON object and `from_json` reads back.

    `omit_none` names the fields without a key while they are None, `json_names` the keys of fields named
    otherwise.
    """

    omit_none: ClassVar[tuple[str, ...]] = ()
    json_names: ClassVar[Mapping[str, str]] = {}

    def to_json(self) -> JsonObject:
        """A JSON object with the fields' names as keys."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            self.json_names.get(name, name): json_value(value)
            for name, value in values.items()
            if value is not None or name not in self.omit_none
        }

    @classmethod
    def from_json(cls: type[Record], row: Mapping[str, Any]) -> Record:
        """The record that `to_json` wrote. Keys that are no fields are ignored; raises KeyError for a missing
        one.
        """
        hints: dict[str, Any] = _hints(cls)  # type: ignore[arg-type]
        values: dict[str, Any] = {}
        for field in fields(cls):
            key = cls.json_names.get(field.name, field.name)
            value = row.get(key) if field.name in cls.omit_none else row[key]
            values[field.name] = _read(hints[field.name], value)
        return cls(**values)


def json_object(content: Mapping[str, object]) -> JsonObject:
    """The content as a JSON object: numbers that are not finite are null."""
    return {key: json_value(value) for key, value in content.items()}


def json_value(value: object) -> object:
    """A value as JSON can hold it: records, mappings, sequences, paths, strings and numbers."""
    if isinstance(value, JsonRecord):
        return value.to_json()
    if isinstance(value, Mapping):
        return json_object(value)
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _read(hint: Any, value: Any) -> Any:
    """The value of a field with this annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if value is None and hint is float:  # what to_json made of NaN
        return math.nan
    if value is None or not (origin or isinstance(hint, type)):
        return value
    if origin in (Union, UnionType):
        inner = [argument for argument in arguments if argument is not NoneType]
        return _read(inner[0], value) if len(inner) == 1 else value
    if origin in (tuple, list, Sequence):
        is_uniform = origin is not tuple or arguments[-1] is ...
        inner = [arguments[0]] * len(value) if is_uniform else list(arguments)
        items = [_read(item_hint, item) for item_hint, item in zip(inner, value, strict=True)]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        return {key: _read(arguments[1], item) for key, item in value.items()}
    if isinstance(hint, type) and issubclass(hint, JsonRecord):
        return hint.from_json(value)
    return Path(value) if hint is Path else value
