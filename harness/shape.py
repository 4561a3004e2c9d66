"""Is a value what a type says? What comes from outside (a file, the command line, a stranger's class) is
checked here once, whole, before it is used.

A type is a scalar, list[X], tuple[X, Y], dict[str, X], X | Y, Literal, Any, a dataclass or a TypedDict, whose
further keys are free; or Annotated[X, Range(...)].
"""

import json
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from difflib import get_close_matches
from functools import cache
from itertools import chain
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NamedTuple,
    Never,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from harness.errors import Problem, Problems, brief, unknown

WHOLE = 2**63 - 1  # the largest that torch, NumPy and JSON's other readers hold
LEVELS = 16  # of lists and dicts in each other where any value will do: those who walk through recurse
KINDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    NoneType: "null",
    list: "a list",
    tuple: "a list",
    dict: "a table",
    Never: "left out",
}  # fmt: skip; any other kind is whatever JSON holds


class Range(NamedTuple):
    """Which numbers are meant: `Annotated[float, Range(above=0, most=1)]`."""

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def holds(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        if None not in self[:2]:
            return "from {:.12g} to {:.12g}".format(*self[:2])
        words = zip(("at least", "at most", "above", "below"), self, strict=True)
        return " and ".join(f"{word} {bound:.12g}" for word, bound in words if bound is not None)


Count = Annotated[int, Range(0, WHOLE)]
Natural = Annotated[int, Range(least=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, below=1)]
Amount = Annotated[float, Range(0.0, 1e18)]  # of seconds, of joules: above what can be measured
Share = Annotated[float, Range(0.0, 1.0)]


def parse(text: str | bytes):
    """The value of a JSON text. Raises ValueError for what is none: NaN and 1e999 are not JSON's either."""
    try:
        return JSON.decode(text if isinstance(text, str) else text.decode(json.detect_encoding(text)))
    except RecursionError:
        raise ValueError("lists in lists without end") from None


def number(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number")
    return value


JSON = json.JSONDecoder(parse_constant=number, parse_float=number)  # made once: json.loads makes one a text


def check(value, kind, where: str = "it") -> None:
    """Raises ValueError, which names the place, unless the value is of the kind."""
    for problem in () if all_fit([value], kind) else misfits(value, kind, where):
        raise ValueError(f"{problem.where} {problem.what}")


def fitting(values: dict, kinds: dict, what: str, where: str, problems: Problems) -> dict:
    """Those of a table's values that are of their kinds, whole numbers as floats where these are asked for.

    Adds the others to `problems`: an unknown key as `what`, a wrong value by `where` (a prefix) and its key.
    """
    good = {}
    for key, value in values.items():
        if key not in kinds:
            problems.append(unknown(what, key, kinds))
        elif found := list(misfits(value, kinds[key], where + key)):
            problems += found
        else:
            kind = kinds[key]
            bare = get_args(kind)[0] if get_origin(kind) is Annotated else kind
            good[key] = float(value) if bare is float else value
    return good


def misfits(value, kind, where: str = "it") -> Iterator[Problem]:
    """Each place at which a value is not what a type says, by its path: seeds[0], spec.hp.epochs."""
    rule, inner = get_origin(kind) or kind, get_args(kind)
    if rule in (Required, NotRequired):
        yield from misfits(value, inner[0], where)
    elif rule is Annotated:
        wrong = list(misfits(value, inner[0], where))
        yield from wrong or ([] if Range(*inner[1]).holds(value) else [misfit(value, kind, where)])
    elif rule in (Union, UnionType):
        ways = [list(misfits(value, part, where)) for part in inner]
        if all(ways):  # the way that led inside tells most
            yield from next((way for way in ways if way[0].where != where), [misfit(value, kind, where)])
    elif rule is list and isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from misfits(item, inner[0] if inner else Any, f"{where}[{i}]")
    elif rule is tuple and isinstance(value, list | tuple) and len(value) == len(inner):
        for i, (item, part) in enumerate(zip(value, inner, strict=True)):
            yield from misfits(item, part, f"{where}[{i}]")
    elif rule is dict and isinstance(value, dict):
        of_key, of_item = inner or (str, Any)
        for key, item in value.items():
            yield from misfits(key, of_key, f"a name in {where}")
            yield from misfits(item, of_item, f"{where}.{key}")
    elif has_members(rule) and isinstance(value, dict):
        kinds, required = members(rule)
        yield from (Problem("is missing", f"{where}.{name}") for name in sorted(required - set(value)))
        for name, item in value.items():
            yield from misfits(item, kinds.get(name, Any), f"{where}.{name}")
    elif not is_plain(value, rule, inner):
        yield misfit(value, kind, where)


def all_fit(values: list, kind) -> bool:
    """Whether none of the values has misfits: a column at a time, as of a million lines few are wrong."""
    rule, inner = get_origin(kind) or kind, get_args(kind)
    kinds = set(map(type, values))
    if not values:
        return True
    if rule in (Required, NotRequired):
        return all_fit(values, inner[0])
    if rule is Annotated:
        return all_fit(values, inner[0]) and all(map(Range(*inner[1]).holds, (min(values), max(values))))
    if rule in (Union, UnionType) and NoneType in inner and len(inner) == 2:
        other = inner[inner[0] is NoneType]
        return all_fit([value for value in values if value is not None], other)
    if rule is list and kinds <= {list, tuple}:
        return all_fit([*chain.from_iterable(values)], inner[0] if inner else Any)
    if rule is dict and kinds == {dict}:
        of_key, of_item = inner or (str, Any)
        items = [item for value in values for item in value.values()]
        return all_fit([*chain.from_iterable(values)], of_key) and all_fit(items, of_item)
    if has_members(rule) and kinds == {dict}:
        own, required = members(rule)
        columns = {name: [v[name] for v in values if name in v] for name in {*own, *chain(*values)}}
        return all(len(columns[name]) == len(values) for name in required) and all(
            all_fit(column, own.get(name, Any)) for name, column in columns.items()
        )
    if rule in (str, bool):
        return kinds == {rule}
    if rule in (int, float) and kinds <= {int, rule}:
        whole = [value for value in values if type(value) is int]
        low, high = min(whole, default=0), max(whole, default=0)
        return low >= -WHOLE and high <= WHOLE and all(map(isfinite, values))
    if rule is Any:
        return all(map(is_json, values))
    return not any(True for value in values for _ in misfits(value, kind))


def is_plain(value, rule, choices=()) -> bool:
    """Whether it is of a kind that has no kinds inside."""
    if rule in (str, bool, NoneType):
        return type(value) is rule
    if rule is int:
        return type(value) is int and abs(value) <= WHOLE
    if rule is float:
        return is_plain(value, int) or (type(value) is float and isfinite(value))
    if rule is Literal:
        return any(type(value) is type(choice) and value == choice for choice in choices)
    return not (rule in KINDS or has_members(rule)) and is_json(value)


def is_json(value, levels: int = LEVELS) -> bool:
    if isinstance(value, dict):
        return levels > 0 and all(type(k) is str and is_json(v, levels - 1) for k, v in value.items())
    if isinstance(value, list | tuple):
        return levels > 0 and all(is_json(item, levels - 1) for item in value)
    return any(is_plain(value, kind) for kind in (str, bool, float, NoneType))


def misfit(value, kind, where: str) -> Problem:
    wanted, near = described(kind), ""
    if kind in (int, float) and type(value) in (int, float) and (kind is float or type(value) is int):
        wanted = "below 2^63" if type(value) is int else "finite"
    if get_origin(kind) is Literal and isinstance(value, str):
        near = "".join(get_close_matches(value, map(str, get_args(kind)), 1))
    return Problem(f"must be {wanted}, not {brief(value)}", where, near)


def described(kind) -> str:
    rule, inner = get_origin(kind) or kind, get_args(kind)
    if rule is Annotated:
        return str(Range(*inner[1]))
    if rule is Literal:
        return "one of " * (len(inner) > 1) + ", ".join(map(str, inner))
    if rule in (Union, UnionType):
        return " or ".join(map(described, inner))
    return KINDS.get(rule) or ("a table" if has_members(rule) else "a value that JSON holds")


def has_members(kind) -> bool:
    return is_dataclass(kind) or is_typeddict(kind)


@cache
def members(kind) -> tuple[dict, set[str]]:
    """Name -> type of what a dataclass or a TypedDict holds, and the names that cannot be left out."""
    kinds = get_type_hints(kind, include_extras=True)
    if is_typeddict(kind):
        return kinds, set(kind.__required_keys__)
    return kinds, {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
