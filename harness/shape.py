"""Is a JSON value what a type says? What was read from a file is checked here once, whole, before it is used.

A type is a scalar, list[X], tuple[X, Y], dict[str, X], X | Y, Literal, Any, a dataclass or a TypedDict, whose
further keys are free; or Annotated[X, (least, most)].
"""

import json
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from math import isfinite
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    Required,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

WHOLE = 2**63  # no count is as large, and a float still holds it
LEVELS = 16  # of lists and dicts in each other where any value will do: those who walk through recurse
SCALARS = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", NoneType: "null"}

Count = Annotated[int, (0, WHOLE)]
Amount = Annotated[float, (0.0, 1e18)]  # of seconds, of joules: above what can be measured
Share = Annotated[float, (0.0, 1.0)]


def parse(text: str | bytes):
    """The value of a JSON text. Raises ValueError for what is none: NaN and 1e999 are not JSON's either."""
    try:
        return json.loads(text, parse_constant=number, parse_float=number)
    except RecursionError:
        raise ValueError("lists in lists without end") from None


def number(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a number")
    return value


def check(value, kind, where: str = "it") -> None:
    """Raises ValueError, which names the place, unless the value is of the kind."""
    if kind in SCALARS:
        if not is_scalar(value, kind):
            raise wrong(where, SCALARS[kind], value)
        return
    rule, inner = get_origin(kind), get_args(kind)
    if rule is Annotated:
        check(value, inner[0], where)
        if not inner[1][0] <= value <= inner[1][1]:
            raise wrong(where, "from {:.4g} to {:.4g}".format(*inner[1]), value)
    elif rule in (Required, NotRequired):
        check(value, inner[0], where)
    elif rule in (Union, UnionType):
        check_either(value, inner, where)
    elif rule is Literal:
        if not (isinstance(value, str) and value in inner):
            raise wrong(where, f"one of {', '.join(inner)}", value)
    elif rule in (list, tuple):
        if not isinstance(value, list) or (rule is tuple and len(value) != len(inner)):
            raise wrong(where, "a list" if rule is list else f"a list of {len(inner)}", value)
        for i, item in enumerate(value):
            check(item, inner[0 if rule is list else i], f"{where}[{i}]")
    elif rule is dict or is_dataclass(kind) or is_typeddict(kind):
        if not isinstance(value, dict):
            raise wrong(where, "named values", value)
        kinds, required = members(kind) if rule is not dict else (dict.fromkeys(value, inner[1]), set())
        if missing := required - set(value):
            raise ValueError(f"{where}: no {', '.join(sorted(missing))}")
        for name, item in value.items():
            check(item, kinds.get(name, Any), f"{where}.{name}")
            if rule is dict:
                check(name, inner[0], f"a name in {where}")
    elif kind is not Any:
        raise wrong(where, "left out", value)
    elif not shallow(value):
        raise ValueError(f"{where}: more than {LEVELS} lists in each other")


def wrong(where: str, what: str, value) -> ValueError:
    return ValueError(f"{where} must be {what}, not {str(value)[:60]!r}")


def is_scalar(value, kind) -> bool:
    if kind is float:
        kind = float if isinstance(value, float) else int
    return type(value) is kind and (kind is not int or abs(value) <= WHOLE)


def check_either(value, kinds, where: str) -> None:
    reasons = []
    for kind in kinds:
        try:
            return check(value, kind, where)
        except ValueError as error:
            reasons.append(error)
    raise reasons[0]


@cache
def members(kind) -> tuple[dict, set[str]]:
    """Name -> type of what a dataclass or a TypedDict holds, and the names that cannot be left out."""
    if is_typeddict(kind):
        return get_type_hints(kind, include_extras=True), set(kind.__required_keys__)
    plain = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    return get_type_hints(kind, include_extras=True), plain


def shallow(value, levels: int = LEVELS) -> bool:
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels > 0 and all(shallow(item, levels - 1) for item in inside)
