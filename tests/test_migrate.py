"""Records that earlier versions wrote are read: real ones, shortened, of each age (tests/records)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness import cli, migrate
from harness.metrics import METRICS, scores
from harness.record import SCHEMA, RunRecord
from harness.report import render
from harness.store import MODEL, OUTPUTS, RECORD, Store

RECORDS = Path(__file__).with_name("records")
AGES = sorted(path.name for path in RECORDS.iterdir())
RUNS = sorted(path.parent for path in RECORDS.rglob(RECORD))


def read(run: Path) -> dict:
    return json.loads((run / RECORD).read_text("utf-8"))


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}")
def test_the_outputs_give_the_scores_that_the_version_of_then_had_written(run):
    written, record = read(run), Store(run.parent).read(run.name)
    assert written["schema"] < SCHEMA and record.schema == SCHEMA and record.folder == run.name
    for name, score in written["scores"].items():
        assert record.scores[name] == pytest.approx(score["value"], rel=1e-6, abs=1e-9), name
        assert record.signatures[name] == score["signature"]
    assert record.scores.keys() == METRICS.keys()  # also those that came later
    for name, score in written.get("start", {}).items():
        assert scores(record.start)[name] == pytest.approx(score["value"], rel=1e-9), name


@pytest.mark.fault(10)
@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}")
def test_what_was_measured_is_kept(run):
    written, record = read(run), Store(run.parent).read(run.name)
    assert record.sizes.parameters == written["sizes"]["parameters"] > 10**6
    assert record.tokens.trained == written["tokens"].get("trained")
    assert record.data.left_out == written["tokens"]["left_out"] and record.data.template == "chat"
    assert record.data.rows == written["tokens"].get("splits", {})
    commit = written["environment"]["commit"]
    assert record.provenance.commit + "+" * record.provenance.dirty == commit == record.provenance.code
    assert record.provenance.packages == written["environment"]["packages"]
    assert record.phases["load"].seconds == written["phases"]["load"]["seconds"] > 0
    assert RunRecord.from_json(record.to_json()) == record


def test_a_commit_that_was_changed_had_a_plus_behind_it():
    value = read(RUNS[0])
    value["environment"]["commit"] = "0123456789ab+"
    made = RunRecord.from_json(json.dumps(value)).provenance
    assert (made.commit, made.dirty) == ("0123456789ab", True)


@pytest.mark.parametrize("age", AGES)
def test_they_are_listed_and_reported(age, tmp_path, capsys):
    store = Store(RECORDS / age)
    records, corrupt = store.load()
    assert len(records) == 2 and not corrupt
    assert cli.main(["list", "results", "--results", str(store.folder)]) == 0
    listed = capsys.readouterr().out
    assert all(record.folder.rpartition("-")[2] in listed for record in records)
    render(store, tmp_path)
    text = (tmp_path / "report.md").read_text("utf-8")
    for record in records:
        assert f"{record.scores['bleu4']:.2f}" in text and f"{record.scores['rouge_l']:.3f}" in text
    assert "could not be read" not in text


@pytest.mark.parametrize("run", RUNS, ids=lambda run: f"{run.parent.name} {run.name}")
def test_the_same_request_finds_them(run, tmp_path):
    """By what was asked then: the spec of today has more words, and another folder."""
    store = Store(shutil.copytree(run.parent, tmp_path / "results"))
    spec = store.read(run.name).spec
    if saved := store.read(run.name).sizes.saved_bytes:
        assert store.find(spec) is None, "its model is not here"
        (store.folder / run.name / MODEL).mkdir()
        (store.folder / run.name / MODEL / "model.safetensors").write_bytes(bytes(saved))
    assert store.find(spec).folder == run.name
    assert store.find(replace(spec, seed=7)) is None
    assert store.find(replace(spec, hp=replace(spec.hp, max_length=9))) is None


def test_some_of_them_were_asked_for_in_fewer_words():
    assert any(Store(run.parent).read(run.name).spec.folder != run.name for run in RUNS)


def test_outputs_that_were_changed_are_refused_where_their_hash_was_kept(tmp_path):
    kept = [run for run in RUNS if "outputs" in read(run)["hashes"]]
    assert kept
    for run in kept:
        copy = shutil.copytree(run, tmp_path / run.name)
        text = (copy / OUTPUTS).read_text("utf-8")
        (copy / OUTPUTS).write_text(text.replace('"output": "', '"output": "so ', 1), "utf-8")
        assert "was changed" in Store(tmp_path).standing(run.name)[1]


@pytest.mark.fault(10)
def test_a_later_schema_is_told_what_helps():
    value = read(RUNS[0])
    with pytest.raises(ValueError, match=f"schema {SCHEMA + 1}, this version reads 1 to {SCHEMA}: upgrade"):
        RunRecord.from_json(json.dumps(value | {"schema": SCHEMA + 1}))


@pytest.mark.parametrize("broken", [{"scores": 3}, {"start": {"bleu4": {"value": "x"}}}, {"tokens": [1]},
                                    {"environment": {"commit": 5}}, {"scores": {"bleu4": 7}},
                                    {"start": {"perplexity": {"value": -1.0}}}, {"hashes": 5}])  # fmt: skip
def test_a_broken_record_of_an_earlier_schema_is_no_record(broken):
    with pytest.raises(ValueError):
        RunRecord.from_json(json.dumps(read(RUNS[0]) | broken))


@pytest.mark.parametrize("metric", [name for name, metric in METRICS.items() if not metric.fault])
def test_sums_that_are_made_up_for_a_score_give_it(metric):
    for score in (0.25, 1.0):
        assert scores({metric: migrate.sums_of(metric, score)})[metric] == pytest.approx(score)
