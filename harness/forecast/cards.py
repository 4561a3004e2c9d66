"""The cards that a forecast knows, by name, and the one that is here."""

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from harness import machine

CONTEXT = 600e6  # bytes that a process takes of a card beside torch's own, where no record has said


@dataclass(frozen=True)
class Card:
    name: str
    bytes: float
    short: float  # FLOP/s of products in 16 bits
    long: float  # of those in 32
    bandwidth: float  # bytes a second
    watts: float
    bf16: bool = True  # it truly computes so; else products are in 32 bits, and without flash attention
    context: float = CONTEXT
    known: bool = True  # else its speed is a guess
    stands_in: bool = False  # for one of which the bytes alone are known

    def of(self, size: float) -> "Card":
        """The same with so many bytes."""
        return replace(self, bytes=size)


@cache
def known_cards() -> dict[str, Card]:
    """By name, the largest first."""
    said = tomllib.loads(Path(__file__).with_name("cards.toml").read_text("utf-8"))
    return {
        name: Card(name, card["memory"] * 2**30, card["short"] * 1e12, card["long"] * 1e12,
                   card["bandwidth"] * 1e9, card["watts"], card.get("bf16", True),
                   card.get("context", CONTEXT / 1e6) * 1e6)
        for name, card in said.items()
    }  # fmt: skip


CARDS = known_cards()


@cache
def card_named(text: str, size: int | None = None) -> Card:
    """Of what the driver calls it: its line of the table, with the bytes that it has; else a guess."""
    said = tomllib.loads(Path(__file__).with_name("cards.toml").read_text("utf-8"))
    named = [(name, card) for name, card in said.items() for own in card["names"] if whole(own, text)]
    if named:
        found = CARDS[max(named, key=lambda item: max(len(n) for n in item[1]["names"] if whole(n, text)))[0]]
        return replace(found, bytes=size or found.bytes)
    middle = CARDS["A10"]
    return replace(middle, name=text, bytes=size or middle.bytes, known=False)


def whole(own: str, text: str) -> bool:
    return re.search(rf"\b{re.escape(own)}\b", text) is not None


def card_of(size: float) -> Card:
    """For bytes that were asked: the card of the table that has as many and computes in bf16, as all have
    since 2020; its speed stands in."""
    cards = [card for card in CARDS.values() if card.bf16]
    enough = [card for card in cards if card.bytes * 1.12 >= size]
    nearest = min(enough or cards, key=lambda card: abs(card.bytes - size))
    return replace(nearest, bytes=size, known=False, stands_in=True)


def card_at_hand() -> Card | None:
    """None where there is no GPU; asks the driver, not torch."""
    found = machine.card_described()
    return card_named(*found) if found else None
