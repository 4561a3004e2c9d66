"""BLEU-4, ROUGE-L, perplexity and token accuracy: each with its unit, direction and signature.

A test output is kept with what is needed to compute every score again for any choice of rows:
n-gram counts for BLEU, an F1 for ROUGE-L, summed negative log-likelihood and hits for the others.
"""

import re

import numpy as np

METRICS = {  # unit and direction; the signature comes with the value
    "bleu4": {"unit": "0 to 100", "better": "higher"},
    "rouge_l": {"unit": "F1, 0 to 1", "better": "higher"},
    "perplexity": {"unit": "per response token", "better": "lower"},
    "token_accuracy": {"unit": "share of response tokens", "better": "higher"},
    "stop_rate": {"unit": "share of answers that ended by themselves", "better": "higher"},
    "reward": {"unit": "mean over answers, 0 to 1", "better": "higher"},
    "preference_accuracy": {"unit": "share of test rows", "better": "higher"},
}
REWARDS = {  # what an answer earns, by the dataset's spec -> its signature
    "rouge_l": "ROUGE-L F1 with the reference",
    "exact": "1 if the final answer is the reference's: what follows the last ####, else the last "
    "\\boxed{}, else the last number, else the whole text; commas in numbers do not count",
}
PREFERENCE_SIGNATURE = (
    "rows in which the reference is likelier per token than the rejected answer: the dataset's, else the "
    "untouched model's own greedy one"
)
ROUGE_SIGNATURE = "rouge-score:rougeL|F1, mean over rows|stemmer:no|tokens:Unicode words, CJK by character"
LIKELIHOOD_SIGNATURE = "corpus level, response tokens with the end mark, teacher-forced"
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


class UnicodeTokenizer:
    """rouge-score's own tokens on ASCII text, where it drops every other letter; each CJK character
    is a token."""

    def tokenize(self, text: str) -> list[str]:
        return WORD.findall(text.lower())


class TextScorer:
    """Scores of one output against its reference. Importing rouge-score takes a second: once."""

    def __init__(self, language: str = "en", reward: str = "rouge_l"):
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU

        self.bleu = BLEU(tokenize=BLEU_TOKENIZERS.get(language, "13a"), effective_order=True)
        self.corpus = BLEU(tokenize=BLEU_TOKENIZERS.get(language, "13a"))
        self.rouge = RougeScorer(["rougeL"], tokenizer=UnicodeTokenizer())
        self.kind = reward

    def score(self, output: str, reference: str) -> dict:
        """-> bleu: [output length, reference length, matches of 1..4, n-grams of 1..4], rouge_l, reward."""
        if not isinstance(output, str) or not isinstance(reference, str):
            raise TypeError("an output and its reference are texts")
        bleu = self.bleu.sentence_score(output, [reference])
        return {
            "bleu": [bleu.sys_len, bleu.ref_len, *bleu.counts, *bleu.totals],
            "rouge_l": self.rouge.score(reference, output)["rougeL"].fmeasure,
            "reward": self.reward(output, reference),
        }

    def reward(self, output: str, reference: str) -> float:
        """0 to 1, by the rule that the dataset declares."""
        if self.kind == "exact":
            return float(final_answer(output) == final_answer(reference))
        return self.rouge.score(reference, output)["rougeL"].fmeasure

    def signature(self) -> str:
        self.corpus.corpus_score(["a"], [["a"]])  # it knows its number of references only after one
        return self.corpus.get_signature().format()


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
    """Corpus BLEU-4, 0 to 100, from counts (..., 10) as TextScorer gives them, summed over rows.

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


def summarise(outputs: list[dict], bleu_signature: str, reward: str = "rouge_l") -> dict:
    """Scores of a whole test set from its outputs, each with unit, direction and signature."""
    if not outputs:
        raise ValueError("no test outputs to score")
    column = {name: np.array([o[name] for o in outputs], dtype=float) for name in
              ("tokens", "nll", "correct", "rouge_l", "stopped", "reward")}  # fmt: skip
    tokens = column["tokens"].sum()
    with np.errstate(all="ignore"):  # what is not finite stays so, and is null in a record
        perplexity, accuracy = np.exp(column["nll"].sum() / tokens), column["correct"].sum() / tokens
    values = {
        "bleu4": (bleu4(np.array([o["bleu"] for o in outputs]).sum(0)), bleu_signature),
        "rouge_l": (column["rouge_l"].mean(), ROUGE_SIGNATURE),
        "perplexity": (perplexity, LIKELIHOOD_SIGNATURE),
        "token_accuracy": (accuracy, LIKELIHOOD_SIGNATURE),
        "stop_rate": (column["stopped"].mean(), "greedy, stopped before max_new_tokens"),
        "reward": (column["reward"].mean(), REWARDS[reward]),
    }
    if margins := [o["margin"] for o in outputs if o.get("margin") is not None]:
        values["preference_accuracy"] = (np.mean(np.array(margins) > 0), PREFERENCE_SIGNATURE)
    return {
        name: {"value": float(value), "signature": signature, **METRICS[name]}
        for name, (value, signature) in values.items()
    }
