"""Frozen dataclasses that are stored as JSON objects, and the one strict parser of our own JSON.

    >>> @dataclass(frozen=True)
    ... class Share(JsonRecord):
    ...     value: Fraction | None
    ...     interval: Ends | None = None
    >>> Share.from_json(Share(0.5, (0.4, 0.6)).to_json())
    Share(value=0.5, interval=(0.4, 0.6))

A field is a key of the same name; tuples become lists, nested records objects, paths strings, and numbers
that are not finite null, since JSON has none. The annotations are the schema: `from_json` checks every value
against them, and what `__post_init__` refuses is refused there too.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from personatlas.persona.errors import describe_value

JsonObject = dict[str, Any]  # what decode_json gives for an object
DEEPEST = 64  # levels of nesting; our own files have fewer than ten
LARGEST = 2.0**63  # of a number


class Bounds(NamedTuple):
    """What a number may be, both ends included, and whether it may be NaN."""

    low: float = -LARGEST
    high: float = LARGEST
    nan: bool = False

    def __str__(self) -> str:
        if self.low == -LARGEST:
            return "a finite number"
        return f"a number from {self.low:g}" + (f" to {self.high:g}" if self.high < LARGEST else "")


def check_interval(values: tuple[float | int, float | int]) -> None:
    """Raises `ValueError` for an interval that ends before it begins; NaN is an end that is not known."""
    if values[0] > values[1]:
        raise ValueError(f"{values[0]:g} to {values[1]:g} is no interval")


def check_ascending(values: Sequence[int] | Sequence[float]) -> None:
    """Raises `ValueError` for values of which one is not above the one before."""
    if any(not before < value for before, value in pairwise(values)):
        raise ValueError("its values do not ascend")


def check_distinct(values: Sequence[object]) -> None:
    """Raises `ValueError` for a value that is there twice."""
    if len(set(values)) != len(values):
        twice = next(value for value in values if list(values).count(value) > 1)
        raise ValueError(f"it has {str(twice)[:60]!r} twice")


Count = Annotated[int, Bounds(0)]
Positive = Annotated[int, Bounds(1)]
Number = Annotated[float, Bounds()]
NonNegative = Annotated[float, Bounds(0.0)]
Fraction = Annotated[float, Bounds(0.0, 1.0)]
Cosine = Annotated[float, Bounds(-1.0 - 1e-6, 1.0 + 1e-6)]
NonNegativeOrNaN = Annotated[float, Bounds(0.0, nan=True)]
FractionOrNaN = Annotated[float, Bounds(0.0, 1.0, nan=True)]
CosineOrNaN = Annotated[float, Bounds(-1.0 - 1e-6, 1.0 + 1e-6, nan=True)]
Ends = Annotated[tuple[float, float], check_interval]
Layers = Annotated[tuple[Count, ...], check_ascending]
Names = Annotated[tuple[str, ...], check_distinct]
Record = TypeVar("Record", bound="JsonRecord")


class FieldError(ValueError):
    """A value that a record cannot hold: where it is, what it is, and what is allowed."""

    def __init__(self, problem: str, *place: str) -> None:
        self.problem, self.place = problem, place
        path = "".join(f"[{part}]" if part.isdigit() else f".{part}" for part in place).removeprefix(".")
        super().__init__(f"{path}{problem}" if path else problem.lstrip(": "))


@dataclass(frozen=True)
class JsonRecord:
    """Base of the dataclasses that `to_json` turns into a JSON object and `from_json` reads back.

    `omit_none` names the fields without a key while they are None, `json_names` the keys of fields named
    otherwise, and `optional` the fields that a file may lack: those get their default.
    """

    omit_none: ClassVar[tuple[str, ...]] = ()
    json_names: ClassVar[Mapping[str, str]] = {}
    optional: ClassVar[tuple[str, ...]] = ()

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
        """The record that `to_json` wrote. Keys that are no fields are ignored; raises `FieldError` for the
        first value that is missing or that its field cannot hold.
        """
        hints, values = type_hints(cls), dict[str, Any]()
        for field in fields(cls):
            key = cls.json_names.get(field.name, field.name)
            if key in row:
                values[field.name] = _read_at(key, hints[field.name], row[key])
            elif field.name in cls.omit_none:
                values[field.name] = None
            elif field.name not in cls.optional:
                raise FieldError(" is missing", key)
        low, high = values.get("low"), values.get("high")
        if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
            raise FieldError(f": {low:g} to {high:g} is no interval", "low")
        try:
            return cls(**values)
        except FieldError:
            raise
        except ValueError as error:
            raise FieldError(f": {error}") from None


@dataclass(frozen=True)
class _Facts(JsonRecord):
    id: str | None = None
    weights: str | None = None
    fingerprint: str | None = None
    revision: str | None = None
    n_layers: Positive | None = None
    d_model: Positive | None = None

    omit_none: ClassVar[tuple[str, ...]] = ("id", "weights", "fingerprint", "revision", "n_layers", "d_model")


ModelFacts = Annotated[JsonObject, _Facts]  # Model.describe(), as far as it is known


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


_HINTS: dict[type, JsonObject] = {}


def type_hints(cls: type) -> JsonObject:
    """The annotations of a record's fields with their checks."""
    if cls not in _HINTS:
        _HINTS[cls] = get_type_hints(cls, include_extras=True)
    return _HINTS[cls]


def read_field(row: Mapping[str, object], name: str, hint: object) -> Any:
    """The value under a key as an annotation means it. Raises `FieldError` for a missing or another one."""
    if name not in row:
        raise FieldError(" is missing", name)
    return _read_at(name, hint, row[name])


def check_fields(row: Mapping[str, object], hints: Mapping[str, object]) -> None:
    """Raises `FieldError` for a value that the annotation of its key does not allow; missing and null ones
    pass.

    An annotation may be a mapping of further ones, for an object.
    """
    for name, hint in hints.items():
        if row.get(name) is not None:
            value = read_field(row, name, JsonObject if isinstance(hint, Mapping) else hint)
            if isinstance(hint, Mapping):
                try:
                    check_fields(value, hint)
                except FieldError as error:
                    raise FieldError(error.problem, name, *error.place) from None


def _read_value(hint: Any, value: Any) -> Any:
    """The value as this annotation means it. Raises `FieldError` for one that it does not allow."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _read_annotated(arguments[0], arguments[1:], value)
    if hint in (Any, object):
        return value
    if origin in (Union, UnionType):
        if value is None and NoneType in arguments:
            return None
        problems = []
        for kind in arguments:
            try:
                if kind is not NoneType:
                    return _read_value(kind, value)
            except FieldError as error:
                problems.append(error)
        raise problems[0]
    if origin is Literal:
        if value not in arguments or isinstance(value, bool):
            raise FieldError(f" is {_shown(value)}, not one of {', '.join(map(repr, arguments))}")
        return value
    if origin in (tuple, list, Sequence):
        return _read_items(origin, arguments, value)
    if origin in (dict, Mapping):
        if not isinstance(value, dict):
            raise FieldError(f" is {_shown(value)}, not an object")
        return {key: _read_at(key, arguments[1], item) for key, item in value.items()}
    if hint is float and value is None:  # what to_json made of NaN
        return math.nan
    if hint in (float, int):
        if isinstance(value, bool) or not isinstance(value, (int, float) if hint is float else int):
            raise FieldError(f" is {_shown(value)}, not a {'number' if hint is float else 'whole number'}")
        if abs(value) > LARGEST:
            raise FieldError(" is a number beyond 2^63")
    elif isinstance(hint, type) and issubclass(hint, JsonRecord) and isinstance(value, dict):
        return hint.from_json(value)
    elif hint is Path and isinstance(value, str):
        return Path(value)
    elif isinstance(hint, type) and not isinstance(value, hint):
        named = {str: "text", bool: "true or false"}.get(hint, "an object")
        raise FieldError(f" is {_shown(value)}, not {named}")
    return value


def _read_at(part: object, hint: Any, value: Any) -> Any:
    try:
        return _read_value(hint, value)
    except FieldError as error:
        raise FieldError(error.problem, str(part), *error.place) from None


def _read_annotated(hint: Any, checks: Sequence[Any], value: Any) -> Any:
    value = _read_value(hint, value)
    for check in checks:
        if isinstance(check, Bounds):
            if not (check.low <= value <= check.high or (check.nan and value != value)):
                raise FieldError(f" is {'null' if value != value else _shown(value)}, not {check}")
        elif isinstance(check, type) and issubclass(check, JsonRecord):
            check.from_json(value)
        elif callable(check):
            try:
                check(value)
            except ValueError as error:
                raise FieldError(f": {error}") from None
    return value


def _read_items(origin: Any, hints: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, list | tuple):
        raise FieldError(f" is {_shown(value)}, not a list")
    is_uniform = origin is not tuple or hints[-1] is ...
    if not is_uniform and len(value) != len(hints):
        raise FieldError(f" has {len(value)} values, not {len(hints)}")
    inner = [hints[0]] * len(value) if is_uniform else hints
    if is_uniform and hints[0] is int and all(type(item) is int for item in value):  # ids, in their millions
        inner, items = (), list(value)
    else:
        items = [_read_at(i, own, item) for i, (own, item) in enumerate(zip(inner, value, strict=True))]
    return items if origin is list else tuple(items)


def _shown(value: object) -> str:
    if isinstance(value, str):
        return repr(value[:40])
    return "null" if value is None else describe_value(value)[:60]


class StrictDecoder(json.JSONDecoder):
    """Refuses, with `ValueError`, what JSON has not or has no meaning: NaN, infinity, a key that stands
    twice.

    `bounded` looks at every integer too, which is slow where there are many.
    """

    def __init__(self, *, bounded: bool = False) -> None:
        super().__init__(
            object_pairs_hook=self.to_dict,
            parse_constant=self.to_number,
            parse_float=self.to_number,
            parse_int=self.to_integer if bounded else None,
        )

    @staticmethod
    def to_dict(pairs: list[tuple[str, object]]) -> JsonObject:
        """An object, by its pairs."""
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice[:60]!r} stands there twice")
        return found

    @staticmethod
    def to_number(text: str) -> float:
        """A finite number."""
        if not math.isfinite(value := float(text)):
            raise ValueError(f"{text[:20]} is no number of JSON")
        return value

    @staticmethod
    def to_integer(text: str) -> int:
        """An integer of 64 bits."""
        if len(text) > 20 or abs(value := int(text)) > LARGEST:
            raise ValueError(f"{text[:20]}... is beyond 2^63")
        return value


DECODER = StrictDecoder()
BOUNDED_DECODER = StrictDecoder(bounded=True)
MANY_DIGITS = re.compile(r"\d{19}")


def decode_json(text: str | bytes) -> object:
    """The value of a JSON text of our own. Raises `ValueError`, in one line, for anything that we never
    write: what `StrictDecoder` refuses, integers beyond 2^63, half a character, nesting beyond `DEEPEST`,
    more text behind the value.
    """
    try:
        text = text.decode() if isinstance(text, bytes) else text
        value = (BOUNDED_DECODER if MANY_DIGITS.search(text) else DECODER).decode(text)
        level = [value] if text.count("[") + text.count("{") > DEEPEST else []
        for _ in range(DEEPEST):
            parts = (item.values() if isinstance(item, dict) else item for item in level)
            level = [inner for part in parts for inner in part if isinstance(inner, dict | list)]
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("half a character (a lone surrogate)") from None
    except RecursionError:
        level = [None]
    if level:
        raise ValueError(f"nested deeper than {DEEPEST} levels")
    return value


def decode_object(text: str | bytes) -> JsonObject:
    """The same for an object; any other value raises `ValueError` too."""
    if not isinstance(value := decode_json(text), dict):
        raise ValueError(f"it is {describe_value(value)}, not an object")
    return value
