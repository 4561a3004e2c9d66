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
BLOCK = 16  # pairs, whose draws stay in a core's cache
MIDDLE = 100  # pairs, of which the median is near enough that of all


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


@dataclass(frozen=True)
class Bench:
    """One without any true difference, drawn many times. `by_rows`, `by_seeds`, (techniques, draws): the
    errors that test rows and seeds make; `beyond`, the same shape, and `row_part`, (draws,): the variances
    that each draw takes them to have, see `Family.variance`."""

    by_rows: np.ndarray
    by_seeds: np.ndarray
    beyond: np.ndarray
    row_part: np.ndarray


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
        self.pairs = [(a, b) for a, b in pairs if a in self.samples and b in self.samples]
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
        bench = self.bench(np.maximum(more * self.larger(self.spread), self.own_rows), draws)
        twins = self.apart < 1  # hardly anything is left to divide by: they decide only among themselves
        counted = np.flatnonzero(~twins | twins.all())
        self.critical = float(np.quantile(self.greatest(bench, counted), CONFIDENCE))
        self.width = self.critical * np.sqrt(self.variance(self.larger(self.spread)))
        seen = self.student(draws) * np.sqrt(self.paired)  # twins, seed by seed
        self.width = np.where(twins, np.maximum(self.width, seen), self.width)
        self.draws = draws
        a, b = self.points[self.ends]
        self.values = np.where(np.isclose(a, b, rtol=SAME, atol=0), 0.0, a - b)

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

    def variance(self, of_seed: np.ndarray) -> np.ndarray:
        """(pairs,) of each difference."""
        return self.row_part + self.apart * self.beyond(of_seed)[self.ends].sum(0)

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
        found, (a, b) = np.full(len(self.pairs), np.inf), self.ends
        for n in set(self.seeds.tolist()) - {0, 1}:
            values = np.zeros((len(self.seeds), n))
            values[self.seeds == n] = [s.values for s in self.samples.values() if len(s.values) == n]
            both = (self.seeds[a] == n) & (self.seeds[b] == n)
            found[both] = (values[a[both]] - values[b[both]]).var(1, ddof=1) / n
        return found

    def student(self, draws: int) -> float:
        """Student's critical value over as many seeds as most techniques have."""
        freedom = max(int(np.median(self.seeds)) - 1, 1) if len(self.seeds) else 1
        return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, draws)), CONFIDENCE))

    def beyond(self, of_seed: np.ndarray) -> np.ndarray:
        """(..., techniques) of the mean over seeds, less what the rows' part holds already."""
        return np.where(self.seeds > 1, of_seed - self.own_rows, 0.0) / self.seeds

    def bench(self, of_seed: np.ndarray, draws: int) -> "Bench":
        """Without any true difference, drawn so many times."""
        rng = np.random.default_rng(0)
        count = len(self.samples)
        values, vectors = np.linalg.eigh(self.covariance)
        by_rows = rng.standard_normal((draws, count)) * np.sqrt(values.clip(0)) @ vectors.T
        by_seeds = rng.standard_normal((draws, count)) * np.sqrt(self.beyond(of_seed))
        freedom, rows = np.maximum(self.seeds - 1, 1), max(self.rows - 1, 1)
        spread = of_seed * rng.chisquare(freedom, (draws, count)) / freedom
        row_part = rng.chisquare(rows, draws) / rows
        beyond = self.beyond(self.larger(spread))
        return Bench(*map(np.ascontiguousarray, (by_rows.T, by_seeds.T, beyond.T, row_part)))

    def simulated(self, bench: "Bench", pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors and their variances as the bench sees them, (pairs, draws)."""
        a, b = self.ends[:, pairs]
        apart, row_part = self.apart[pairs, None], self.row_part[pairs, None]
        errors, beyond = bench.by_seeds[a], bench.beyond[a]
        errors -= bench.by_seeds[b]
        beyond += bench.beyond[b]
        if (apart != 1).any():
            errors *= np.sqrt(apart)
            beyond *= apart
        if self.rows:
            errors += bench.by_rows[a]
            errors -= bench.by_rows[b]
            beyond += row_part * bench.row_part
        return errors, beyond

    def greatest(self, bench: "Bench", pairs: np.ndarray) -> np.ndarray:
        """(draws,) of the studentised errors of some pairs; a block at a time, as there may be a hundred
        thousand pairs."""
        found = np.zeros(len(bench.row_part))
        for start in range(0, len(pairs), BLOCK):
            errors, variance = self.simulated(bench, pairs[start : start + BLOCK])
            errors *= errors
            np.divide(errors, variance, out=errors, where=variance > 0)
            errors[variance <= 0] = 0.0
            np.maximum(found, errors.max(0), out=found)
        return np.sqrt(found)

    def difference(self, one: str, other: str) -> Difference:
        """`one` less `other`; unknown for a pair that the family does not hold."""
        sign = 1 if (one, other) in self.place else -1
        i = self.place.get((one, other) if sign > 0 else (other, one))
        if i is None:
            return Difference()
        value, width = sign * float(self.values[i]) + 0.0, float(self.width[i])  # no -0
        return Difference(value, value - width, value + width)

    @cached_property
    def repeated(self) -> "Bench":
        """This bench again, its seeds as steady as those of all were."""
        return self.bench(self.shared(self.spread), self.draws)

    def power(self, pair: int, difference: float) -> float:
        """How often such a bench would tell a pair apart that truly differs so much."""
        errors, variance = self.simulated(self.repeated, np.array([pair]))
        return float((np.abs(errors + difference) > self.critical * np.sqrt(variance)).mean())

    def detectable(self, chosen: np.ndarray) -> float:
        """The true difference that such a bench would find with POWER, the median of the `chosen` pairs
        (mask); of those in the middle by their standard errors, as it goes with these."""
        pairs = np.flatnonzero(chosen)
        pairs = pairs[np.argsort(self.variance(self.shared(self.spread))[pairs], kind="stable")]
        aside = max(len(pairs) - MIDDLE, 0) // 2
        errors, variance = self.simulated(self.repeated, pairs[aside : len(pairs) - aside])
        return float(np.median(np.quantile(self.critical * np.sqrt(variance) - errors, POWER, axis=1)))
