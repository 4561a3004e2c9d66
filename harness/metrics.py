"""BLEU-4, ROUGE-L, perplexity and the other metrics: each one object, and what it adds up over test rows.

A metric is a function of sums over test rows, so that it can be computed again for any choice of rows.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Metric:
    """What a model scores on test rows: the `value` of sums over them. `sums` gives the numbers of a row that
    are added up, from its line of outputs.jsonl and the dataset's spec."""

    name: str  # in records and JSON
    label: str  # in reports
    unit: str
    sums: Callable[[dict, Mapping], Sequence[float | None]]  # null: not known
    value: Callable[[np.ndarray], np.ndarray]  # (..., width) -> (...)
    signature: Callable[[Mapping], str]  # how it was computed, for a dataset's spec
    better: Literal["higher", "lower"] = "higher"
    decimals: int = 3  # of a score in a table
    range: tuple[float, float] = (0.0, 1.0)  # in which a score must lie
    width: int = 2  # numbers a row: most metrics are one sum over another
    kept: bool = False  # a run keeps the numbers of its rows: they are slow to compute
    ratio: bool = False  # techniques differ by a share of it, not by an amount: it grows as an exponential
    compared: bool = False  # has differences, verdicts and plots; others stand in a table alone


PREFERENCE_SIGNATURE = (
    "rows in which the reference is likelier per token than the rejected answer: the dataset's, else the "
    "untouched model's own greedy one"
)
ROUGE_SIGNATURE = "rouge-score:rougeL|F1, mean over rows|stemmer:no|tokens:Unicode words, CJK by character"
LIKELIHOOD_SIGNATURE = "corpus level, response tokens with the end mark, teacher-forced"
STOP_SIGNATURE = "greedy, stopped before max_new_tokens"
LANGUAGES = """
aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz ee
el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io is
it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr ms
mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si sk
sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh yi
yo za zh zu
"""  # ISO 639-1
BLEU_TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}  # 13a splits at spaces
CJK = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\uac00-\ud7af"
WORD = re.compile(rf"[{CJK}]|[^\W_{CJK}]+")


def texts(output: dict) -> tuple[str, str]:
    """The answer and its reference."""
    found = output["output"], output["reference"]
    if not all(isinstance(text, str) for text in found):
        raise TypeError("an output and its reference are texts")
    return found


@cache  # importing sacrebleu takes a while
def bleu(language: str, **options):
    from sacrebleu.metrics import BLEU

    return BLEU(tokenize=BLEU_TOKENIZERS.get(language, "13a"), **options)


def bleu_counts(output: dict, dataset: Mapping) -> list[int]:
    """Output length, reference length, matches of 1- to 4-grams, n-grams of 1 to 4."""
    answer, reference = texts(output)
    # one row may be shorter than four words, a corpus is not
    found = bleu(dataset.get("language", "en"), effective_order=True).sentence_score(answer, [reference])
    return [found.sys_len, found.ref_len, *found.counts, *found.totals]


def bleu_signature(dataset: Mapping) -> str:
    corpus = bleu(dataset.get("language", "en"))
    corpus.corpus_score(["a"], [["a"]])  # it knows its number of references only after one
    return corpus.get_signature().format()


@lru_cache(maxsize=1)  # the reward asks for the same once more
def rouge_l(answer: str, reference: str) -> float:
    """F1, 0 to 1, as rouge-score has it of these words."""
    said, meant = words(answer), words(reference)
    if not (found := common(said, meant)):
        return 0.0
    precision, recall = found / len(said), found / len(meant)
    return 2 * precision * recall / (precision + recall)


def words(text: str) -> list[str]:
    """rouge-score's own tokens on ASCII text, where it drops other letters; each CJK character is one."""
    return WORD.findall(text.lower())


def common(one: list[str], other: list[str]) -> int:
    """Length of the longest common subsequence, a row of its table at once (Hyyrö 2004): a bit of `ends` is 0
    where the row grows."""
    places: dict[str, int] = {}
    for i, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << i
    ends = every = (1 << len(one)) - 1
    for word in other:
        matches = ends & places.get(word, 0)
        ends = (ends + matches | ends - matches) & every
    return len(one) - ends.bit_count()


def exact(answer: str, reference: str) -> float:
    return float(final_answer(answer) == final_answer(reference))


def final_answer(text: str) -> str:
    """What an answer comes down to, as the signature of the exact reward says."""
    if "####" in text:
        text = text.rpartition("####")[2]
    elif boxed := re.findall(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}", text):
        text = boxed[-1]
    elif numbers := re.findall(r"-?\d[\d,]*(?:\.\d+)?", text):
        text = numbers[-1]
    text = re.sub(r"(?<=\d),(?=\d)", "", " ".join(text.split())).strip(" .$")
    return re.sub(r"(?<=\d)\.0+$", "", text)


def bleu4(counts: np.ndarray) -> np.ndarray:
    """Corpus BLEU-4, 0 to 100, from bleu_counts (..., 10) summed over rows.

    As sacrebleu: exponential smoothing of orders without a match, brevity penalty.
    """
    counts = np.asarray(counts, dtype=float)
    lengths, references = counts[..., 0], counts[..., 1]
    matches, totals = counts[..., 2:6], counts[..., 6:10]
    misses = np.cumsum(matches == 0, axis=-1)  # how many orders have missed up to this one
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(matches == 0, 1 / 2.0**misses, matches) / totals
        bleu = np.exp(np.log(precision).mean(-1)) * np.exp(np.minimum(0, 1 - references / lengths))
    # Nothing matches at all, or some order has no n-gram: sacrebleu says 0.
    none = (matches.sum(-1) == 0) | (totals == 0).any(-1)
    return np.where(none, 0.0, 100 * bleu)


# What an answer earns, by the dataset's spec: how, and its signature.
REWARDS: dict[str, tuple[Callable[[str, str], float], str]] = {
    "rouge_l": (rouge_l, "ROUGE-L F1 with the reference"),
    "exact": (
        exact,
        "1 if the final answer is the reference's: what follows the last ####, else the last \\boxed{}, "
        "else the last number, else the whole text; commas in numbers do not count",
    ),
}


def reward(dataset: Mapping) -> tuple[Callable[[str, str], float], str]:
    """What an answer to a row of this dataset earns by its reference, 0 to 1, and the signature of it. Raises
    ValueError for a reward that this version does not know."""
    kind = dataset.get("reward", "rouge_l")
    if kind not in REWARDS:
        raise ValueError(f"unknown reward {kind!r}. Available: {', '.join(REWARDS)}")
    return REWARDS[kind]


def ratio(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def preferred(output: dict, dataset: Mapping) -> tuple[int, int]:
    """A row without a rejected answer does not count."""
    margin = output.get("margin")
    return (0, 0) if margin is None else (int(margin > 0), 1)


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "bleu4",
            "BLEU-4",
            "0 to 100",
            bleu_counts,
            bleu4,
            bleu_signature,
            decimals=2,
            range=(0.0, 100.0),
            width=10,
            kept=True,
            compared=True,
        ),
        Metric(
            "rouge_l",
            "ROUGE-L",
            "F1, 0 to 1",
            lambda output, dataset: (rouge_l(*texts(output)), 1),
            ratio,
            lambda dataset: ROUGE_SIGNATURE,
            kept=True,
            compared=True,
        ),
        Metric(
            "perplexity",
            "Perplexity",
            "per response token",
            lambda output, dataset: (output.get("nll"), output.get("tokens")),
            lambda sums: np.exp(ratio(sums)),
            lambda dataset: LIKELIHOOD_SIGNATURE,
            better="lower",
            decimals=2,
            range=(0.0, math.inf),
            ratio=True,
            compared=True,
        ),
        Metric(
            "token_accuracy",
            "Token accuracy",
            "share of response tokens",
            lambda output, dataset: (output.get("correct"), output.get("tokens")),
            ratio,
            lambda dataset: LIKELIHOOD_SIGNATURE,
        ),
        Metric(
            "stop_rate",
            "Stop rate",
            "share of answers that ended by themselves",
            lambda output, dataset: (output.get("stopped"), 1),
            ratio,
            lambda dataset: STOP_SIGNATURE,
        ),
        Metric(
            "preference_accuracy",
            "Preference accuracy",
            "share of test rows",
            preferred,
            ratio,
            lambda dataset: PREFERENCE_SIGNATURE,
        ),
        Metric(
            "reward",
            "Reward",
            "mean over answers, 0 to 1",
            lambda output, dataset: (reward(dataset)[0](*texts(output)), 1),
            ratio,
            lambda dataset: reward(dataset)[1],
            kept=True,
        ),
    )
}


def compared() -> list[Metric]:
    """Those that have differences, verdicts and plots; the first of them leads."""
    return [metric for metric in METRICS.values() if metric.compared]


def kept_sums(output: dict, dataset: Mapping) -> dict[str, list[float | None]]:
    """What a run keeps of a test output: the numbers that are slow to compute, by metric."""
    return {name: list(metric.sums(output, dataset)) for name, metric in METRICS.items() if metric.kept}


def row_sums(outputs: list[dict], dataset: Mapping) -> dict[str, np.ndarray]:
    """The numbers of each test row, by metric (rows, width). NaN: not known.

    What a run did not keep, as it is older than a metric, is computed from its texts; not known where the
    package that does it is not installed. Raises ValueError where there is no row.
    """
    if not outputs:
        raise ValueError("no test outputs to score")
    return {
        name: np.array([numbers(metric, output, dataset) for output in outputs], dtype=float)
        for name, metric in METRICS.items()
    }


def numbers(metric: Metric, output: dict, dataset: Mapping) -> Sequence[float | None]:
    if metric.kept and len(kept := output.get("sums", {}).get(metric.name, ())) == metric.width:
        return kept
    try:
        return metric.sums(output, dataset)
    except ImportError:
        return [None] * metric.width


def total(outputs: list[dict], dataset: Mapping) -> dict[str, list[float]]:
    """The sums over all test rows, by metric."""
    return {name: of_rows.sum(0).tolist() for name, of_rows in row_sums(outputs, dataset).items()}


def scores(sums: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Sums over test rows (width,), by metric -> their scores; null for what is not finite."""
    with np.errstate(all="ignore"):
        found = {name: float(METRICS[name].value(np.asarray(s, dtype=float))) for name, s in sums.items()}
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def check_range(sums: Mapping[str, np.ndarray | list], where: str) -> None:
    """Raises ValueError unless the scores of sums (..., width) lie in the ranges of their metrics."""
    for name, metric in METRICS.items():
        if name not in sums:
            continue
        found = np.asarray(sums[name], dtype=float)
        if found.shape[-1] != metric.width:
            raise ValueError(f"{where}: {name} has not {metric.width} numbers")
        with np.errstate(all="ignore"):
            values = metric.value(found)
        low, high = metric.range
        if wrong := values[(values < low) | (values > high)].tolist():
            raise ValueError(f"{where}: {metric.label} must be from {low:g} to {high:g}, not {wrong[0]:g}")
