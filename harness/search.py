"""Which learning rate is tried next: a grid that is moved on until its best is bracketed, then made finer.

Nothing but numbers in and out. The next trial follows from those that were, so that a search that was killed
goes on where it stood, and the trials of a larger budget begin with those of a smaller one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, count
from math import inf, log10
from typing import Any

TRIALS = 8  # of a method: the shared rate, three declared ones, two to bracket the best, two of its option
GRID = 4  # eighths of a decade between two rates of the grid: a factor of sqrt(10), as is usual
FINER = (2, 1)  # beside the best: factors of 1.8 and 1.3, below which seeds decide
DIGITS = 3  # of a rate: as many as anybody types
RATES = (1e-12, 1e3)  # beyond which nothing is a learning rate


@dataclass(frozen=True)
class Trial:
    """`loss`: what is to be low; null where the trial broke, which is infinitely bad."""

    rate: float
    option: Any = None  # the further option's value
    loss: float | None = None


@dataclass(frozen=True)
class Search:
    """Of one method. `values`: of its further option, what was asked for first; a lone one is not varied."""

    shared: float  # the learning rate that all methods have in common, from which the grid is counted
    low: float  # what the method's card declares
    high: float
    values: Sequence = (None,)

    def __post_init__(self) -> None:
        least, most = RATES
        if not (least <= self.low <= self.high <= most and least <= self.shared <= most):
            raise ValueError(f"learning rates are from {least:g} to {most:g}, the lowest first")

    def next(self, trials: Sequence[Trial]) -> tuple[float, Any]:
        """-> the rate and the option's value to try after these trials; never a pair that was tried."""
        tried = [(self.place(trial.rate), trial.option) for trial in trials]
        place, option = next(pair for pair in self.candidates(trials) if pair not in tried)
        return self.rate(place), option

    def candidates(self, trials: Sequence[Trial]) -> Iterator[tuple[int, Any]]:
        """(place, option) in the order in which they are worth a trial; the first untried one tells where the
        later ones begin."""
        asked, *others = self.values
        yield 0, asked  # what all have in common: on what it is chosen by, no best falls behind that
        yield from ((place, asked) for place in self.declared())
        on_grid = [t for t in trials if t.option == asked and self.place(t.rate) % GRID == 0]
        best = self.place(winner(on_grid).rate)
        yield from ((place, asked) for place in beside(best, GRID))
        yield from ((best, value) for value in others)
        found = winner(trials)
        best = self.place(found.rate)
        steps = chain((GRID, *FINER), count(1))
        yield from ((place, found.option) for step in steps for place in beside(best, step))

    def declared(self) -> list[int]:
        """The places on the grid within the declared range, at the least the nearest one, from the middle
        outwards."""
        middle = log10(self.low * self.high / self.shared**2) * 4
        nearest = GRID * round(middle / GRID)
        around = range(nearest - 8 * GRID, nearest + 9 * GRID, GRID)
        inside = [place for place in around if self.low <= self.rate(place) <= self.high]
        return sorted(inside, key=lambda place: abs(place - middle)) or [nearest]

    def rate(self, place: int) -> float:
        """Of a place on the grid, in eighths of a decade from the shared rate."""
        return float(f"{self.shared * 10 ** (place / 8):.{DIGITS}g}") if place else self.shared

    def place(self, rate: float) -> int:
        return round(8 * log10(rate / self.shared))


def beside(place: int, step: int) -> tuple[int, int]:
    return place + step, place - step


def winner(trials: Iterable[Trial]) -> Trial:
    """The lowest loss; of equal ones the earlier, which is nearer to what was declared. Where all broke, the
    lowest rate, which is the nearest to one that holds."""
    return min(trials, key=lambda t: (inf, t.rate) if t.loss is None else (t.loss, 0.0))


def at_edge(trials: Iterable[Trial], best: Trial) -> bool:
    """Whether no rate was tried on one side of the best."""
    rates = [trial.rate for trial in trials]
    return best.rate in (min(rates), max(rates))
