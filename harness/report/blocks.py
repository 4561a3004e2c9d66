"""What a report is made of. Each template writes each kind in its own language, all text escaped."""

from dataclasses import dataclass, field


class Block:
    @property
    def kind(self) -> str:
        return type(self).__name__.lower()


@dataclass
class Title(Block):
    """`index`: the document, without suffix, that lists this one among others."""

    text: str
    index: str = ""


@dataclass
class Heading(Block):
    """`folded`: what follows is read by few; HTML opens it when asked."""

    text: str
    folded: bool = False


@dataclass
class Lead(Block):
    """The answer: the paragraph to read if only one is read."""

    text: str


@dataclass
class Notice(Block):
    """What must be known before any number is believed."""

    text: str


@dataclass
class Prose(Block):
    text: str


@dataclass
class Listing(Block):
    items: list[str]


@dataclass
class Table(Block):
    """Cells are text; the columns in `words` are to be read as such, the others as numbers. `best`: (row,
    column) of what no other is known to beat. `links`: where each row's first cell leads, without suffix."""

    columns: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    words: tuple[int, ...] = (0,)
    best: list[tuple[int, int]] = field(default_factory=list)
    links: list[str] = field(default_factory=list)


@dataclass
class Plot(Block):
    """`name`: the file's, without suffix. `images`: svg and png bytes."""

    name: str
    caption: str
    images: dict[str, bytes]


@dataclass
class Code(Block):
    lines: list[str]


@dataclass
class Card(Block):
    """A method: what it says of itself. `facts`: (what, text)."""

    title: str
    formula: str
    facts: list[tuple[str, str]]


@dataclass
class Example(Block):
    """One test row. `answers`: (whose, remark, text)."""

    title: str
    prompt: str
    reference: str
    answers: list[tuple[str, str, str]]
