"""A metric that is added as CONTRIBUTING says: chrF, from the texts of runs that are older than it."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
from sacrebleu import corpus_chrf

from harness import metrics
from harness.metrics import METRICS, Metric
from harness.report import render
from harness.report.comparison import comparisons
from harness.report.tables import brief
from harness.store import Store

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "demo"
ORDERS = range(1, 7)


def counts(output: dict, dataset: dict) -> list[int]:
    """Of each order of character n-grams: those of the answer, of the reference, of both."""
    texts = ["".join(output[name].split()) for name in ("output", "reference")]
    found = []
    for n in ORDERS:
        answer, reference = (Counter(text[i : i + n] for i in range(len(text) - n + 1)) for text in texts)
        found += [answer.total(), reference.total(), (answer & reference).total()]
    return found


def chrf(sums: np.ndarray) -> np.ndarray:
    """F2 of the mean precision and recall of the orders that both have."""
    answer, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], len(ORDERS), 3), -1, 0)
    known = (answer > 0) & (reference > 0)
    precision, recall = (
        np.where(known, both / np.where(known, all_, 1), 0).sum(-1) / known.sum(-1)
        for all_ in (answer, reference)
    )
    return 100 * 5 * precision * recall / (4 * precision + recall)


CHRF = Metric("chrf", "chrF", "0 to 100", counts, chrf, lambda dataset: "chrF2 by hand", decimals=2,
              range=(0.0, 100.0), width=18, compared=True)  # fmt: skip


@pytest.fixture
def added(monkeypatch):
    monkeypatch.setitem(METRICS, "chrf", CHRF)


def test_it_stands_in_table_differences_and_plots_of_runs_that_are_older(added, tmp_path):
    store = Store(REFERENCE)
    records, corrupt = store.load()
    assert not corrupt and "sums" in store.outputs(records[0])[0], "real runs, which kept other metrics"
    assert not any("chrf" in output["sums"] for record in records for output in store.outputs(record))
    expected = {}  # method -> sacrebleu's own score of each seed
    for record in records:
        texts = [(output["output"], [output["reference"]]) for output in store.outputs(record)]
        answers, references = zip(*texts, strict=True)
        score = corpus_chrf(list(answers), [list(column) for column in zip(*references, strict=True)]).score
        assert record.scores["chrf"] == pytest.approx(score)
        expected.setdefault(record.spec.method, []).append(score)
    [comparison] = comparisons(records)
    table = brief(comparison, comparison.trained)
    [galore] = (dict(zip(table.columns, row, strict=True)) for row in table.rows if row[0] == "GaLore")
    assert galore["chrF (after)"].startswith(f"{fmean(expected['galore']):.2f} ± ")
    assert galore["chrF (before)"] == f"{expected['base'][0]:.2f}"
    render(store, tmp_path)
    report = (tmp_path / "report.md").read_text("utf-8")
    differences = report.split("## Differences")[1].split("\n## ")[0]
    (line,) = [line for line in differences.splitlines() if line.startswith("| GaLore − Base |")]
    gain = fmean(expected["galore"]) - expected["base"][0]
    assert "chrF | Verdict" in differences and f" {gain:+.2f} (" in line.replace("−", "-")
    assert "chrF: chrF2 by hand" in report and "chrF, alpaca" in report
    assert (tmp_path / "plots" / "scores.svg").read_text("utf-8").count("<!-- chrF -->") == 1


def test_one_that_is_not_compared_stands_in_more_on_quality_alone(monkeypatch, tmp_path):
    monkeypatch.setitem(METRICS, "chrf", replace(CHRF, compared=False))
    render(Store(REFERENCE), tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    assert [part.partition("\n")[0] for part in text.split("\n## ") if "chrF (after)" in part] == [
        "More on quality"
    ]


def test_a_run_keeps_its_numbers_if_it_says_so(monkeypatch):
    monkeypatch.setitem(METRICS, "chrf", replace(CHRF, kept=True, sums=lambda output, dataset: range(18)))
    output = {"output": "a cat", "reference": "the cat"}
    assert metrics.kept_sums(output, {})["chrf"] == list(range(18))
    output["sums"] = {"chrf": [7] * 18}
    assert metrics.row_sums([output], {})["chrf"].tolist() == [[7] * 18]
