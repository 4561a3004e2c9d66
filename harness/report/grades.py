"""What people said of the answers: grades with intervals, and how far those who gave them agree."""

from functools import cache
from math import sqrt
from statistics import NormalDist

import numpy as np

from harness.errors import BadRequest, Problem, Problems, unknown
from harness.grade import CRITERIA, HIGHEST, Graded, Grades, key
from harness.record import RunRecord
from harness.report import blocks as b
from harness.report.comparison import UNTOUCHED, Comparison, Technique, comparisons, read_outputs
from harness.report.stats import CONFIDENCE
from harness.report.text import UNKNOWN, listed, number
from harness.store import Store

DRAWS = 5000  # of the prompts: the ends of an interval are known to a hundredth of a grade
FEWEST = 6  # prompts: all of fewer lie on one side of the truth in more than 5 % of cases
ALPHA_DRAWS = 1000  # to a hundredth
HOW = (
    f"Grades from 0 to {HIGHEST}, higher is better, by people who were not told whose an answer was, and saw "
    "the answers to each prompt in an order of their own. An answer counts once it has all three grades."
)
MEANS = (
    "Means over prompts of the mean over raters, each technique with its lowest seed. In brackets "
    f"intervals of {CONFIDENCE:.0%}, each by itself, so that of twenty one is off: a bootstrap over prompts, "
    f"widened as so few prompts ask for (Hesterberg 2015); of fewer than {FEWEST}, none. Other raters and "
    "other seeds are not in them. Less the untouched model: the mean of the three grades, prompt by prompt "
    "and rater by rater."
)
ALPHA = (
    "Krippendorff's alpha for ordered values: 1 where raters agree on every answer, 0 where they agree as "
    "often as by chance. Krippendorff (2004) asks for 0.8, and for tentative conclusions for 0.667. In "
    "brackets the interval over prompts. Over answers with two raters or more."
)


def contestants(store: Store, place: int, methods: list[str]) -> tuple[str, list[RunRecord]]:
    """Whose answers people grade: of the comparison at this place, 1 the newest, the untouched model and the
    methods that are named, or all: of each technique the lowest seed. -> the comparison's title, the runs.

    Raises BadRequest where there are none.
    """
    found = comparisons(store.load()[0])
    if not found:
        raise BadRequest(Problem(f"no run to grade in {store.folder}"))
    if place > len(found):
        titles = tuple(f"{i} ({comparison.title})" for i, comparison in enumerate(found, 1))
        raise BadRequest(Problem(f"there is no {place}", "--comparison", available=titles))
    comparison = found[place - 1]
    if comparison.random_weights:
        raise BadRequest(f"{comparison.title}: the weights were drawn at random, no answer says anything")
    read_outputs(comparison, store)
    techniques = answering(comparison)
    known = {t.spec.method for t in techniques}
    problems = Problems()
    for name in methods:
        problems.add("--methods", None if name in known else unknown("method", name, known))
    problems.refuse()
    chosen = [t for t in techniques if not methods or t.spec.method in (UNTOUCHED, *methods)]
    if not chosen:
        raise BadRequest(f"{comparison.title}: no run has answers")
    return comparison.title, [t.outputs_of for t in chosen if t.outputs_of]


def answering(comparison: Comparison) -> list[Technique]:
    """The untouched model and all techniques, as far as they have answers."""
    return [t for t in (comparison.base(UNTOUCHED), *comparison.trained) if t and t.outputs_of]


def graded(comparison: Comparison, store: Store) -> list[b.Block]:
    raters, corrupt = Grades(store.folder).load()
    techniques = [] if comparison.random_weights else answering(comparison)
    rows = {said["row"] for rater in raters for said in rater["answers"].values()}
    keys = answers(techniques, store, rows)
    given = np.array([
        [[grades_of(rater["answers"].get(k)) for k in of_row] for of_row in keys] for rater in raters
    ]).reshape(len(raters), len(keys), len(techniques), len(CRITERIA))  # fmt: skip
    heard = [rater for rater, own in zip(raters, given, strict=True) if np.isfinite(own).any()]
    found: list[b.Block] = []
    trained = np.array([t.spec.trains or not comparison.trained for t in techniques], bool)
    if np.isfinite(given[:, :, trained]).any():  # and not the untouched model's alone, which others share
        given = given[np.isfinite(given).any((1, 2, 3))]
        named = f"{len(heard)} rater{'s' * (len(heard) > 1)}: {listed([rater['rater'] for rater in heard])}."
        found = [b.Prose(f"{HOW} {named}"), means(techniques, given), agreement(keys, given)]
    if corrupt:
        found.append(b.Notice(f"Grades that could not be read: {listed(corrupt)}."))
    return [b.Heading("Graded samples"), *found] if found else []


def answers(techniques: list[Technique], store: Store, rows: set[str]) -> list[list[str]]:
    """The key of each technique's answer to each of the test rows that are named (rows, techniques)."""
    runs = [technique.outputs_of for technique in techniques if technique.outputs_of]
    if not runs or not rows:
        return []
    chosen = [i for i, output in enumerate(store.outputs(runs[0])) if output["id"] in rows]
    of_run = [map(key, store.outputs(run, chosen)) for run in runs]
    return [list(of_row) for of_row in zip(*of_run, strict=True)]


def grades_of(said: Graded | None) -> list[float]:
    """By criterion; NaN unless all were given."""
    whole = [said["grades"].get(criterion, np.nan) if said else np.nan for criterion in CRITERIA]
    return whole if np.isfinite(whole).all() else [np.nan] * len(whole)


def means(techniques: list[Technique], given: np.ndarray) -> b.Table:
    """`given`: (raters, prompts, techniques, criteria)."""
    whole = given.mean(3)
    base = techniques[0].spec.method == UNTOUCHED
    rows = []
    for i, technique in enumerate(techniques):
        of_prompts = [
            *(over_raters(given[:, :, i, c]) for c in range(len(CRITERIA))),
            over_raters(whole[:, :, i]),
        ]
        less = over_raters(whole[:, :, i] - whole[:, :, 0]) if base and i else np.zeros(0)
        if len(of_prompts[0]):
            cells = [*map(told, of_prompts), told(less, signed=True), str(len(of_prompts[0]))]
            rows.append([technique.label, *cells])
    columns = ["Technique", *(name.capitalize() for name in CRITERIA), "Mean of the three"]
    return b.Table([*columns, "Less the untouched model", "Prompts"], rows, [MEANS])


def over_raters(values: np.ndarray) -> np.ndarray:
    """(raters, prompts) -> the mean of each prompt that anybody graded."""
    known = np.isfinite(values)
    some = known.any(0)
    return np.where(known, values, 0.0).sum(0)[some] / known.sum(0)[some]


def told(values: np.ndarray, signed: bool = False) -> str:
    """`3.40 (2.71 to 4.02)`."""
    if not len(values):
        return UNKNOWN
    text = number(float(values.mean()), 2, signed)
    low, high = interval(values)
    return f"{text} ({number(low, 2, signed)} to {number(high, 2, signed)})" if np.isfinite(low) else text


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of a few prompts. NaN where they are too few, or all the same: they say nothing of others.

    A percentile bootstrap is too narrow by sqrt((n - 1) / n) and by what Student's t has over the normal
    distribution: its quantiles are taken as much further out (Hesterberg 2015, What Teachers Should Know
    about the Bootstrap, section 5.3).
    """
    count = len(values)
    if count < FEWEST or not np.ptp(values):
        return np.nan, np.nan
    drawn = values[np.random.default_rng(0).integers(count, size=(DRAWS, count))].mean(1)
    tail = NormalDist().cdf(-student(count - 1) * sqrt(count / (count - 1)))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


@cache
def student(freedom: int) -> float:
    """Student's critical value, by draws: SciPy is not needed for one number."""
    return float(np.quantile(np.abs(np.random.default_rng(0).standard_t(freedom, 20 * DRAWS)), CONFIDENCE))


def agreement(keys: list[list[str]], given: np.ndarray) -> b.Table:
    """Over the different texts: one that two techniques wrote was graded once."""
    units = [(p, of_row.index(k)) for p, of_row in enumerate(keys) for k in dict.fromkeys(of_row)]
    prompts = np.array([prompt for prompt, _ in units])
    rows = []
    for c, criterion in enumerate(CRITERIA):
        said = np.array([given[:, p, t, c] for p, t in units])  # (answers, raters)
        counts = (said[:, :, None] == np.arange(HIGHEST + 1)).sum(1)  # (answers, grades)
        shared = counts.sum(1) > 1
        rows.append([criterion.capitalize(), alpha_told(counts[shared], prompts[shared]), str(shared.sum())])
    return b.Table(["Agreement", "Krippendorff's alpha", "Answers"], rows, [ALPHA])


def alpha_told(counts: np.ndarray, prompts: np.ndarray) -> str:
    """`counts` (answers, grades); `prompts` (answers,) to which each is: they are drawn, with all answers."""
    value = alpha(counts)
    places = [np.flatnonzero(prompts == prompt) for prompt in np.unique(prompts)]
    if not np.isfinite(value) or len(places) < FEWEST:
        return number(value)
    draws = np.random.default_rng(0).integers(len(places), size=(ALPHA_DRAWS, len(places)))
    drawn = [alpha(counts[np.concatenate([places[i] for i in draw])]) for draw in draws]
    ends = [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    low, high = (float(np.nanquantile(drawn, end)) for end in ends)
    return f"{number(value)} ({number(low)} to {number(high)})" if low < high else number(value)


def alpha(counts: np.ndarray) -> float:
    """Krippendorff's, of ordered values. `counts`: (answers, grades) how many raters gave which. NaN where
    nobody shares an answer, or all gave one and the same grade: there is no chance to compare with."""
    import krippendorff

    if (counts.sum(0) > 0).sum() < 2:
        return np.nan
    return float(krippendorff.alpha(value_counts=counts, level_of_measurement="ordinal"))
