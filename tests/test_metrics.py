"""BLEU and ROUGE-L against their packages, perplexity against the model's own loss, answers against a loop
by hand."""

import math
import random
import re
import sys

import numpy as np
import pytest
import sacrebleu
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from harness import metrics
from harness.metrics import METRICS, bleu4
from harness.training.decoder import Decoder
from harness.training.evaluation import mean_loss

ROUGE = RougeScorer(["rougeL"])
REAL = [
    ("The cat sat on the mat.", "The cat is sitting on the mat."),
    ("It's 3.5% of $1,000 - isn't it?", "It is 3.5 % of $1,000, isn't it?"),
    ("Paris is the capital of France, and Berlin that of Germany.", "The capital of France is Paris."),
    ("def f(x):\n    return x + 1\n", "def f(x):\n    return x + 2\n"),
    ("I do not know.", "She sells sea shells by the sea shore, every day of the week."),
    ("&quot;Yes&quot;, she said <skipped> twice.", '"Yes", she said twice.'),
    ("Émile Zola wrote “Germinal”…", "Émile Zola wrote Germinal."),
]


def kept(output, reference, **dataset) -> dict:
    return metrics.kept_sums({"output": output, "reference": reference}, dataset)


def rouge_l(output: str, reference: str) -> float:
    total, rows = kept(output, reference)["rouge_l"]
    assert rows == 1
    return total


# BLEU


def corpus_bleu(pairs, language="en") -> float:
    """From counts alone, kept a row at a time and summed."""
    return float(bleu4(np.sum([kept(*pair, language=language)["bleu4"] for pair in pairs], axis=0)))


def sacre(pairs, **options) -> float:
    outputs, references = zip(*pairs, strict=True)
    return sacrebleu.corpus_bleu(list(outputs), [list(references)], **options).score


@pytest.mark.parametrize(
    "pairs",
    [
        REAL,
        [(reference, reference) for _, reference in REAL],
        [(output, "zzz yyy xxx www vvv") for output, _ in REAL],  # no match at all
        [("", reference) for _, reference in REAL],
        [("", ""), *REAL],
        [("a b c d", "")],
        [("cat", "cat")],  # no 4-gram: 0 by sacrebleu's corpus score
        [("cat", "cat"), ("dog", "a dog")],
        [("cat", "the cat sat"), *REAL],
        [("a b c d e", "a x b y c z d w e")],  # words match, no 2-gram: smoothed
        [("a b q c d q e f", "a b x c d y e f")],  # 2-grams match, no 3-gram
        [("the the the the the the", "the cat")],  # clipped counts
        [("the cat sat", "the cat sat on the mat today")],  # brevity
        [("the cat sat on the mat today and slept", "the cat sat on the mat")],
    ],
)
def test_corpus_bleu_from_summed_counts_is_sacrebleus(pairs):
    assert corpus_bleu(pairs) == pytest.approx(sacre(pairs), abs=1e-9)


def test_corpus_bleu_of_random_texts_is_sacrebleus():
    draw = random.Random(0)

    words = ["a", "b", "c", "d", ".", ",", "x1", "The"]

    def text():
        return " ".join(draw.choice(words) for _ in range(draw.randint(0, 12)))

    scores = []
    for _ in range(200):
        pairs = [(text(), text()) for _ in range(draw.randint(1, 5))]
        scores.append(sacre(pairs))
        assert corpus_bleu(pairs) == pytest.approx(scores[-1], abs=1e-9), pairs
    assert len({round(score, 6) for score in scores}) > 100  # not all 0


@given(st.lists(st.tuples(st.text(max_size=40), st.text(max_size=40)), min_size=1, max_size=4))
def test_corpus_bleu_of_any_texts_is_sacrebleus(pairs):
    assert corpus_bleu(pairs) == pytest.approx(sacre(pairs), abs=1e-9)


def test_bleu_of_chinese_is_sacrebleus_with_its_chinese_tokens():
    pairs = [("我喜欢吃苹果和香蕉", "我喜欢吃苹果"), ("今天天气很好", "今天的天气很好")]
    assert corpus_bleu(pairs, "zh") == pytest.approx(sacre(pairs, tokenize="zh"), abs=1e-9)
    assert corpus_bleu(pairs, "zh") > 20


def test_the_signature_is_sacrebleus():
    for language, tokens in {"en": "13a", "zh": "zh", "ja": "char"}.items():
        bleu = sacrebleu.BLEU(tokenize=tokens)
        bleu.corpus_score(["a"], [["a"]])
        assert METRICS["bleu4"].signature({"language": language}) == str(bleu.get_signature())


def test_bleu_of_many_samples_at_once_is_bleu_of_each():
    """What a bootstrap computes: counts (samples, 10)."""
    counts = np.array([kept(*pair)["bleu4"] for pair in [*REAL, ("", "a"), ("a", "b")]])
    rows = np.random.default_rng(0).integers(0, len(counts), (50, 4))
    found = bleu4(counts[rows].sum(1))
    assert found.shape == (50,)
    assert found == pytest.approx([float(bleu4(counts[chosen].sum(0))) for chosen in rows])


# ROUGE-L


@given(
    st.text(st.characters(max_codepoint=127), max_size=60),
    st.text(st.characters(max_codepoint=127), max_size=60),
)
def test_rouge_of_any_ascii_texts_is_the_packages(output, reference):
    assert rouge_l(output, reference) == ROUGE.score(reference, output)["rougeL"].fmeasure


@given(st.lists(st.tuples(*2 * [st.text("abc D1_.,'-", max_size=30)]), min_size=1))
def test_rouge_of_ascii_texts_with_common_words_is_the_packages(pairs):
    for output, reference in pairs:
        found = rouge_l(output, reference)
        assert found == ROUGE.score(reference, output)["rougeL"].fmeasure


@pytest.mark.parametrize("vocabulary", [2, 30, 300])
def test_rouge_of_long_texts_is_the_packages(vocabulary):
    """Longer than a machine word has bits, a token of one text more often than in the other."""
    draw = random.Random(vocabulary)
    for _ in range(20):
        output, reference = (
            " ".join(f"w{draw.randrange(vocabulary)}" for _ in range(draw.randint(1, 150))) for _ in range(2)
        )
        assert rouge_l(output, reference) == ROUGE.score(reference, output)["rougeL"].fmeasure


def test_rouge_of_real_texts_is_the_packages():
    for output, reference in REAL:
        if (output + reference).isascii():
            found = rouge_l(output, reference)
            assert found == ROUGE.score(reference, output)["rougeL"].fmeasure


@pytest.mark.parametrize(
    ("same", "near", "far"),
    [
        ("Кошка сидит на коврике.", "Кошка лежит на коврике.", "Собака бежит домой"),
        ("我喜欢吃苹果", "我喜欢吃香蕉", "今天天气不错"),
        ("私は林檎が好きです", "私は蜜柑が好きです", "空高く飛ぶ鳥"),
        ("나는 사과를 좋아한다", "나는 바나나를 좋아한다", "하늘 높이"),
        ("Ünlü şair geldi", "Ünlü yazar geldi", "kapı kapandı"),
        ("मुझे सेब पसंद है", "मुझे केला पसंद है", "आज धूप"),
    ],
)
def test_rouge_knows_other_scripts(same, near, far):
    assert rouge_l(same, same) == 1.0
    assert 0 < rouge_l(near, same) < 1
    assert rouge_l(far, same) == 0.0


def test_rouge_counts_whole_words_and_single_chinese_characters():
    """F1 by hand: 2 of 3 words in order; 4 of 6 characters."""
    assert rouge_l("кот ел суп", "кот пил суп") == pytest.approx(2 / 3)
    assert rouge_l("我喜欢吃香蕉", "我喜欢吃苹果") == pytest.approx(4 / 6)


def test_rouge_of_nothing_is_nothing():
    for output, reference in (("", "a"), ("a", ""), ("", ""), ("...", "a"), ("🙂", "🙂")):
        assert rouge_l(output, reference) == 0.0


@pytest.mark.fault(25)
@pytest.mark.parametrize("wrong", [None, 3, ["a"], b"a", math.nan])
def test_what_is_no_text_is_refused(wrong):
    with pytest.raises(TypeError):
        kept(wrong, "a")
    with pytest.raises(TypeError):
        kept("a", wrong)


# Summaries


def output(**changes) -> dict:
    texts = dict(zip(("output", "reference"), REAL[0], strict=True))
    return {"tokens": 4, "nll": 2.0, "correct": 1, "stopped": True, **texts, **changes}


def scored(outputs: list[dict], **dataset) -> dict:
    return metrics.scores(metrics.total(outputs, dataset))


def test_sums_of_a_metric_that_came_later_are_no_score():
    """As in the start of a record that a later version wrote."""
    assert metrics.scores({"rouge_l": [3.0, 4.0], "later": [[]]}) == {"rouge_l": pytest.approx(0.75)}


def test_a_summary_weighs_tokens_over_the_corpus_and_texts_over_rows():
    outputs = [output(), output(tokens=12, nll=30.0, correct=11, stopped=False, sums={"rouge_l": [0.0, 1]})]
    found = scored(outputs)
    assert found["perplexity"] == pytest.approx(math.exp(32 / 16))
    assert found["token_accuracy"] == pytest.approx(12 / 16)
    assert found["stop_rate"] == 0.5
    assert found["rouge_l"] == pytest.approx(rouge_l(*REAL[0]) / 2)
    assert found["bleu4"] == pytest.approx(sacre([REAL[0]] * 2))
    assert found.keys() == METRICS.keys() - {"exact_match"} and found["preference_accuracy"] is None


def test_preferences_are_counted_over_the_rows_that_have_a_rejected_answer():
    outputs = [output(margin=0.1), output(margin=-2.0), output(margin=3.0), output(margin=0.0), output()]
    assert scored(outputs)["preference_accuracy"] == 2 / 4


@pytest.mark.parametrize(
    ("output", "reference", "earned"),
    [
        ("So 4 + 4 = 8.\n#### 8", "He has 8.\n#### 8", 1),  # GSM8K's own form
        ("She pays $1,234.00 in all.", "#### 1234", 1),
        ("The answer is -3", "#### 3", 0),
        ("The answer is −3.", "#### -3", 1),
        ("It is 8, not 9", "#### 8", 0),  # the last number counts
        ("#### 8\n\nQuestion: and 9?\n#### 9", "#### 8", 1),  # the first that is marked does
        ("#### 8 eggs", "#### 8", 1),
        ("#### $8.50", "#### 8.5", 1),
        ("#### Step 1: add.\nSo it is 12.", "#### 12", 1),  # a heading is no answer
        ("She has 70,000 left.", "#### 70000", 1),
        ("The numbers are 1,2,3", "#### 3", 1),
        ("5,6789 and 1,23,456", "#### 123456", 1),
        ("It takes 10-12", "#### 12", 1),  # no sign
        ("A loss of -$5", "#### -5", 1),
        ("He eats .5 of it", "#### 0.50", 1),
        ("50%", "#### 50", 1),
        ("50%", "#### 0.5", 0),
        ("That is 18.", "#### 18", 1),
        ("Eighteen", "#### 18", 0),
        ("Thus \\boxed{\\frac{1}{2}}", "so \\boxed{\\frac{1}{2}}.", 1),
        ("\\boxed{18\\text{ dollars}}, as 2 + 16 is.", "#### 18", 1),
        ("\\boxed{\\$1,800}", "#### 1800", 1),
        ("\\boxed{18 dollars}", "\\boxed{18}", 1),
        ("\\boxed{18x}", "\\boxed{18}", 0),
        ("Paris.", " Paris", 1),
        ("", "#### 8", 0),
        ("", "", 1),
    ],
)
def test_the_final_answer_is_judged(output, reference, earned):
    """As a reward and as a metric."""
    assert kept(output, reference, reward="exact")["reward"] == [earned, 1]
    row = {"output": output, "reference": reference, "stopped": True}
    assert metrics.row_sums([row], {"reward": "exact"})["exact_match"].tolist() == [[earned, 1]]


OPENAI = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade-school-math, dataset.py
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # lm-evaluation-harness, gsm8k.yaml
GSM8K = [  # of the test set's answers: what they come down to, by the paper's own rule
    ("Janet sells 16 - 3 - 4 = <<16-3-4=9>>9 duck eggs a day.\nShe makes 9 * 2 = $<<9*2=18>>18 every day at "
     "the farmer’s market.\n#### 18", "18"),
    ("The cost of the house and repairs came out to 80,000+50,000=$<<80000+50000=130000>>130,000\nHe "
     "increased the value of the house by 80,000*1.5=<<80000*1.5=120000>>120,000\n#### 70000", "70000"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "final"), GSM8K)
def test_gsm8ks_own_answers_come_down_to_what_its_authors_say(answer, final):
    assert OPENAI.search(answer)[1] == final
    assert metrics.final_answer(answer) == int(final)


@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "{:,}", "{}.00", "{:,}."]),
    st.text("ab \n", max_size=9),
)
def test_the_final_number_is_what_published_evaluations_extract(number, form, after):
    written = form.format(number)
    marked, told = f"3 + 4 = 7\n#### {written}\n{after}", f"First 7. In all it is {written} {after}"
    strict = OPENAI.search(marked)[1].replace(",", "").rstrip(".")
    flexible = "".join(FLEXIBLE.findall(told)[-1]).replace(",", "").replace("$", "").rstrip(".")
    assert float(strict) == float(flexible) == number
    assert metrics.final_answer(marked) == metrics.final_answer(told) == number


@given(st.text(max_size=60), st.text(max_size=60))
def test_any_texts_have_a_final_answer(output, reference):
    assert metrics.exact(output, output) == 1.0
    assert metrics.exact(output, reference) == metrics.exact(reference, output)


def test_every_metric_is_a_function_of_as_many_sums_as_it_says():
    """Over any leading axes, as a bootstrap asks; its signature is a text."""
    of_rows = metrics.row_sums([output(margin=1.0), output(margin=-1.0)], {})
    for name, metric in METRICS.items():
        assert metric.name == name and metric.signature({}) and metric.unit
        assert of_rows[name].shape == (2, metric.width)
        drawn = np.random.default_rng(0).random((3, 4, 2)) @ of_rows[name]
        assert metric.value(drawn).shape == (3, 4)


def test_numbers_that_a_run_kept_need_no_package(monkeypatch):
    row = {**output(), "sums": kept(*REAL[0])}
    whole = scored([row])
    metrics.bleu.cache_clear()
    for package in ("sacrebleu", "sacrebleu.metrics"):
        monkeypatch.setitem(sys.modules, package, None)
    assert scored([row]) == whole
    assert scored([output()]) == {**whole, "bleu4": None}


def test_a_score_that_cannot_be_is_refused():
    row = output(sums={"rouge_l": [2.0, 1]})
    with pytest.raises(ValueError, match="here: ROUGE-L must be from 0 to 1, not 2"):
        metrics.check_range(metrics.row_sums([output(), row], {}), "here")
    with pytest.raises(ValueError, match="bleu4 has not 10 numbers"):
        metrics.check_range({"bleu4": [1, 1]}, "here")


def test_no_outputs_are_refused():
    with pytest.raises(ValueError, match="no test outputs"):
        scored([])


# Likelihoods of rows


def untied():
    """With a head of its own: a random model with a tied one only says its last token again."""
    return tiny.model(tiny.gemma(tie_word_embeddings=False), seed=3)


@pytest.fixture(scope="module")
def model():
    return untied()


ROWS = tiny.rows(17, seed=5, prompt=(2, 40))  # some longer than the sliding window of 16


def likelihoods(model, rows, size):
    return tiny.likelihoods(model, rows, tiny.hyperparams(eval_batch_size=size))


def own_loss(model, row) -> tuple[float, int]:
    """Of HF's model on one row alone, with no padding."""
    p, r = list(row.prompt_ids), list(row.response_ids)
    with torch.no_grad():
        loss = model(input_ids=torch.tensor([p + r]), labels=torch.tensor([[-100] * len(p) + r])).loss
    return loss.item(), len(r)


def perplexity(scores) -> float:
    return scored([output(**score) for score in scores])["perplexity"]


def test_the_perplexity_of_one_row_is_the_exponential_of_the_models_loss(model):
    for row in ROWS[:5]:
        loss, _ = own_loss(model, row)
        assert perplexity(likelihoods(model, [row], 1)) == pytest.approx(math.exp(loss), rel=1e-5)


def test_the_perplexity_of_a_corpus_weighs_every_token_alike(model):
    losses = [own_loss(model, row) for row in ROWS]
    expected = math.exp(sum(loss * count for loss, count in losses) / sum(count for _, count in losses))
    scores = likelihoods(model, ROWS, 7)
    assert perplexity(scores) == pytest.approx(expected, rel=1e-5)
    assert mean_loss(scores) == pytest.approx(math.log(expected), rel=1e-5)
    unweighted = math.exp(sum(loss for loss, _ in losses) / len(losses))
    assert abs(unweighted - expected) > 1e-3  # these rows can tell the two apart


def test_neither_batch_size_nor_padding_nor_order_changes_a_likelihood(model):
    alone = likelihoods(model, ROWS, 1)
    for rows, size in ((ROWS, 7), (ROWS, 100), (ROWS[::-1], 7)):
        found = likelihoods(model, rows, size)
        for row, score in zip(rows, found, strict=True):
            expected = alone[ROWS.index(row)]
            assert score["tokens"] == expected["tokens"] == len(row.response_ids)
            assert score["correct"] == expected["correct"]
            assert score["nll"] == pytest.approx(expected["nll"], rel=1e-5)


def test_correct_counts_the_models_own_most_likely_tokens(model):
    """On rows whose responses the model wrote itself, teacher-forced, all but the changed one are right."""
    row = ROWS[0]
    written = by_hand(model, row, 8, stops=[])
    row = tiny.Example("own", "tiny", "", "", row.prompt_ids, tiny.array(written))
    assert likelihoods(model, [row], 1)[0]["correct"] == 8
    last = tiny.array([*written[:-1], (written[-1] + 1) % tiny.VOCABULARY])
    row = tiny.Example("changed", "tiny", "", "", row.prompt_ids, last)
    assert likelihoods(model, [row], 1)[0]["correct"] == 7


# Answers


def by_hand(model, row, count: int, stops: list[int]) -> list[int]:
    """Greedy decoding with no cache, no padding, no batch."""
    ids = list(row.prompt_ids)
    with torch.no_grad():
        while len(ids) < len(row.prompt_ids) + count:
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
            if ids[-1] in stops:
                break
    return ids[len(row.prompt_ids) :]


def answers(model, rows, stops, size, count=12):
    hp = tiny.hyperparams(eval_batch_size=size, max_new_tokens=count)
    return Decoder(tiny.tokenizer(), stops, hp, tiny.accelerator()).answers(model, rows)


@pytest.fixture(scope="module")
def stops(model):
    """Tokens that this model does write, so that some answers end by themselves and others do not."""
    written = [by_hand(model, row, 12, []) for row in ROWS]
    later = sorted({token for answer in written for token in answer[2:8]})
    chosen = later[:: max(1, len(later) // 6)]
    ended = [any(token in chosen for token in answer) for answer in written]
    assert any(ended) and not all(ended)
    return chosen


@pytest.mark.parametrize("size", [1, 4, 100])
def test_answers_are_those_of_a_greedy_loop_by_hand(model, stops, size):
    found = answers(model, ROWS, stops, size)
    assert len(found) == len(ROWS)
    for row, answer in zip(ROWS, found, strict=True):
        ids = by_hand(model, row, 12, stops)
        assert answer["new_tokens"] == len(ids)
        assert answer["stopped"] == (ids[-1] in stops)
        words = ids[:-1] if answer["stopped"] else ids
        assert answer["output"] == tiny.tokenizer().decode(words, skip_special_tokens=True).strip()
    assert len({answer["output"] for answer in found}) > 10  # the model reads its prompts


def test_answers_begin_from_exactly_the_prompts_ids(model):
    read, made = [], tiny.decoder(tiny.hyperparams(eval_batch_size=1, max_new_tokens=1))
    made.answers(model, ROWS[:3])  # the first time, the model is tried
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda m, args: read.append(args[0].clone())
    )
    made.answers(model, ROWS[:3])
    hook.remove()
    found = sorted(ids[0].tolist() for ids in read)
    assert found == sorted(list(row.prompt_ids) for row in ROWS[:3])


def test_the_models_own_generation_settings_do_not_reach_the_answers(stops):
    """A shipped generation_config that samples, or punishes repetition, must not decide what is compared."""
    plain, changed = untied(), untied()
    config = changed.generation_config
    config.do_sample, config.temperature, config.top_k = True, 5.0, 50
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 2
    config.min_new_tokens, config.forced_eos_token_id = 6, 7
    assert answers(changed, ROWS, stops, 4) == answers(plain, ROWS, stops, 4)


def test_training_mode_does_not_reach_the_answers(model, stops):
    expected = answers(model, ROWS[:4], stops, 4)
    assert answers(model.train(), ROWS[:4], stops, 4) == expected
    assert not model.training


def test_progress_is_told_of_each_batch(model):
    told = []
    hp = tiny.hyperparams(eval_batch_size=7, max_new_tokens=2)
    tiny.decoder(hp).answers(model, ROWS, lambda **values: told.append(values))
    assert told == [{"answered": n, "rows": 17} for n in (7, 14, 17)]
