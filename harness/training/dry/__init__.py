"""A run without a card, weights or values: what it would hold and compute."""

from harness.training.dry.rows import rows_of
from harness.training.dry.run import width
from harness.training.dry.trace import Traced, trace

__all__ = ["Traced", "rows_of", "trace", "width"]
