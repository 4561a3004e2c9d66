"""A report as one HTML file that loads nothing: all of it stands there without its script, which sorts,
filters, draws and browses."""

import base64
import hashlib
import json
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness.plain import plain
from harness.report.blocks import Block, Heading, Title

TEMPLATES = Path(__file__).with_name("templates")
SCRIPTS = ("page.js", "budget.js", "charts.js", "curves.js", "samples.js")
TOGETHER = re.compile(r" ± |\([^()]*\)")
# What ends a script or begins a comment in one, as JSON writes it where HTML reads along.
UNSAFE = str.maketrans({c: f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"})


@dataclass(frozen=True)
class Chapter:
    """A heading and what follows it; `anchor` is its place in the address."""

    heading: Heading | None
    anchor: str
    blocks: list[Block]


def write_html(blocks: list[Block], now: str, data: dict[str, Any] | None) -> str:
    """`data`: what the script shows, as JSON values; null where there is no script. Jinja escapes every value
    that the template names."""
    script = "".join((TEMPLATES / name).read_text("utf-8") for name in SCRIPTS) if data else ""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()

    def inline(value):
        return value if isinstance(value, Markup) else plain(value)

    def unbroken(value):
        """A number stays beside its ±, an interval on one line."""
        return TOGETHER.sub(lambda found: found[0].replace(" ", "\u00a0"), plain(value))

    def image(svg: bytes) -> str:
        return "data:image/svg+xml;base64," + base64.b64encode(svg).decode()

    return template("report.html.j2", inline, image=image, unbroken=unbroken).render(
        title=next(block for block in blocks if isinstance(block, Title)),
        chapters=chapters(blocks),
        now=now,
        style=Markup((TEMPLATES / "page.css").read_text("utf-8")),  # noqa: S704, our own, as the script is
        script=Markup(script),  # noqa: S704
        runs=Markup(f"'sha256-{digest}'") if script else "'none'",  # noqa: S704, no other script does
        data=Markup(as_json(data)) if data else "",  # noqa: S704, no < is left in it
    )


def as_json(value: Any) -> str:
    """JSON that can stand within a script of an HTML page: no `</script>` and no `<!--` is in it."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(UNSAFE)


def chapters(blocks: list[Block]) -> list[Chapter]:
    found = [Chapter(None, "", [])]
    taken: dict[str, int] = {}
    for block in blocks:
        if isinstance(block, Heading):
            name = anchor(block.text)
            taken[name] = taken.get(name, 0) + 1
            found.append(Chapter(block, name + f"-{taken[name]}" * (taken[name] > 1), []))
        else:
            found[-1].blocks.append(block)
    return found


def anchor(text: str) -> str:
    """`answers-side-by-side`"""
    words = unicodedata.normalize("NFKD", text.lower())
    return "-".join("".join(c if c.isascii() and c.isalnum() else " " for c in words).split()) or "part"


def template(name: str, finalize, **filters):
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=name.endswith(".html.j2"),
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= filters
    return environment.get_template(name)
