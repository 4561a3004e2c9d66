"""One run, in this process: what of it is scored, counted and charged to which phase."""

import gc
import json

import peft
import pytest
import tiny
import torch

from harness import run, store
from harness.measuring.meter import Meter
from harness.metrics import scores
from harness.plan import Request, plan
from harness.record import Phase, RunRecord
from harness.report.rows import comparisons, tokens_per_second
from harness.report.tables import quality
from harness.store import EVENTS, OUTPUTS, RECORD
from methods.eva import EVA

WORDS = ["the", "cat", "dog", "red", "house", "mat", "user", "model", "sat", "ran", "on", "to"]
SETTINGS = (
    "data.train=32", "data.validation=4", "data.test=8", "hp.batch_size=8", "hp.micro_batch_size=4",
    "hp.max_steps=2", "hp.max_new_tokens=4", "hp.validations=1", "hp.learning_rate=1e-2", "hp.precision=fp32",
)  # fmt: skip
HARDLY = "hp.learning_rate=1e-7"  # moves some last bits


@pytest.fixture(autouse=True)
def frozen():
    """What the tests have imported is no garbage: a run collects it at each phase, a second at a time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with its tokenizer, rows, and preference pairs, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    tiny.model(tiny.gemma(tie_word_embeddings=False), seed=3).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    asked = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:6] for c in WORDS[:3]]
    rows = [{"prompt": text, "completion": text.split()[0] + " " + text.split()[2]} for text in asked]
    pairs = [{"prompt": text, "chosen": "the cat", "rejected": "house model house"} for text in asked]
    for name, values in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder


def finished(files, folder, method, *settings, rows="rows", before=None) -> RunRecord:
    """A run as its process would end it; its events and outputs lie in the folder."""
    request = Request(methods=[method], model=str(files / "model"), dataset=str(files / f"{rows}.jsonl"),
                      seeds=[0], settings=tiny.settings(SETTINGS, settings))  # fmt: skip
    (spec,) = [spec for spec in plan(request) if spec.method == method]
    spec.locations["before"] = before and str(before)
    folder.mkdir()
    record = RunRecord(spec, "failed")
    run.execute(spec, record, folder)
    record.status = "ok"
    (folder / RECORD).write_text(record.to_json())
    store.score(record, [json.loads(line) for line in (folder / OUTPUTS).read_text().splitlines()])
    return record


def entered(folder) -> list[str]:
    """The phases in the order of their beginning."""
    events = [json.loads(line) for line in (folder / EVENTS).read_text().splitlines()]
    return [event["phase"] for event in events if "phase" in event]


# Where a method starts


@pytest.mark.parametrize("method", ["loftq", "dora_loftq", "reft", "peft.vblora"])
def test_a_start_that_no_other_row_has_is_scored_and_a_training_that_hardly_moves_ends_there(
    method, files, tmp_path
):
    still = finished(files, tmp_path / "still", method, HARDLY)
    start = {name: value for name, value in scores(still.start).items() if value is not None}
    assert {name: still.scores[name] for name in start} == pytest.approx(start, rel=1e-3)
    moved = finished(files, tmp_path / "moved", method)
    assert moved.start == still.start
    assert moved.scores["perplexity"] != pytest.approx(scores(moved.start)["perplexity"], rel=1e-2)
    phases = entered(tmp_path / "moved")
    between = phases[phases.index("attach") : phases.index("train")]
    assert {"evaluate", "generate"} <= {*between}  # apart from the training, and before it
    assert RunRecord.from_json(moved.to_json()).start == moved.start


def test_what_starts_at_a_base_row_is_not_scored_twice(files, tmp_path):
    assert finished(files, tmp_path / "run", "qlora").start == {}
    assert "evaluate" not in entered(tmp_path / "run")[: entered(tmp_path / "run").index("train")]


def test_loftqs_start_is_its_own_base_and_not_the_four_bit_model(files, tmp_path):
    names = ("base", "base_nf4", "qlora", "loftq")
    found = {name: finished(files, tmp_path / name, name) for name in names}
    (comparison,) = comparisons(list(found.values()))
    rows = {row.spec.method: row for row in comparison.rows}
    nf4 = found["base_nf4"].scores["bleu4"]
    assert comparison.own_scores(rows["qlora"], "bleu4") == [nf4]
    assert comparison.own_scores(rows["loftq"], "bleu4") == [scores(found["loftq"].start)["bleu4"]]
    assert comparison.own_base(rows["qlora"]) is rows["base_nf4"]
    assert comparison.own_base(rows["loftq"]) is None
    assert comparison.own_scores(rows["base"], "bleu4") == []
    assert "BLEU-4 (own base)" in quality(comparison).columns


def test_reading_a_model_is_no_part_of_the_training(files, tmp_path, monkeypatch):
    """LoftQ's second model neither, though it is there as the training begins."""
    load = run.load_base

    def told(spec, dtype, device, **more):
        run.append(tmp_path / "run" / EVENTS, {"phase": "a model is read"})
        return load(spec, dtype, device, **more)

    monkeypatch.setattr(run, "load_base", told)
    finished(files, tmp_path / "run", "loftq")
    assert entered(tmp_path / "run")[:4] == ["load", "a model is read", "a model is read", "attach"]


# Tokens


def test_the_tokens_of_a_warm_up_are_counted_as_its_seconds_are(files, tmp_path):
    """SMT's warm-up of two steps reads what a training of two steps does."""
    warmed = finished(files, tmp_path / "smt", "smt", "smt.warmup=2", "smt.share=0.1", "hp.max_steps=3")
    plain = finished(files, tmp_path / "lora", "lora")
    assert warmed.tokens.attach == plain.tokens.trained
    assert plain.tokens.attach == 0
    warmed.phases = {"attach": Phase(2.0), "train": Phase(3.0)}
    assert tokens_per_second(warmed) == (warmed.tokens.attach + warmed.tokens.trained) / 5


def test_every_pass_of_eva_counts_and_answers_drawn_in_attach_do_not(files, tmp_path, monkeypatch):
    read, start = [], peft.initialize_lora_eva_weights

    def watched(model, dataloader, forward_fn, **more):
        def forward(model, inputs):
            read.append(int(inputs["attention_mask"].sum()))
            return forward_fn(model, inputs)

        return start(model, dataloader, forward_fn=forward, **more)

    monkeypatch.setattr(peft, "initialize_lora_eva_weights", watched)
    meter, made = Meter(torch.device("cpu")), tiny.batches(tiny.rows(22, seed=1), tiny.hyperparams())
    base = tiny.model()
    with meter.phase("attach"), run.read_in(meter, "attach", base) as counted:
        EVA(rank=4).attach(base, made)
    assert sum(counted) == sum(read) > 2 * sum(made.tokens)

    drawn = finished(files, tmp_path / "orpo", "orpo", "orpo.answer_tokens=5")
    assert drawn.tokens.attach == 0 < drawn.tokens.sampled


# Preference


@pytest.mark.parametrize("rows", ["pairs", "rows"])
def test_a_model_that_learned_the_references_prefers_them(rows, files, tmp_path):
    """To the pair's worse answer; without pairs, to what the untouched model says."""
    settings = "hp.max_steps=40", "hp.epochs=10"
    before = finished(files, tmp_path / "base", "base", rows=rows)
    after = finished(files, tmp_path / "full", "full", *settings, rows=rows, before=tmp_path / "base")
    outputs = [json.loads(line) for line in (tmp_path / "full" / OUTPUTS).read_text().splitlines()]
    margins = [output["margin"] for output in outputs if "margin" in output]
    assert len(margins) == 8 and min(margins) > 1
    assert after.scores["preference_accuracy"] == 1.0
    assert after.scores["perplexity"] < before.scores["perplexity"] / 2


def test_a_prompt_that_was_learned_and_scored_is_in_the_record(files, tmp_path, monkeypatch):
    found = finished(files, tmp_path / "clean", "full")
    assert found.data.answered == {"test": 0, "validation": 0}
    assert found.data.rows == {"train": 32, "validation": 4, "test": 8}
    token_rows = run.cache.token_rows

    def leaking(*asked):
        read = token_rows(*asked)
        read.rows["train"][:3] = read.rows["test"][:3]
        return read

    monkeypatch.setattr(run.cache, "token_rows", leaking)
    found = finished(files, tmp_path / "leaking", "full")
    assert found.data.answered == {"test": 3, "validation": 0}
