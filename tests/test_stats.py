import random

import numpy as np
import pytest

from harness.metrics import METRICS, scores, total
from harness.report.stats import Bootstrap, holm, pareto, student

sacrebleu = pytest.importorskip("sacrebleu")


def rows(values, metric: str = "rouge_l") -> dict[str, np.ndarray]:
    """Test rows with these values of a metric."""
    return {metric: np.array([[value, 1] for value in values], dtype=float).reshape(-1, 2)}


def interval(a: list, b: list, **options):
    sample = Bootstrap({"a": list(map(rows, a)), "b": list(map(rows, b))}, **options)
    return sample.difference("rouge_l", "a", "b")


@pytest.mark.parametrize("words, length", [("a b c", 12), ("a b c d e f g h", 5), ("abcdefghijklmnop", 2)])
def test_bleu_of_summed_counts_is_sacrebleus(words, length):
    luck = random.Random(words)
    bleu = sacrebleu.BLEU()
    sentence = sacrebleu.BLEU(effective_order=True)
    for _ in range(40):
        hypotheses, references = (
            [" ".join(luck.choices(words.split() or [words], k=luck.randint(0, length))) for _ in range(3)]
            for _ in range(2)
        )
        scores = [sentence.sentence_score(h, [r]) for h, r in zip(hypotheses, references, strict=True)]
        sums = np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores])
        expected = bleu.corpus_score(hypotheses, [references]).score
        assert METRICS["bleu4"].value(sums.sum(0)) == pytest.approx(expected, abs=1e-9)


def test_bleu_from_counts_with_zeros_is_sacrebleus():
    rng = np.random.default_rng(0)
    for _ in range(200):
        totals = np.sort(rng.integers(0, 6, 4))[::-1]
        correct = [int(rng.integers(0, total + 1)) for total in totals]
        lengths = [int(totals[0]), int(rng.integers(0, 9))]
        expected = sacrebleu.BLEU.compute_bleu(correct, totals.tolist(), *lengths, smooth_method="exp").score
        sums = np.array([*lengths, *correct, *totals], dtype=float)
        assert METRICS["bleu4"].value(sums) == pytest.approx(expected, abs=1e-9)


def test_corpus_scores_weigh_tokens_not_rows():
    text = {"output": "", "reference": ""}
    outputs = [{**text, "sums": {"rouge_l": [0.2, 1]}, "nll": 3.0, "tokens": 1, "correct": 0},
               {**text, "sums": {"rouge_l": [0.6, 1]}, "nll": 5.0, "tokens": 9, "correct": 8}]  # fmt: skip
    found = scores(total(outputs, {}))
    assert found["rouge_l"] == pytest.approx(0.4)
    assert found["perplexity"] == pytest.approx(np.exp(0.8))
    assert found["token_accuracy"] == pytest.approx(0.8)


def test_identical_runs_differ_by_exactly_nothing():
    run = np.random.default_rng(0).random(50)
    d = interval([run] * 3, [run] * 3)
    assert (d.value, d.low, d.high, d.p) == (0, 0, 0, 1)
    runs = [np.random.default_rng(i).random(50) for i in range(3)]
    d = interval(runs, runs)  # the seeds vary, the rows drawn are the same
    assert d.value == 0 and d.p == 1 and d.low == -d.high


def test_the_same_seed_draws_the_same_interval():
    a, b = (np.random.default_rng(i).random((2, 80)) for i in (0, 1))
    assert interval(a, b) == interval(a, b)


@pytest.mark.parametrize("seeds, seed_noise", [(1, 0.0), (3, 0.02), (3, 0.1)])
def test_interval_covers_the_true_difference_as_often_as_it_says(seeds, seed_noise):
    rng = np.random.default_rng(7)
    hits = 0
    for trial in range(120):
        shared = rng.normal(0, 0.3, 150)  # hard and easy rows, for both alike
        a, b = (
            [mean + shared + rng.normal(0, 0.1, 150) + rng.normal(0, seed_noise) for _ in range(seeds)]
            for mean in (0.55, 0.50)
        )
        d = interval(a, b, resamples=200, seed=trial)
        hits += d.low <= 0.05 <= d.high
    assert 0.89 <= hits / 120 <= 1.0


def test_pairing_removes_what_both_sides_share():
    rng = np.random.default_rng(3)
    shared = rng.normal(0, 1, 400)
    d = interval([shared + 0.01], [shared])
    assert d.high - d.low < 1e-9 and d.separable


def test_ties_are_what_cannot_be_told_from_the_best():
    rng = np.random.default_rng(5)
    means = {"good": 0.60, "alike": 0.595, "poor": 0.30}
    runs = {n: [rows(m + rng.normal(0, 0.2, 300)) for _ in range(3)] for n, m in means.items()}
    best, tied = Bootstrap(runs).ties("rouge_l", list(means))
    assert {best, *tied} == {"good", "alike"}


def test_lower_perplexity_is_better():
    low, high = (rows([nats] * 20, "perplexity") for nats in (1.0, 2.0))
    assert Bootstrap({"low": [low], "high": [high]}).ties("perplexity", ["low", "high"]) == ("low", [])


def test_unknown_scores_stay_unknown():
    known, unknown = rows(np.ones(9)), rows([1, None, 1, 1, 1, 1, 1, 1, 1])
    d = Bootstrap({"a": [known], "b": [unknown]}).difference("rouge_l", "a", "b")
    assert np.isnan(d.value) and not d.separable


def test_runs_over_other_rows_are_refused():
    for runs in ({}, {"a": [rows([])]}, {"a": [rows([1, 2])], "b": [rows([1])]}):
        with pytest.raises(ValueError, match="same test rows"):
            Bootstrap(runs)


def test_student_is_scipys():
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3.7, 30, 6000):
        width, p = student(1.7, freedom)
        assert width == pytest.approx(scipy.t.ppf(0.975, freedom), rel=1e-4)
        assert p == pytest.approx(2 * scipy.t.sf(1.7, freedom), abs=1e-5)


def test_holm_steps_down():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    adjusted = holm([0.02, float("nan")])
    assert adjusted[0] == pytest.approx(0.02) and np.isnan(adjusted[1])
    assert holm([]) == []


def test_pareto_front_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = rng.integers(0, 5, (8, 2)).astype(float)
        expected = [
            not any((c <= cost and g > gain) or (c < cost and g >= gain) for c, g in points)
            for cost, gain in points
        ]
        assert pareto(points[:, 0], points[:, 1]).tolist() == expected
    assert pareto([1.0, np.nan], [1.0, 2.0]).tolist() == [True, False]
