"""What a wrong request is told: what is wrong, the nearest valid thing, and what is available."""

import difflib

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def unknown(what: str, name: str, names) -> str:
    """`unknown method 'qlor': did you mean qlora? Available: ...`"""
    names = sorted(names)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f": did you mean {near[0]}?" if near else "."
    return f"unknown {what} {name!r}{hint} Available: {', '.join(names) or 'none'}"


def misfit(value, kind) -> str | None:
    """Why a value is not of a kind (bool, int, float or str; others always fit), or None."""
    if kind not in KINDS:
        return None
    if kind is float:
        fits = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        fits = type(value) is kind
    return None if fits else f"must be {KINDS[kind]}, not {value!r}"
