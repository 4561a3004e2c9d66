"""What benchmarks/train.py makes of what was measured: nothing that was wrong has a speed."""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import fabricate
import pytest
import tiny

from harness.errors import BadRequest
from harness.method import find, known_methods, resolve
from harness.spec import Hyperparams, RunSpec

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import checkpoints
import devices as several
import train
import train_table as table

STEPS = table.WARMUP + 2
LOSSES = [8.0 - step / 8 for step in range(STEPS)]  # 0.875 nats apart in those that are compared


def row(seconds=0.1, error=0.0, **changes) -> dict:
    """Of a contender that reads 4 rows of 50 tokens a step, and is off by `error` at its third loss."""
    losses = [loss + error * (step == 2) for step, loss in enumerate(LOSSES)]
    first = [seconds + 3.0] + [seconds] * (STEPS - 1)
    return {
        "losses": losses, "norms": [1.0] * STEPS, "seconds": first, "ends": [], "compile": 0.0,
        "tokens": 200 * STEPS, "padded": 50 * STEPS, "allocated": 2**30, "device": None, "resident": 2**31,
        "disturbed": [], "kernels": None, **changes,
    }  # fmt: skip


def group(**rows) -> dict:
    reference = row() | {"losses": LOSSES[: table.CHECKED]}
    return {
        "method": "lora", "shape": "4x64", "objective": "sft", "reference": reference, "by": "HF Trainer",
        "rows": rows, "lengths": [[50] * 4] * STEPS, "targets": [196] * STEPS, "flops": [1e9] * STEPS,
    }  # fmt: skip


def call_of(*groups, **asked) -> dict:
    """What a call found."""
    asked = {"model": "tiny", "precision": "bf16", "real": None, "learned": "all", "steps": 2} | asked
    ceiling = {"flops": 1e11, "device": "a card", "torch": "2"}
    return {"ceiling": ceiling, "asked": asked, "groups": list(groups)}


def lines(*groups, precision="bf16") -> dict[str, dict[str, str]]:
    """Contender -> heading -> cell."""
    found = call_of(*groups, precision=precision)
    return cells([*table.about(found), *table.rows_of(groups, found), *table.below(found)])


def cells(text: list[str]) -> dict[str, dict[str, str]]:
    parts = [[cell.strip() for cell in line.split(" | ")] for line in text if line[:1] == "|"]
    heads, _, *found = [[cell.strip("| ") for cell in line] for line in parts]
    return {line[2]: dict(zip(heads, line, strict=True)) for line in found}


def test_a_row_has_its_speed_of_real_tokens_its_share_of_the_ceiling_and_its_ratio():
    found = lines(group(tuneoff=row(0.05), trainer=row(0.1)))
    slow = found["HF Trainer + PEFT"]
    assert (slow["tokens/s"], slow["step ms"], slow["Tuneoff is"]) == ("2,000", "100.0", "2.00 x")
    assert (slow["MFU"], slow["padding"], slow["first s"]) == ("10%", "20.0%", "3.0")
    assert (slow["allocated GiB"], slow["device GiB"], slow["loss off by"]) == ("1.0", "–", "0 of 0.02")
    assert found["Tuneoff"]["Tuneoff is"] == "1.00 x"


@pytest.mark.parametrize(
    "changes",
    [
        {"error": 0.05},  # above 2 % of 0.875 nats
        {"error": float("nan")},
        {"losses": LOSSES[:3]},
        {"norms": [0.5] * STEPS},  # AdamW's losses would hide that
        {"norms": [float("nan")] * STEPS},
        {"tokens": 100 * STEPS},
    ],
)
def test_what_is_wrong_has_no_speed_nor_is_it_compared_with(changes):
    found = lines(group(tuneoff=row(**changes), trainer=row()))
    assert found["Tuneoff"]["notes"].startswith("**WRONG**")
    assert found["Tuneoff"]["tokens/s"] == found["Tuneoff"]["step ms"] == "–"
    assert found["HF Trainer + PEFT"]["Tuneoff is"] == "–"
    assert found["HF Trainer + PEFT"]["tokens/s"] == "2,000"


def test_a_reference_of_no_gradient_or_no_number_lets_nothing_pass_that_is_another():
    nan, compared = float("nan"), LOSSES[: table.CHECKED]
    broken = [{"norms": [nan]}, {"losses": [nan, *compared[1:]]}, {"losses": [*compared[:-1], nan]}]
    for changes in ({"norms": [0.0]}, *broken):
        one = group(tuneoff=row(), trainer=row(norms=[0.0] * STEPS))
        one["reference"] |= changes
        found = lines(one)
        assert found["Tuneoff"]["notes"].startswith("**WRONG**")
        assert ("WRONG" in found["HF Trainer + PEFT"]["notes"]) is (changes in broken)
    again = call_of(group(tuneoff=row()) | {"reference": row(error=nan)})
    with pytest.raises(BadRequest, match="its reference"):
        table.together({"a": again, "b": again})


def test_compiling_counts_whether_it_is_in_the_first_step_or_beside_it():
    found = lines(group(tuneoff=row(compile=12.0), trainer=row()))
    assert (found["Tuneoff"]["first s"], found["HF Trainer + PEFT"]["first s"]) == ("15.0", "3.0")
    slower = row(compile=12.0) | {"seconds": [0.1] * (STEPS - 2) + [0.2] * 2}
    assert lines(group(tuneoff=slower))["Tuneoff"]["first s"] == "12.0"


def test_what_attaching_and_compiling_held_beyond_the_steps_is_told():
    before = {"allocated": 3 * 2**30, "device": 4 * 2**30}
    more, same = row(before=before, device=5 * 2**30), row(before=before, allocated=3 * 2**30)
    found = lines(group(tuneoff=more, again=same, trainer=row()))
    told = {name: line["notes"] for name, line in found.items() if line["notes"]}
    assert told == {"Tuneoff": "allocated up to 3.0 GiB while it attached or compiled"}


def test_in_bf16_twice_is_allowed_of_what_plain_bf16_shows_and_only_where_that_is_little():
    assert "WRONG" not in lines(group(tuneoff=row(error=0.05), trainer=row(error=0.03)))["Tuneoff"]["notes"]
    assert "WRONG" in lines(group(tuneoff=row(error=0.07), trainer=row(error=0.03)))["Tuneoff"]["notes"]
    broken = lines(group(tuneoff=row(error=0.15), trainer=row(error=0.1)))
    assert all("WRONG" in line["notes"] for line in broken.values())
    fp32 = lines(group(tuneoff=row(error=0.005), trainer=row(error=0.003)), precision="fp32")
    assert all("WRONG" in line["notes"] for line in fp32.values())


def test_what_did_not_run_says_why_and_without_a_reference_nothing_has_a_speed():
    found = lines(group(tuneoff=row(), trl={"error": "ImportError: no | trl"}))
    assert found["TRL SFTTrainer, its defaults: checkpointing"]["notes"] == "ImportError: no / trl"
    found = lines(group() | {"reference": {"error": "out of memory"}})
    assert found["reference"]["notes"] == "out of memory" and found["reference"]["tokens/s"] == "–"


def test_what_draws_its_own_answers_has_a_speed_and_is_not_compared():
    found = lines(group(tuneoff=row(error=1.0)) | {"objective": "reward", "reference": {}, "flops": None})
    assert (found["Tuneoff"]["tokens/s"], found["Tuneoff"]["loss off by"]) == ("2,000", "not compared")


def test_flops_are_six_a_weight_and_token_for_whole_models_and_four_for_frozen_ones(tmp_path):
    config = tiny.gemma()  # a tied head, windows of 16
    config.save_pretrained(tmp_path)
    model = tiny.model(config)
    within = [p for name, p in model.model.layers.named_parameters() if p.ndim == 2]
    body, head, total = (
        sum(p.numel() for p in some) for some in (within, [model.lm_head.weight], model.parameters())
    )
    lengths, learned = [40, 10], 30
    pairs = sum(min(i + 1, window) for n in lengths for i in range(n) for window in (16, 1000))
    scores = 12 * 4 * 16 * pairs  # heads, their width

    def found(trainable, parameters):
        sizes = {"trainable": trainable, "parameters": parameters}
        return table.flops(tmp_path, group(tuneoff=sizes) | {"lengths": [lengths], "targets": [learned]})

    assert found(total, total) == [6 * body * 50 + 6 * head * learned + scores]
    assert found(1000, total + 1000) == [(4 * body + 6 * 1000) * 50 + 4 * head * learned + scores]


class Cut(train.Call):
    """A call that is ended while its third contender runs."""

    def __init__(self, path: Path):
        self.asked = SimpleNamespace(
            json=path, steps=2, precision="bf16", contenders=["tuneoff", "trainer", "trl"],
            learned="all", real=None,
        )  # fmt: skip
        self.folder = self.model = path.parent
        self.blank = RunSpec("base", 0, "bench", {}, Hyperparams(), search={})
        self.found, self.seen = call_of(), []

    def with_rows(self, spec):
        return spec

    def planned(self, spec):
        return "", group()["lengths"], group()["targets"]

    def run(self, contender, *_, **__):
        if self.asked.json.exists():
            groups = json.loads(self.asked.json.read_text("utf-8"))["groups"]
            self.seen.append(list(groups[0]["rows"]))
        if contender.door == "trl":
            raise KeyboardInterrupt
        if contender.door == "tuneoff":
            return {"error": "out of memory"}
        return row(spent={"imports": 5.0, "setup": 20.0})


def test_what_was_measured_stands_in_the_json_and_on_the_screen_whatever_ends_the_call(tmp_path, capsys):
    cut, source = Cut(tmp_path / "a.json"), find("lora", known_methods())
    with pytest.raises(KeyboardInterrupt):
        cut.measure({"lora": resolve("lora", source)}, "4x64")
    assert cut.seen == [["tuneoff"], ["tuneoff", "trainer"]]  # as the second began, and the third
    said = capsys.readouterr().out
    assert "Tuneoff: out of memory" in said and "HF Trainer + PEFT: tokens/s 2,000; step ms 100.0" in said
    assert "imports 5.0, setup 20.0" in said
    table.main([str(tmp_path / "a.json")])
    later = cells(capsys.readouterr().out.splitlines())
    assert later == cells(said.splitlines())
    assert later["Tuneoff"]["notes"] == "out of memory"
    assert later["HF Trainer + PEFT"]["tokens/s"] == "2,000"


def test_contenders_of_two_calls_stand_in_one_table():
    a = call_of(group(tuneoff=row(0.05), trl={"error": "out of memory"}))
    b = call_of(group(trainer=row(0.1), trl=row(0.2), tuneoff={"error": "cut"}) | {"flops": None})
    for calls in ({"a": a, "b": b}, {"b": b, "a": a}):
        [one] = table.together(calls)["groups"]
        found = lines(one)
        ratios = {name: line["Tuneoff is"] for name, line in found.items()}
        assert ratios == {
            "Tuneoff": "1.00 x", "HF Trainer + PEFT": "2.00 x",
            "TRL SFTTrainer, its defaults: checkpointing": "4.00 x",
        }  # fmt: skip
        assert found["Tuneoff"]["MFU"] == "20%"
    other = call_of(group(tuneoff=row()) | {"shape": "8x64"})
    assert len(table.together({"a": a, "b": other})["groups"]) == 2


@pytest.mark.parametrize(
    ("what", "b"),
    [
        ("steps", call_of(group(), steps=5)),
        ("device", call_of(group()) | {"ceiling": {"device": "another card", "torch": "2"}}),
        ("torch", call_of(group()) | {"ceiling": {"device": "a card", "torch": "3"}}),
        ("its rows", call_of(group() | {"lengths": [[49] * 4] * STEPS})),
        ("its reference", call_of(group() | {"reference": row(error=0.01)})),
    ],
)
def test_calls_that_are_not_alike_stand_in_no_table(what, b):
    with pytest.raises(BadRequest, match=what):
        table.together({"a.json": call_of(group()), "b.json": b})


@pytest.mark.parametrize("learned", ["all", "half"])
def test_fixed_rows_are_as_long_as_they_should_be_and_as_much_is_learned(tmp_path, learned):
    call = object.__new__(train.Call)
    call.model = call.folder = tmp_path
    call.asked = type("Asked", (), {"real": None, "learned": learned, "source": []})
    call.config = {"vocab_size": 300}
    hp = Hyperparams(batch_size=2, micro_batch_size=2, max_length=32, max_steps=3)
    spec = RunSpec("base", 0, "bench", {}, hp, locations={"model": str(tmp_path)}, search={})
    _, lengths, targets = call.planned(call.with_rows(spec))
    assert lengths == [[32, 32]] * 3
    assert targets == [2 * {"all": 31, "half": 16}[learned]] * 3


class Cards(several.Call):
    """Two cards, of which the second costs a tenth, and weights in parts have room."""

    def __init__(self, **asked):
        usual = {"methods": ["lora"], "parts": several.PARTS, "steps": 3, "seconds": 240.0, "json": None}
        self.asked = SimpleNamespace(**{**usual, **asked})
        self.began, self.rows, self.cuda, self.counts, self.most = time.monotonic(), [], True, [1, 2], 2
        self.per_card, self.tokens, self.card, self.store, self.begin = 4, 64, "a card", None, None
        self.blank = self.deep = RunSpec("base", 0, "bench", {}, Hyperparams(), search={})


def run_of(spec, terms, slot):
    """As long as the rows of a card take; its losses are off by half a thousandth where there are several."""
    record, hp = fabricate.record(spec.method), spec.hp
    if spec.method == "full" and hp.sharding == "none" and hp.memory_cap:
        assert hp.memory_cap == round(0.9 * 16 * 10**9 / 2**30, 1)  # a thousand million weights
        record.status, record.error = "oom_gpu", "out of memory on the GPU"
    record.step_seconds = [9.0] * several.WARMUP + [
        0.1 * hp.batch_size / 4 / hp.devices * hp.devices**0.1
    ] * 3
    count = len(record.step_seconds)
    record.training = [{"loss": 3 - s / 8 + 5e-4 * (hp.devices > 1), "grad_norm": 1.0} for s in range(count)]
    record.hashes["given"] = [str(hp.batch_size)] * count
    return record


def test_several_cards_are_held_to_one_and_sharding_to_a_limit_that_one_cannot_keep(monkeypatch, capsys):
    monkeypatch.setattr(several, "run", run_of)
    call = Cards()
    call.measure()
    _, two, same, free, parts, alone = call.rows
    assert two["efficiency"] == pytest.approx(2**-0.1) and "apart" not in two
    assert same["apart"] == parts["apart"] == pytest.approx(5e-4) and same["cards"] == 1
    assert (parts["cards"], "error" in parts, alone["cards"]) == (2, False, 1)
    assert alone["error"].startswith("oom_gpu") and "seconds" in free
    assert "93.3%" in capsys.readouterr().out
    call.rows, call.asked.seconds = [], 5.0
    call.measure()
    assert all("left out" in row["error"] for row in call.rows)


def test_a_run_that_has_read_other_rows_is_wrong(monkeypatch):
    def other(spec, *more):
        record = run_of(spec, *more)
        record.hashes["given"] = [str(spec.hp.devices)] * len(record.training)
        return record

    monkeypatch.setattr(several, "run", other)
    call = Cards(parts=["same"])
    call.measure()
    assert call.rows[-1]["error"].startswith("WRONG")


class Killed(checkpoints.Call):
    """Of trainings whose second is a hundredth apart, as on a card, the continued one so many times that."""

    def __init__(self, folder, times=1.0, **last):
        self.asked = SimpleNamespace(steps=12, seed=0, seconds=100.0, json=None)
        self.began, self.folder, self.rows = time.monotonic(), folder, []
        self.times, self.last, self.jobs = times, last, []
        self.blank = RunSpec("", 0, "bench", {}, Hyperparams(), search={})

    def copy(self, job):
        self.jobs.append(job)
        number = len(self.jobs)
        if job.killed:
            return {"error": "it was killed, or took too long"}
        far = 0.01 * {1: 0, 2: 1, 4: self.times}[number]
        resumed = [self.jobs[2].written] if number == 4 else []
        cost = {"blocked": 0.5, "stall": 3.0, "whole": True, "gib": 1.0}
        found = {
            "losses": [2.0] * 11 + [1.0 + far],
            "far": far,
            "resumed": resumed,
            "warnings": [],
            "how": "eager",
        }
        return found | {"checkpoint": cost} | (self.last if number == 4 else {})


def test_a_continued_training_is_held_to_one_that_nobody_stopped(tmp_path, capsys):
    nan = float("nan")
    for number, (losses, weights, same) in enumerate(
        [(2.5, 2.5, True), (3.5, 1, False), (1, 3.5, False), (nan, 1, False), (1, nan, False)]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        call = Killed(folder, losses, far=0.01 * weights)
        call.measure("lora")
        assert call.rows[0]["same"] is same and call.rows[0]["share"] == pytest.approx(0.01)
        _, _, killed, last = call.jobs
        assert 0 < killed.written < killed.killed < 12 and (last.written, last.killed) == (12, 0)
        assert not list(folder.iterdir())  # weights and checkpoints of several methods fill a disk
    call = Killed(tmp_path, resumed=[], warnings=["the checkpoint of step 3 is not used: why"])
    call.measure("lora")
    assert "not used: why" in call.rows[0]["error"] and "not used: why" in capsys.readouterr().out
    call.asked.seconds = 0.0
    call.copy = checkpoints.Call.copy.__get__(call)
    call.measure("lora")
    assert call.rows[1]["error"].startswith("left out")


def test_a_verdict_is_wrong_by_what_a_run_under_a_cap_showed():
    """No room where it was said to fit, and room where it was refused; tight is neither."""
    import forecast

    def row(said, room):
        return {"method": said, "model": "m", "shape": "8x512 in 8", "said": said, "fitted": room}

    said = forecast.table(
        [row("fits", False), row("tight", False), row("too large", True), row("fits", True)]
    )
    assert "of 2 that had no room: 1 said to be fits, 1 tight" in said
    assert "of 2 that had room: 1 said to be too large, 0 tight" in said
    assert forecast.fitted({"shape": "8x512 in 8", "error": "oom_gpu: OutOfMemoryError: no room"}) is False
    assert forecast.fitted({"shape": "8x512 in 8", "error": "failed: ValueError: other"}) is None
    assert forecast.fitted({"shape": "8x512 in 8"}) and forecast.fitted({"shape": "8x512"}) is None
