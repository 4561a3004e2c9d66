"""Both tracks in a report: what a search has found is derived from its trials, and shown beside the rest."""

import json
import re
import shutil
from dataclasses import replace
from math import log10

import fabricate
import pytest

from harness.method import card, known_methods, resolve
from harness.plan import Request, plan
from harness.record import SEAL, Sizes
from harness.report import render
from harness.report.comparison import comparisons, read_outputs
from harness.report.verdicts import Verdicts
from harness.store import RECORD, Store

BEST = {"full": 2e-4, "lora": 6e-3, "galore": 2e-3, "orpo": 2e-2}  # the shared rate of the demo is 2e-3
NOW = "2026-11-21 12:00 UTC"


def skill(spec) -> float:
    return 0.75 - 0.08 * log10(spec.own_hp.learning_rate / BEST[spec.method]) ** 2


def run(store: Store, spec, number: int):
    """One finished run, whose words are as right as its rate is good. A rate of 0.1 and more breaks."""
    found = fabricate.record(spec.method, 0 if spec.trial else spec.seed)
    found.spec, found.sizes = spec, Sizes(saved_bytes=0)
    found.card = card(resolve(spec.method, known_methods()[spec.method]))
    found.started = f"2026-11-20T10:{number // 60:02}:{number % 60:02}+00:00"
    found.overrides = {name: [value, spec.reason] for name, value in spec.changes.items()}
    if spec.own_hp.learning_rate >= 0.1:
        found.status, found.error = "diverged", "the loss was nan at step 3 of 60"
    if found.judged_by_loss:
        found.validation = [{"step": 60, "loss": 2.2 - skill(spec)}] if found.ok else []
    if found.judged_by_loss or not found.ok:
        (store.folder / spec.folder).mkdir(parents=True)
        (store.folder / spec.folder / RECORD).write_text(found.to_json())
        return found
    title, axis, right, *rest = fabricate.METHODS.get(
        spec.method, (spec.method, "none", 0.5, 6, 3000, "base")
    )
    with pytest.MonkeyPatch.context() as patch:
        right = skill(spec) if spec.trains else right
        patch.setitem(fabricate.METHODS, spec.method, (title, axis, right, *rest))
        answers = fabricate.outputs(spec.method, spec.seed, rows=40)
    for i, answer in enumerate(answers):
        answer["margin"] = right - i / 40
    fabricate.keep(store.folder, found, answers)
    return replace(store.find(spec), spec=spec)


def bench(folder, *methods, trials=8, seeds=(0, 1, 2), most=10**6, **more) -> Store:
    """A store as such a bench leaves it after at most so many runs."""
    settings = ["data.train=8", "data.validation=4", "data.test=4", *more.pop("settings", [])]
    asked = Request(list(methods), seeds=list(seeds), settings=settings, trials=trials, **more)
    runs, store, done = plan(asked), Store(folder / "results"), {}
    while stage := runs.upcoming(done)[: most - len(done)]:
        for spec in stage:
            done[spec.digest] = store.find(spec) or run(store, spec, len(done))
    return store


BOTH = {"tracks": ["identical", "tuned"]}
pytestmark = pytest.mark.usefixtures("undrawn")  # but for the report that most of them read


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """-> the store of both tracks, and its report in Markdown."""
    folder = tmp_path_factory.mktemp("both")
    store = bench(folder, "full", "lora", "galore", "orpo", **BOTH)
    return store, rendered(store, folder)


def rendered(store: Store, folder) -> str:
    render(store, folder / "reports", ("md",), now=NOW)
    return (folder / "reports" / "report.md").read_text().replace("\\", "")


def table(text: str, first: str) -> dict[str, dict[str, str]]:
    """The Markdown table whose first column has this title: row -> column -> cell."""
    lines = text[text.index(f"\n| {first} |") + 1 :].split("\n\n")[0].splitlines()
    columns, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0]: dict(zip(columns, row, strict=True)) for row in rows}


def test_trials_stand_in_no_row_and_change_no_check(report):
    store, text = report
    records, _ = store.load()
    (comparison,) = comparisons(records)
    assert not any(record.spec.trial for record in comparison.records)
    labels = [technique.label for technique in comparison.techniques]
    assert labels[0] == "Base" and len(set(labels)) == len(labels)
    assert set(labels[1:]) == {
        "Full",
        "Full (tuned)",
        "LoRA",
        "LoRA (tuned)",
        "GaLore",
        "ORPO",
        "ORPO (tuned)",
    }
    alone = bench(store.folder.parent / "alone", "full", "lora", "galore", "orpo")
    checks = [line for line in text.splitlines() if "| NO |" in line]
    assert checks == [line for line in rendered(alone, alone.folder.parent).splitlines() if "| NO |" in line]


def test_what_was_chosen_is_the_best_of_the_trials_that_were_kept(report):
    store, text = report
    searches = table(text, "The searches")
    for method, label in (("full", "Full"), ("lora", "LoRA"), ("galore", "GaLore")):
        kept = [json.loads(f.read_text()) for f in store.folder.glob(f"{method}-s1000000-*/{RECORD}")]
        losses = {r["spec"].get("changes", {}).get("learning_rate", 2e-3): r["validation"][-1]["loss"]
                  for r in kept if r["status"] == "ok"}  # fmt: skip
        best = min(losses, key=losses.get)
        assert searches[label]["Learning rate"].startswith(f"{best:g}")
        assert searches[label]["Judged by"] == f"validation loss {losses[best]:.3f}"
        assert searches[label]["Trials"].split(",")[0] == str(len(kept)) == "8"
    assert searches["GaLore"]["Learning rate"] == "0.002, the shared one"
    assert searches["ORPO"]["Judged by"].startswith("preference accuracy")


def test_both_tracks_stand_side_by_side_as_the_verdicts_have_them(report):
    store, text = report
    (comparison,) = comparisons(store.load()[0])
    means = {t.label: t.mean(lambda r: r.scores["bleu4"]) for t in comparison.trained}
    rows = table(text, "BLEU-4")
    assert rows["GaLore"]["Tuned − identical"] == "the same runs"
    for name in ("Full", "LoRA", "ORPO"):
        identical, tuned = means[name], means[f"{name} (tuned)"]
        assert rows[name]["Identical"] == f"{identical:.2f}" and rows[name]["Tuned"] == f"{tuned:.2f}"
        value, low, high = map(
            float, re.findall(r"[+-][\d.]+", rows[name]["Tuned − identical"].replace("−", "-"))
        )
        assert value == pytest.approx(tuned - identical, abs=0.011)
        assert rows[name]["Verdict"] == ("tied" if low <= 0 <= high else "higher" if low > 0 else "lower")
    assert rows["ORPO"]["Rank (tuned)"] == "–", "ranked with none of another objective"
    assert all("of 3" in rows[name]["Rank (tuned)"] for name in ("Full", "LoRA", "GaLore"))


def test_each_track_is_ranked_by_itself(report):
    """What was asked for stands in both where it is a method's own best, and another objective by itself."""
    (comparison,) = comparisons(report[0].load()[0])
    groups = {name: {t.label for t in of} for name, of in comparison.groups.items()}
    assert groups == {
        " of the sft techniques with the shared hyperparameters": {"Full", "LoRA", "GaLore"},
        " of the sft techniques with each at its own best": {"Full (tuned)", "LoRA (tuned)", "GaLore"},
        " of the preference techniques with the shared hyperparameters": {"ORPO"},
        " of the preference techniques with each at its own best": {"ORPO (tuned)"},
    }
    read_outputs(comparison, report[0])
    (standing, *_) = Verdicts(comparison).metrics
    assert ("Full (tuned)", "Full") in standing.pairs and ("LoRA (tuned)", "Full") not in standing.pairs
    assert standing.verdict("Full", "LoRA (tuned)").word == ""


def test_the_verdicts_that_turn_over_are_named_and_no_others(report):
    store, text = report
    (comparison,) = comparisons(store.load()[0])
    read_outputs(comparison, store)
    standing = Verdicts(comparison).standings["bleu4"]
    for one, other in (("Full", "LoRA"), ("Full", "GaLore"), ("LoRA", "GaLore")):
        tuned = [name if name == "GaLore" else f"{name} (tuned)" for name in (one, other)]
        words = [standing.verdict(one, other).word, standing.verdict(*tuned).word]
        told = f"BLEU-4, {one} against {other}: {words[0]} with the shared hyperparameters, {words[1]} with"
        assert (told in text) == (words[0] != words[1])
        assert (f"BLEU-4, {one} against {other}:" in text) == (words[0] != words[1])
    assert "turn over" in text


def test_tuning_costs_nothing_in_a_techniques_own_time(report):
    store, text = report
    records = store.load()[0]
    (comparison,) = comparisons(records)
    trials = [r for r in records if r.spec.trial and r.spec.method == "lora"]
    hours = sum(r.phases[name].seconds for r in trials for name in ("attach", "train")) / 3600
    assert float(table(text, "The searches")["LoRA"]["Tuning cost (h)"]) == pytest.approx(hours, abs=0.005)
    assert all(t.mean(lambda r: r.train_seconds) < 3600 * hours / 2 for t in comparison.trained)


def test_a_disturbed_search_has_no_energy_and_a_mark(report, tmp_path):
    shutil.copytree(report[0].folder, tmp_path / "results")
    store = Store(tmp_path / "results")
    trial = next(r for r in store.load()[0] if r.spec.trial and r.spec.method == "lora")
    assert "†" not in report[1]
    trial.disturbed = ["other programs held the card"]
    (store.folder / trial.folder / RECORD).write_text(trial.to_json())
    searches = table(rendered(store, tmp_path), "The searches")
    assert [name for name, row in searches.items() if row["Tuning cost (h)"].endswith("†")] == ["LoRA"]
    known = {name: row.get("Energy (Wh)") for name, row in searches.items()}
    assert known["LoRA"] in (None, "–") and known["Full"] not in (None, "–")


def test_the_chosen_rate_is_footnoted_as_a_difference(report):
    assert re.search(
        r"LoRA \(tuned\): learning rate 0.00632 instead of 0.002: the best of 8 trials", report[1]
    )


def test_a_best_at_the_edge_and_an_unequal_budget_are_told(tmp_path):
    store = bench(tmp_path, "full", "lora", trials=2, seeds=[0], **BOTH)
    text = rendered(store, tmp_path)
    assert "Best at the edge of what was tried" in text.split("## What was found")[1].split("## ")[0]
    assert "best at the edge" in text and table(text, "The searches")["LoRA"]["Learning rate"].endswith("*")
    bench(tmp_path, "full", trials=5, seeds=[0], **BOTH)
    assert "Not the same number of trials: Full 5 and LoRA 2." in rendered(store, tmp_path)


@pytest.mark.parametrize("most", [1, 2, 3, 9, 17, 18, 20])
def test_a_bench_that_was_stopped_anywhere_has_a_report(most, tmp_path):
    store = bench(tmp_path, "full", "lora", most=most, **BOTH)
    assert "Base" in rendered(store, tmp_path)


def test_trials_alone_are_no_result(tmp_path):
    store = bench(tmp_path, "full", trials=3, most=4, **BOTH)
    for folder in store.folder.glob("base-*"):
        (folder / RECORD).unlink()
        folder.rename(folder.with_name(".gone"))
    with pytest.raises(ValueError, match="no run to report"):
        render(store, tmp_path / "reports")


def test_the_arms_of_a_sweep_are_rows_of_one_table_named_by_what_they_differ_in(tmp_path):
    sweeps = ["lora.learning_rate=2e-4,2e-3,6e-3", "lora.rank=8,16"]
    store = bench(tmp_path, "lora", "full", seeds=[0], sweeps=sweeps)
    text = rendered(store, tmp_path)
    (comparison,) = comparisons(store.load()[0])
    labels = {t.label for t in comparison.trained}
    rates = ("0.0002", "0.002", "0.006")
    assert labels == {"Full", *(f"LoRA (learning rate {r}, rank {n})" for r in rates for n in (8, 16))}
    assert "Against the learning rate" in text and "Tuned and identical" not in text


@pytest.mark.parametrize("rates", [[0, 0], [1e-300, 1e300], [1e-3, 1e-4], [-1.0, 1e-4]])
def test_a_card_that_no_search_can_begin_with_costs_its_section_alone(rates, tmp_path):
    store = bench(tmp_path, "full", trials=2, seeds=[0], **BOTH)
    for file in store.folder.glob(f"full-s1000000-*/{RECORD}"):
        value = json.loads(file.read_text())
        value["card"]["learning_rates"] = rates
        del value[SEAL]
        file.write_text(json.dumps(value))
    assert "Tuned and identical" not in rendered(store, tmp_path)
