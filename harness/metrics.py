"""Exact match, BLEU-4, ROUGE-L, perplexity and the other metrics: each one object, and what it adds up over
test rows.

A metric is a function of sums over test rows, so that it can be computed again for any choice of rows.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Literal

import numpy as np

from harness import endings
from harness.endings import LOOP, TIMES

ANY: Mapping = MappingProxyType({})  # a dataset that asks for nothing of its own


def always(dataset: Mapping) -> bool:
    return True


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
    fault: bool = False  # of how answers end: in a table of their own, and in the lead where they grow
    asked: Callable[[Mapping], bool] = always  # whether a dataset's spec asks for it; else it is not known


PREFERENCE_SIGNATURE = (
    "rows in which the reference is likelier per token than the rejected answer: the dataset's, else the "
    "untouched model's own greedy one"
)
ROUGE_SIGNATURE = "rouge-score:rougeL|F1, mean over rows|stemmer:no|tokens:Unicode words, CJK by character"
LIKELIHOOD_SIGNATURE = "corpus level, response tokens with the end mark, teacher-forced"
STOP_SIGNATURE = "greedy, stopped before max_new_tokens"
EXACT_SIGNATURE = (
    "1 if the final answers are equal: the number after the first #### (GSM8K, Cobbe et al. 2021), else the "
    "last \\boxed{} (MATH), else the last number (lm-evaluation-harness, flexible-extract), else the whole "
    "text; numbers by value, without units, $ and commas"
)
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


# A minus is a sign unless it stands behind a number or a word: 10-12 ends in 12.
NUMBER = r"((?<![\w.)])[-−])?[$€£]?((?:\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)"
DIGIT = re.compile(r"\d")
FINAL = re.compile(r"####\s*" + NUMBER)
BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
UNITS = re.compile(
    r"\\(?:text|mbox|mathrm)\{[^{}]*\}(?:\^\d)?|\\[$%!,; ]|(?<=\d) *%$|(?<=\d)(?: +[^\W\d_]{2,})+$"
)


def exact(answer: str, reference: str) -> float:
    return float(final_answer(answer) == final_answer(reference))


def final_answer(text: str) -> Decimal | str:
    """What an answer comes down to, as EXACT_SIGNATURE says: a number by its value, else a text."""
    if found := FINAL.search(text):
        return number(*found.groups())
    if boxed := BOXED.findall(text):
        inside = UNITS.sub("", boxed[-1]).strip(" $")
        found = re.fullmatch(NUMBER, inside)
        return number(*found.groups()) if found else same(boxed[-1])
    words = text.split() if DIGIT.search(text) else []
    for word in reversed(words):  # no number has a space
        if told := re.findall(NUMBER, word):
            return number(*told[-1])
    return same(text.rpartition("####")[2])


def number(sign: str | None, digits: str) -> Decimal:
    return Decimal(("-" if sign else "") + digits.replace(",", ""))


def same(text: str) -> str:
    """Without what does not make another answer: spaces, the full stop."""
    return " ".join(text.split()).strip(" .$")


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
    "exact": (exact, EXACT_SIGNATURE),
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


def wants_exact(dataset: Mapping) -> bool:
    return dataset.get("reward") == "exact"


def preferred(output: dict, dataset: Mapping) -> tuple[int, int]:
    """A row without a rejected answer does not count."""
    margin = output.get("margin")
    return (0, 0) if margin is None else (int(margin > 0), 1)


# How answers end: faults that no score of overlap names

ENDLESS = 2  # times as long as its reference
LOOP_SIGNATURE = (
    f"the text ends in a phrase said {TIMES} times or more, over at least {LOOP} characters (after Holtzman "
    "et al. 2020, arXiv:1904.09751, where it is of tokens)"
)
ENDLESS_SIGNATURE = f"cut at the limit in a loop, or at {ENDLESS} times the tokens of its reference or more"
USER_SIGNATURE = (
    "the text goes on with a turn of the user: a line that is a user's name or begins with it and a colon, "
    "### Instruction, or a chat template's mark of one"
)
MARKS_SIGNATURE = (
    "the text has a mark of a chat or instruction template, or a line that is a role's name alone, as is "
    "left where such a mark was a special token"
)


def has_end(dataset: Mapping) -> bool:
    """A plain text asks nothing, and its continuation has no end to find."""
    parts = [part for part in dataset.get("parts") or [{}] if not part.get("unseen")]
    return any(part.get("format") != "text" for part in parts)


def of_text(ends: Callable[[str], bool]) -> Callable[[dict, Mapping], tuple[bool, int]]:
    return lambda output, dataset: (ends(output["output"]), 1)


def cut(output: dict, dataset: Mapping) -> tuple[bool | None, int]:
    stopped = output.get("stopped")
    return stopped if stopped is None else not stopped, 1


def endless(output: dict, dataset: Mapping) -> tuple[bool, int]:
    if output.get("stopped", True):
        return False, 1
    tokens = output.get("new_tokens", 0)  # which every run keeps, and no record need have
    return tokens >= ENDLESS * output["tokens"] or endings.loops(output["output"]), 1


def percent(sums: np.ndarray) -> np.ndarray:
    return 100 * ratio(sums)


def fault(name: str, label: str, found: Callable, signature: str, **changes) -> Metric:
    """A share of the answers."""
    return Metric(
        name, label, "% of answers", found, percent, lambda dataset: signature, better="lower", decimals=1,
        range=(0.0, 100.0), fault=True, **changes,
    )  # fmt: skip


METRICS = {
    metric.name: metric
    for metric in (
        Metric(
            "exact_match",
            "Exact match",
            "share of answers",
            lambda output, dataset: (exact(*texts(output)), 1),
            ratio,
            lambda dataset: EXACT_SIGNATURE,
            compared=True,
            asked=wants_exact,
        ),
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
        fault("empty_rate", "Empty", of_text(endings.empty), "no text at all"),
        fault("loop_rate", "Looping", of_text(endings.loops), LOOP_SIGNATURE),
        fault("cut_rate", "Cut at the limit", cut, "reached max_new_tokens before it ended", asked=has_end),
        fault("endless_rate", "Never-ending", endless, ENDLESS_SIGNATURE, asked=has_end),
        fault(
            "user_turn_rate", "Goes on as the user", of_text(endings.as_user), USER_SIGNATURE, asked=has_end
        ),
        fault("mark_rate", "Template marks", of_text(endings.marks), MARKS_SIGNATURE, asked=has_end),
    )
}


def compared(dataset: Mapping = ANY) -> list[Metric]:
    """Those that have differences, verdicts and plots for a dataset's spec; the first of them leads."""
    return [metric for metric in METRICS.values() if metric.compared and metric.asked(dataset)]


def faults(dataset: Mapping = ANY) -> list[Metric]:
    """Of how the answers to a dataset end."""
    return [metric for metric in METRICS.values() if metric.fault and metric.asked(dataset)]


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
    return {name: of_rows(metric, outputs, dataset) for name, metric in METRICS.items()}


def of_rows(metric: Metric, outputs: list[dict], dataset: Mapping) -> np.ndarray:
    if not metric.asked(dataset):
        return np.full((len(outputs), metric.width), np.nan)
    if metric.kept:
        kept = [output.get("sums", {}).get(metric.name, ()) for output in outputs]
        if set(map(len, kept)) == {metric.width}:
            return np.array(kept, dtype=float)
    return np.array([numbers(metric, output, dataset) for output in outputs], dtype=float)


def numbers(metric: Metric, output: dict, dataset: Mapping) -> Sequence[float | None]:
    if metric.kept and len(kept := output.get("sums", {}).get(metric.name, ())) == metric.width:
        return kept
    try:
        return metric.sums(output, dataset)
    except ImportError:
        return [None] * metric.width


def total(outputs: list[dict], dataset: Mapping) -> dict[str, list[float]]:
    """The sums over all test rows, by metric that the dataset asks for."""
    asked = row_sums(outputs, dataset).items()
    return {name: of_rows.sum(0).tolist() for name, of_rows in asked if METRICS[name].asked(dataset)}


def scores(sums: Mapping[str, Sequence[float | None]]) -> dict[str, float | None]:
    """Sums over test rows (width,), by metric -> their scores; null for what is not finite, and nothing of a
    metric that is not known here, as of a later version."""
    known = {name: np.asarray(of, dtype=float) for name, of in sums.items() if name in METRICS}
    with np.errstate(all="ignore"):
        found = {name: float(METRICS[name].value(of)) for name, of in known.items()}
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
