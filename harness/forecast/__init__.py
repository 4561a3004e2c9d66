"""What runs will take of a card and how long they will last, before a weight is loaded."""

from harness.forecast.cards import CARDS, Card, card_at_hand, card_named, card_of
from harness.forecast.correcting import corrected
from harness.forecast.forecast import Forecast, computes_bf16, expected, foreseen, keep, key_of

__all__ = [
    "CARDS", "Card", "Forecast", "card_at_hand", "card_named", "card_of", "computes_bf16", "corrected",
    "expected", "foreseen", "keep", "key_of",
]  # fmt: skip
