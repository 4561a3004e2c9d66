"""Differences with simultaneous intervals, where test rows and seeds are the chance. NumPy only.

A score is a function of sums over test rows. Other rows would have given another score, and so would
other seeds; both are in an interval, and what belongs to a row in a seed counts once. All rows are shared,
so that differences are paired. All differences of a quantity are one family: their intervals hold at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

CONFIDENCE = 0.95  # that all intervals of a family hold
POWER = 0.8  # of the smallest difference that a bench could have seen; the convention since Cohen 1988
SAME = 1e-12  # relative: numbers so little apart are equal, but were summed in another order
FEW = 20  # times as alike as they are: how three seeds come out in one case of 20 (chi-square, 2 degrees)
DRAWS = 5000  # simulated benches: 5 % of them are known to 0.3 %


@dataclass(frozen=True)
class Sample:
    """One technique in one quantity.

    `values` (seeds,): one a seed. `pulls` (seeds, rows): how far each test row pulls the value of each
    seed, of mean 0; without rows where the seeds alone are the sample, as for costs.
    """

    values: np.ndarray
    pulls: np.ndarray

    @classmethod
    def of_rows(cls, seeds: list[np.ndarray], value: Callable[[np.ndarray], np.ndarray]) -> "Sample":
        """From the sums of each test row, (rows, k) a seed. `value`: sums (..., k) -> score (...).

        A row's pull is the jackknife's: what the score loses when that row is left out, times rows - 1.
        """
        sums = np.stack(seeds)  # (seeds, rows, k)
        whole, others = sums.sum(1), max(sums.shape[1] - 1, 1)
        with np.errstate(all="ignore"):
            values, without = value(whole), value(whole[:, None] - sums)
            pulls = others * (without.mean(1, keepdims=True) - without)
        return cls(values, pulls if sums.shape[1] > 1 else np.zeros_like(pulls))

    @classmethod
    def of_seeds(cls, values: list[float]) -> "Sample":
        return cls(np.array(values, dtype=float), np.zeros((len(values), 0)))

    @property
    def known(self) -> bool:
        return bool(len(self.values) and np.isfinite(self.values).all() and np.isfinite(self.pulls).all())

    @property
    def point(self) -> float:
        """The mean over seeds."""
        return float(self.values.mean()) if len(self.values) else np.nan


@dataclass(frozen=True)
class Difference:
    """One less the other, in the quantity's unit, and the ends of its interval. NaN where unknown."""

    value: float = np.nan
    low: float = np.nan
    high: float = np.nan

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


class Family:
    """The differences of some pairs of samples, judged together.

    Each difference is divided by its standard error; the greatest of the family, over benches drawn from
    what this one has seen and put through the same steps, gives the one critical value that all intervals
    share. So few seeds, and many pairs, make all of them wider.
    Raises ValueError for samples over different numbers of test rows.
    """

    def __init__(self, samples: dict[str, Sample], pairs: list[tuple[str, str]], draws: int = DRAWS):
        if len({s.pulls.shape[1] for s in samples.values()}) > 1:
            raise ValueError("paired differences need samples over the same test rows")
        self.samples = {name: s for name, s in samples.items() if s.known}
        self.pairs = [pair for pair in pairs if set(pair) <= set(self.samples)]
        self.place = {pair: i for i, pair in enumerate(self.pairs)}
        order = {name: i for i, name in enumerate(self.samples)}
        self.ends = np.array([[order[a], order[b]] for a, b in self.pairs], dtype=int).reshape(-1, 2).T
        self.points = np.array([s.point for s in self.samples.values()])
        self.rows_covariance()
        self.seeds = np.array([len(s.values) for s in self.samples.values()])
        spread = [s.values.var(ddof=1) if len(s.values) > 1 else 0.0 for s in self.samples.values()]
        self.spread = np.array(spread)
        freedom = (self.seeds - 1).sum()
        more = freedom / max(freedom - 2, 1)  # few seeds may understate: the mean of what may be true
        errors, standard = self.simulate(np.maximum(more * self.larger(self.spread), self.own_rows), draws)
        studentised = np.divide(np.abs(errors), standard, out=np.zeros_like(errors), where=standard > 0)
        twins = self.apart < 1  # hardly anything is left to divide by: they decide only among themselves
        counted = studentised if twins.all() else studentised[:, ~twins]
        self.critical = float(np.quantile(counted.max(1, initial=0.0), CONFIDENCE))
        self.width = self.critical * np.sqrt(self.variance(self.larger(self.spread)))
        seen = self.student(draws) * np.sqrt(self.paired)  # twins, seed by seed
        self.width = np.where(twins, np.maximum(self.width, seen), self.width)
        self.draws = draws

    def rows_covariance(self) -> None:
        """Of the means over seeds, as far as test rows are the chance; and what of one seed's value is
        chance of its own on each row, which its spread over seeds holds too."""
        samples = list(self.samples.values())
        self.rows = samples[0].pulls.shape[1] if samples else 0
        means = np.stack([s.pulls.mean(0) for s in samples]) if samples else np.zeros((0, 0))
        pairs = max(self.rows * (self.rows - 1), 1)
        self.covariance = means @ means.T / pairs
        own = [((s.pulls - mean) ** 2).sum() / max(len(s.values) - 1, 1)
               for s, mean in zip(samples, means, strict=True)]  # fmt: skip
        own, whole = np.array(own) / pairs, self.covariance.diagonal()
        self.own_rows = np.where(own > SAME * whole, own, 0.0)

    def shared(self, spread: np.ndarray) -> np.ndarray:
        """(..., techniques) variance over seeds as it was seen -> as it is if the seeds of all vary alike: by
        one multiple of their own chance on rows, and not by less than that; without rows, by one amount."""
        freedom, unit = self.seeds - 1, self.own_rows if self.rows else np.ones(len(self.seeds))
        told = (freedom > 0) & (unit > 0)
        ratio = np.divide(spread, unit, out=np.zeros_like(spread), where=told)
        multiple = (ratio * freedom).sum(-1, keepdims=True) / max((freedom * told).sum(), 1)
        return np.where(freedom > 0, np.maximum(multiple * unit, self.own_rows), 0.0)

    def larger(self, spread: np.ndarray) -> np.ndarray:
        """The same as it is taken to be: three seeds say little of one technique, all together say more, and
        a technique that is less steady than the others is not made steadier by them."""
        return np.maximum(spread, self.shared(spread))

    def variance(self, of_seed: np.ndarray, rows: np.ndarray | float = 1.0) -> np.ndarray:
        """(..., pairs) of each difference. `rows` (..., 1): the rows' part is so many times as large."""
        a, b = self.ends
        beyond = self.beyond(of_seed)
        return self.row_part * rows + self.apart * (beyond[..., a] + beyond[..., b])

    @cached_property
    def row_part(self) -> np.ndarray:
        """(pairs,) the variance of each difference as far as test rows are the chance."""
        a, b = self.ends
        both = self.covariance[a, a] + self.covariance[b, b]
        part = both - 2 * self.covariance[a, b]
        return np.where(part > SAME * both, part, 0.0)

    @cached_property
    def apart(self) -> np.ndarray:
        """(pairs,) from 0 to 1: how far the seeds of two techniques are chance of their own, by their rows or
        by their scores, whichever says more. Not at all where both are alike with each seed, as a method is
        that has become another one's special case."""
        own, spread = ((of / self.seeds)[self.ends].sum(0) for of in (self.own_rows, self.spread))
        by_rows = np.divide(self.row_part, own, out=np.ones_like(own), where=own > 0)
        by_seeds = np.divide(self.paired, spread, out=np.zeros_like(spread), where=spread > 0)
        return np.maximum(2 * by_rows, FEW * by_seeds).clip(0, 1)

    @cached_property
    def paired(self) -> np.ndarray:
        """(pairs,) the variance of the mean difference, seed by seed; infinite where both have not as
        many, or one."""
        values = [sample.values for sample in self.samples.values()]
        pairs = [(values[i], values[j]) for i, j in self.ends.T]
        both = (1 < len(one) == len(other) for one, other in pairs)
        return np.array([
            (one - other).var(ddof=1) / len(one) if known else np.inf
            for (one, other), known in zip(pairs, both, strict=True)
        ])  # fmt: skip

    def student(self, draws: int) -> float:
        """Student's critical value over as many seeds as most techniques have."""
        freedom = max(int(np.median(self.seeds)) - 1, 1) if len(self.seeds) else 1
        return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, draws)), CONFIDENCE))

    def beyond(self, of_seed: np.ndarray) -> np.ndarray:
        """(..., techniques) of the mean over seeds, less what the rows' part holds already."""
        return np.where(self.seeds > 1, of_seed - self.own_rows, 0.0) / self.seeds

    def simulate(self, of_seed: np.ndarray, draws: int) -> tuple[np.ndarray, np.ndarray]:
        """Benches without any true difference -> their errors and standard errors, (draws, pairs)."""
        rng = np.random.default_rng(0)
        count, (a, b) = len(self.samples), self.ends
        values, vectors = np.linalg.eigh(self.covariance)
        by_rows = rng.standard_normal((draws, count)) * np.sqrt(values.clip(0)) @ vectors.T
        by_seeds = rng.standard_normal((draws, count)) * np.sqrt(self.beyond(of_seed))
        errors = by_rows[:, a] - by_rows[:, b]
        errors += np.sqrt(self.apart) * (by_seeds[:, a] - by_seeds[:, b])
        freedom, rows = np.maximum(self.seeds - 1, 1), max(self.rows - 1, 1)
        spread = of_seed * rng.chisquare(freedom, (draws, count)) / freedom
        row_part = rng.chisquare(rows, (draws, 1)) / rows
        return errors, np.sqrt(self.variance(self.larger(spread), row_part))

    def difference(self, one: str, other: str) -> Difference:
        """`one` less `other`; unknown for a pair that the family does not hold."""
        sign = 1 if (one, other) in self.place else -1
        i = self.place.get((one, other) if sign > 0 else (other, one))
        if i is None:
            return Difference()
        a, b = self.points[self.ends[:, i]]
        value = 0.0 if np.isclose(a, b, rtol=SAME, atol=0) else sign * float(a - b)
        return Difference(value, value - float(self.width[i]), value + float(self.width[i]))

    @cached_property
    def repeated(self) -> tuple[np.ndarray, np.ndarray]:
        """This bench again, its seeds as steady as those of all were: errors, standard errors."""
        return self.simulate(self.shared(self.spread), self.draws)

    def power(self, difference: float) -> np.ndarray:
        """(pairs,) how often such a bench would tell a pair apart that truly differs so much."""
        errors, standard = self.repeated
        return (np.abs(errors + difference) > self.critical * standard).mean(0)

    def detectable(self) -> np.ndarray:
        """(pairs,) the true difference that such a bench would find with POWER."""
        errors, standard = self.repeated
        return np.quantile(self.critical * standard - errors, POWER, axis=0)
