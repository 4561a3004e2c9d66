"""Uncertainty: a paired bootstrap over test rows, the spread over seeds, intervals, ties; Pareto fronts.

Every metric is a function of sums over test rows, so all resamples of a run are one matrix product.
NumPy only.
"""

from dataclasses import dataclass, replace

import numpy as np

from harness.metrics import METRICS

RESAMPLES = 1000  # sacrebleu's default; a standard error is then known to about 2%
CONFIDENCE = 0.95  # of an interval; 1 - CONFIDENCE is the level of a verdict
Sums = dict[str, np.ndarray]  # the numbers of each test row, by metric (rows, width)
SEEDS_TO_RANK = 3  # seeds: fewer say nothing of how a method varies from run to run


@dataclass(frozen=True)
class Difference:
    """Score of one row less that of another, in the metric's unit. NaN where a score is unknown."""

    value: float
    low: float  # the interval's ends
    high: float
    p: float  # two-sided, that there is no difference

    @property
    def separable(self) -> bool:
        return self.p < 1 - CONFIDENCE


class Bootstrap:
    """Scores of several methods, each with its seeds, on resampled test rows.

    `runs`: name -> what `harness.metrics.row_sums` gives of each of its seeds, all over the same test rows.
    The same rows are drawn for all runs, which is what makes a difference paired.
    Raises ValueError for runs over different numbers of rows, or over none.
    """

    def __init__(self, runs: dict[str, list[Sums]], resamples: int = RESAMPLES, seed: int = 0):
        lengths = {len(rows) for seeds in runs.values() for sums in seeds for rows in sums.values()}
        if len(lengths) != 1 or 0 in lengths:
            raise ValueError("a paired bootstrap needs runs over the same test rows")
        self.rows = lengths.pop()
        rng = np.random.default_rng(seed)
        drawn = (rng.integers(self.rows, size=self.rows) for _ in range(resamples))
        weights = np.stack([np.bincount(d, minlength=self.rows) for d in drawn]).astype(float)
        self.seeds, self.resampled = {}, {}  # (name, metric) -> scores (seeds,), (resamples,)
        for name, seeds in runs.items():
            for metric in seeds[0]:
                rows = np.stack([sums[metric] for sums in seeds])  # (seeds, rows, width)
                with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
                    self.seeds[name, metric] = METRICS[metric].value(rows.sum(1))
                    self.resampled[name, metric] = METRICS[metric].value(weights @ rows).mean(0)

    def point(self, metric: str, name: str) -> float:
        """The mean over seeds."""
        return float(self.seeds[name, metric].mean())

    def difference(self, metric: str, one: str, other: str) -> Difference:
        """`one` less `other`.

        Other rows, and other seeds of either, could have given another result: their variances add
        up, and Student's t allows for the seeds being few (Welch and Satterthwaite, who let one
        method vary more than the other). Chance that belongs to a row in a seed counts in both, so
        an interval is rather too wide than too narrow.
        """
        a, b = self.seeds[one, metric], self.seeds[other, metric]
        value = self.point(metric, one) - self.point(metric, other)
        of_rows = np.var(self.resampled[one, metric] - self.resampled[other, metric])
        if not np.isfinite(value + of_rows):
            return Difference(np.nan, np.nan, np.nan, np.nan)
        parts = [(of_rows, max(self.rows - 1, 1))]  # variance, degrees of freedom
        parts += [(s.var(ddof=1) / len(s), len(s) - 1) for s in (a, b) if len(s) > 1]
        total = sum(variance for variance, _ in parts)
        if total == 0:
            return Difference(value, value, value, float(value == 0))
        freedom = total**2 / sum(variance**2 / free for variance, free in parts)
        width, p = student(abs(value) / total**0.5, freedom)
        return Difference(value, value - width * total**0.5, value + width * total**0.5, p)

    def differences(self, metric: str, pairs: list[tuple[str, str]]) -> list[Difference]:
        """One a pair, with p corrected for their number."""
        found = [self.difference(metric, one, other) for one, other in pairs]
        return [replace(d, p=p) for d, p in zip(found, holm([d.p for d in found]), strict=True)]

    def ties(self, metric: str, names: list[str]) -> tuple[str, list[str]]:
        """The best of the names, and those that cannot be told from it: (best, [tied, ...]).

        Corrected for all pairs, not only those with the best, as which one that is was seen first.
        """
        sign = -1 if METRICS[metric].better == "lower" else 1
        ranking = sorted(names, key=lambda name: -sign * self.point(metric, name))
        pairs = [(a, b) for i, a in enumerate(ranking) for b in ranking[i + 1 :]]
        found = zip(pairs, self.differences(metric, pairs), strict=True)
        return ranking[0], [b for (a, b), d in found if a == ranking[0] and not d.separable]


def student(t: float, freedom: float) -> tuple[float, float]:
    """-> the t of a CONFIDENCE interval, and the two-sided p of a t. `freedom` at least 1."""
    angle = np.linspace(0, np.pi / 2, 20001)  # with t = sqrt(freedom) tan(angle) the density is
    density = np.cos(angle) ** (max(freedom, 1.0) - 1)  # cos^(freedom - 1): finite, and ends
    within = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    within /= within[-1]
    width = np.tan(np.interp(CONFIDENCE, within, angle)) * freedom**0.5
    p = 1 - np.interp(np.arctan(t / freedom**0.5), angle, within)
    return float(width), float(p)


def holm(p: list[float]) -> list[float]:
    """p-values made larger so that all verdicts hold together (Holm 1979). NaN stays and is free."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p)  # NaN last
    tests = np.isfinite(p).sum()
    adjusted = np.full(len(p), np.nan)
    known = order[:tests]
    adjusted[known] = np.maximum.accumulate(p[known] * np.arange(tests, 0, -1)).clip(max=1)
    return adjusted.tolist()


def pareto(costs: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """(n,), (n,) -> (n,) bool: the points that no other beats in cost without losing in gain."""
    costs, gains = np.asarray(costs, dtype=float), np.asarray(gains, dtype=float)
    no_worse = (costs[None] <= costs[:, None]) & (gains[None] >= gains[:, None])
    better = (costs[None] < costs[:, None]) | (gains[None] > gains[:, None])
    return np.isfinite(costs) & np.isfinite(gains) & ~(no_worse & better).any(1)
