import random

import numpy as np
import pytest

from harness.metrics import METRICS, scores, total
from harness.report.stats import Family, Sample

sacrebleu = pytest.importorskip("sacrebleu")
MEAN = METRICS["rouge_l"].value


def scored(seeds: list, value=MEAN) -> Sample:
    """A technique of which each seed scores each test row so much."""
    return Sample.of_rows([np.stack([row, np.ones(len(row))], 1) for row in np.asarray(seeds, float)], value)


def difference(a: list, b: list, **options):
    return Family({"a": scored(a), "b": scored(b)}, [("a", "b")], **options).difference("a", "b")


def all_pairs(names) -> list[tuple]:
    names = list(names)
    return [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]


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


def test_a_rows_pull_on_a_mean_is_its_distance_from_it():
    row = np.random.default_rng(0).random(40)
    assert scored([row]).pulls[0] == pytest.approx(row - row.mean())


def test_the_error_of_bleu_is_what_sacrebleu_finds_by_resampling():
    luck, words = random.Random(0), ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree"]
    references = [[luck.choice(words) for _ in range(luck.randint(6, 15))] for _ in range(200)]
    outputs = [[w if luck.random() < 0.6 else luck.choice(words) for w in r] for r in references]
    texts = [[" ".join(words) for words in side] for side in (outputs, references)]
    sentence = sacrebleu.BLEU(effective_order=True)
    counts = [sentence.sentence_score(o, [r]) for o, r in zip(*texts, strict=True)]
    sums = np.array([[c.sys_len, c.ref_len, *c.counts, *c.totals] for c in counts], dtype=float)
    sample = Sample.of_rows([sums], METRICS["bleu4"].value)
    resampled = sacrebleu.BLEU().corpus_score(texts[0], [texts[1]], n_bootstrap=1000)
    assert sample.point == pytest.approx(resampled.score)
    assert 1.96 * sample.pulls.std() / 200**0.5 == pytest.approx(resampled._ci, rel=0.1)


def test_identical_runs_differ_by_exactly_nothing():
    row = np.random.default_rng(0).random(50)
    d = difference([row] * 3, [row] * 3)
    assert (d.value, d.low, d.high, d.sign) == (0, 0, 0, 0)
    seeds = [np.random.default_rng(i).random(50) for i in range(3)]
    d = difference(seeds, seeds)
    assert d.value == 0 and d.low == -d.high and d.sign == 0


@pytest.mark.parametrize("unsteady", [0.0, 0.2])
@pytest.mark.parametrize("other_rows", [0, 1])
def test_a_twin_widens_the_intervals_no_more_than_a_stranger(other_rows, unsteady):
    """Two techniques with the same answers, as where a method has become another one's special case, but for
    the order of a sum, or a row that a tie of two words decides."""
    rng = np.random.default_rng(5)
    a, b, stranger = rng.random((3, 3, 60)) + unsteady * rng.standard_normal((3, 3, 1))
    twin = a + 1e-14 * rng.standard_normal(a.shape)
    twin[0, :other_rows] += 0.1

    def of_three(third):
        samples = {"a": scored(a), "b": scored(b), "third": scored(third)}
        return Family(samples, all_pairs(samples))

    family, width = of_three(twin), of_three(stranger).width[0]
    d, same = family.difference("a", "b"), family.difference("a", "third")
    assert (d.high - d.low) / 2 < 1.1 * width
    assert same.sign == 0 and same.high - same.low < width / 2
    assert other_rows or (same.value == 0 and same.high - same.low < 1e-12)


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_rows_that_two_techniques_share_do_not_make_their_seeds_the_same(noise):
    """Both read the same batches, which moves the same rows; each seed starts elsewhere, which moves all."""
    rng, apart = np.random.default_rng(8), 0
    for _ in range(200):
        shared = rng.normal(0, 0.2, (3, 100))
        a, b = (shared + noise * rng.standard_normal((3, 100)) + 0.01 * rng.standard_normal((3, 1))
                for _ in range(2))  # fmt: skip
        apart += bool(difference(a, b, draws=500).sign)
    assert apart <= 20  # 5 %, and three standard errors


@pytest.mark.parametrize(("of_rows", "of_seed", "hair"), [(0.0, 0.05, 1e-6), (0.2, 0.001, 1e-8)])
def test_a_hair_between_near_twins_is_no_difference(of_rows, of_seed, hair):
    """As of a weight decay that is nearly none: what differs is as unlike from seed to seed as it is big,
    also where seeds move each row by itself and hardly the score."""
    rng, apart = np.random.default_rng(9), 0
    for _ in range(200):
        noise = of_rows * rng.standard_normal((3, 100))
        a = 3 + rng.random(100) + noise - noise.mean(1, keepdims=True) + of_seed * rng.standard_normal((3, 1))
        b = a + hair * rng.standard_normal((3, 100)) + 1e-6 * rng.standard_normal((3, 1))
        apart += bool(difference(a, b, draws=500).sign)
    assert apart <= 20  # 5 %, and three standard errors


def test_a_difference_that_every_seed_repeats_is_found():
    """However far apart the seeds are themselves, where both techniques go with them."""
    rng, apart = np.random.default_rng(10), 0
    for _ in range(50):
        a = 3 + rng.random((3, 100)) + 0.05 * rng.standard_normal((3, 1))
        b = a + 0.01 + 0.002 * rng.standard_normal((3, 100))
        apart += difference(b, a, draws=500).sign
    assert apart >= 45


def test_what_rounding_leaves_of_a_difference_is_nothing():
    for k in range(40):
        rng = np.random.default_rng(k)
        values = dict(zip("abc", rng.random((3, 3, 60)), strict=True))
        values["twin of a"] = values["a"] + 1e-14 * rng.standard_normal((3, 60))
        samples = {name: scored(seeds) for name, seeds in values.items()}
        strangers = samples | {"twin of a": scored(rng.random((3, 60)))}
        families = [Family(each, all_pairs(each)) for each in (samples, strangers)]
        assert families[0].critical < 1.1 * families[1].critical
        same = families[0].difference("a", "twin of a")
        assert same.value == 0 and same.high - same.low < 1e-12


def test_seeds_that_differ_by_one_amount_in_every_row_have_no_chance_of_their_own_there():
    """But for rounding, of which no multiple says how far seeds vary: their values alone do."""
    rng = np.random.default_rng(0)
    rows, shifts = rng.normal(size=(2, 1000)), rng.normal(0, 0.01, (2, 3))
    a, b = (row + shift[:, None] for row, shift in zip(rows, shifts, strict=True))
    c = rows[0] + rng.normal(0, 0.1, (3, 1000))
    family = Family({"a": scored(a), "b": scored(b), "c": scored(c)}, all_pairs("abc"))
    assert family.own_rows[:2].tolist() == [0, 0] and family.own_rows[2] > 0
    assert family.width.max() < 1 and family.detectable(family.width > 0) < 1


def test_the_same_samples_have_the_same_interval():
    a, b = np.random.default_rng(0).random((2, 3, 80))
    assert difference(a, b) == difference(a, b)


def test_one_way_round_is_the_other_with_its_sign_turned():
    a, b = np.random.default_rng(0).random((2, 3, 80))
    family = Family({"a": scored(a), "b": scored(b)}, [("a", "b")])
    d, turned = family.difference("a", "b"), family.difference("b", "a")
    assert (turned.value, turned.low, turned.high) == pytest.approx((-d.value, -d.high, -d.low))


def test_one_pair_of_single_seeds_is_scipys_paired_t():
    stats = pytest.importorskip("scipy.stats")
    a, b = np.random.default_rng(1).normal(0, 1, (2, 25))
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    d = difference([a], [b], draws=100_000)
    assert (d.low, d.high) == pytest.approx((expected.low, expected.high), rel=0.02, abs=0.01)


@pytest.mark.parametrize("count", [6, 13])  # of pairs more than are drawn at once
def test_all_pairs_of_single_seeds_are_tukeys(count):
    """Where rows are many and techniques do not share them, the greatest of all differences is known."""
    stats = pytest.importorskip("scipy.stats")
    rows = np.random.default_rng(2).normal(0, 1, (count, 4000))
    family = Family({i: scored([row]) for i, row in enumerate(rows)}, all_pairs(range(count)), draws=50_000)
    assert family.critical == pytest.approx(
        stats.studentized_range.ppf(0.95, count, np.inf) / 2**0.5, rel=0.02
    )


def test_chance_of_a_row_in_a_seed_counts_once():
    """Seeds that differ by no more than their rows say: the variance is that of the mean over them."""
    rng = np.random.default_rng(3)
    seeds = rng.normal(0, 1, (3, 60))
    seeds += 0.3 - seeds.mean(1, keepdims=True)  # all seeds score the same: less than chance would have it
    family = Family({"a": scored(seeds), "b": scored([np.zeros(60)])}, [("a", "b")])
    assert family.width[0] / family.critical == pytest.approx(seeds.mean(0).std(ddof=1) / 60**0.5)
    seeds += np.array([[-1.0], [0.0], [1.0]])  # much more: what their spread says
    family = Family({"a": scored(seeds), "b": scored([np.zeros(60)])}, [("a", "b")])
    of_technique = seeds.mean(0).var(ddof=1) / 60 - family.own_rows[0] / 3
    assert family.width[0] / family.critical == pytest.approx((of_technique + 1 / 3) ** 0.5)


def test_seeds_alone_are_the_sample_of_a_cost():
    """No technique is taken to be steadier than all are together, and an unsteady one not to be steadier."""
    samples = {"a": [0.0, 0.1, 0.2], "b": [1.0, 1.01, 1.02], "c": [2.0, 2.0, 2.0]}
    family = Family({k: Sample.of_seeds(v) for k, v in samples.items()}, all_pairs(samples))
    shared = (0.1**2 + 0.01**2) / 3
    assert family.larger(family.spread) == pytest.approx([0.01, shared, shared])
    assert family.width[2] / family.critical == pytest.approx((2 * shared / 3) ** 0.5)  # b and c
    exact = Family({k: Sample.of_seeds([v] * 3) for k, v in {"a": 1.0, "b": 2.0}.items()}, [("a", "b")])
    assert exact.difference("a", "b").sign == -1


def test_pairing_removes_what_both_sides_share():
    shared = np.random.default_rng(3).normal(0, 1, 400)
    d = difference([shared + 0.01], [shared])
    assert d.high - d.low < 1e-9 and d.sign == 1


def test_the_detectable_difference_of_one_pair_is_the_text_books():
    """2.80 standard errors: 1.96 for the level, 0.84 for the power."""
    a, b = np.random.default_rng(4).normal(0, 1, (2, 2000))
    family = Family({"a": scored([a]), "b": scored([b])}, [("a", "b")], draws=50_000)
    error = (a - b).std() / 2000**0.5
    assert family.detectable(np.array([True])) == pytest.approx(2.80 * error, rel=0.02)
    assert family.power(0, 2.80 * error) == pytest.approx(0.8, abs=0.01)


def test_unknown_scores_stay_unknown():
    family = Family({"a": scored([np.ones(9)]), "b": scored([[1, None, *[1] * 7]])}, [("a", "b")])
    d = family.difference("a", "b")
    assert np.isnan(d.value) and d.sign == 0 and not family.pairs


def test_runs_over_other_rows_are_refused():
    with pytest.raises(ValueError, match="same test rows"):
        Family({"a": scored([[1, 2]]), "b": scored([[1, 2, 3]])}, [("a", "b")])


@pytest.mark.parametrize("seeds, unsteady", [(1, 0.0), (3, 0.0), (3, 0.02), (3, 0.1)])
def test_all_intervals_hold_as_often_as_they_say(seeds, unsteady):
    """Five techniques with shared easy and hard rows; `unsteady`: how much their seeds vary."""
    rng, means = np.random.default_rng(7), np.linspace(0.4, 0.6, 5)
    held, benches = 0, 150
    for _ in range(benches):
        rows = rng.normal(0, 0.3, 120) + rng.normal(0, 0.1, (5, 1, 120)) + means[:, None, None]
        runs = rows + rng.normal(0, 0.1, (5, seeds, 120)) + rng.normal(0, unsteady, (5, seeds, 1))
        family = Family({i: scored(of) for i, of in enumerate(runs)}, all_pairs(range(5)), draws=500)
        seen = {pair: family.difference(*pair) for pair in family.pairs}
        held += all(d.low <= means[a] - means[b] <= d.high for (a, b), d in seen.items())
    assert 0.90 <= held / benches <= 0.99  # 95 % give or take three standard errors
