"""Probes: what they measure, what they correct, what is said of it before and after a run."""

import io
import os
from dataclasses import replace
from types import SimpleNamespace

import fabricate
import pytest
import tiny
import torch
from test_forecast import CONFIG, ROWS, live, made, spec
from torch.utils.flop_counter import FlopCounterMode

from harness import child, cli, forecast
from harness.bench import attempt
from harness.cli import advice, arguments, beforehand, planning
from harness.cli.arms import Arm, arms_of
from harness.forecast import CARDS, Forecast, corrected
from harness.forecast.forecast import BESIDE
from harness.forks import in_a_copy
from harness.plan import Request, plan
from harness.record import TIMED, Expected, Phase, RunRecord, Sizes, Steps
from harness.report import Report
from harness.report.foretold import foretold, unforeseen
from harness.spec import Hyperparams
from harness.store import Store
from harness.training import tried
from harness.work import PRODUCTS, flops

GIB = 2**30
H200 = CARDS["H200"]
no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="a probe would be made on the card")


# What a probe measures


@no_card
@pytest.mark.parametrize("uneven", [True, False])
def test_a_probe_makes_the_widest_step_and_some_of_all_and_finds_what_a_training_holds(uneven, monkeypatch):
    hp = tiny.hyperparams(kernels="eager", batch_size=2)
    rows = ROWS[:16] if uneven else [replace(ROWS[0], id=f"r:{n}") for n in range(16)]
    own, taken = made("lora"), []
    run = tiny.run(rows, hp, method=own)
    run.record.provenance.precision, run.record.phases = "fp32", run.meter.phases
    prepare = own.prepare
    monkeypatch.setattr(
        own, "prepare", lambda model, step, run: taken.append(step) or prepare(model, step, run)
    )
    loop = tried(tiny.model(CONFIG), run)
    kinds = {tuple(sorted(row.length for row in step)) for step in (taken[0], *taken[-TIMED:])}
    assert loop.done == len(taken) == len(run.record.step_seconds) == 2 + len(kinds) - 1 + TIMED
    longest = max(max(row.length for row in step) for step in run.batches)
    assert all(max(row.length for row in step) == longest for step in taken[:2])
    tokens = sorted(sum(row.length for row in step) for step in run.batches)
    timed = [sum(row.length for row in step) for step in taken[-TIMED:]]
    assert len(tokens) == 8 and timed == tokens[1::2]  # in the middle of each quarter
    assert len(kinds) == (TIMED if uneven else 1)  # the widest is one of them
    assert all(step in taken[:-TIMED] for step in taken[-TIMED:]) or not uneven
    true = live("lora", CONFIG, hp, rows=rows).peak
    assert run.record.phases["train"].peak_allocated == pytest.approx(true, rel=0.001)


class Forked:
    """A child that is a copy of this process, which has ended when it is followed."""

    def __init__(self, folder):
        in_a_copy(lambda: bytes(child.main(folder) or b""), 60)
        self.pid, self.stdout = os.getpid(), io.BytesIO()

    def poll(self):
        return 0

    def clear(self):
        return 0


@no_card
def test_a_probe_leaves_a_record_and_no_run(tmp_path):
    settings = ["data.train=24", "data.test=2", "data.validation=2", "hp.max_length=32", "hp.max_steps=4",
                "hp.precision=fp32"]  # fmt: skip
    one = plan(Request(["lora"], preset="demo", seeds=[0], settings=settings))[-1]
    terms = attempt.Terms(Store(tmp_path), "", beforehand.Unseen(), every=0.0, probe=True)
    record = attempt.run(one, terms, attempt.Slot(begin=Forked))
    assert record.ok, record.error
    assert len(record.step_seconds) == 2 + TIMED and not record.scores and not record.validation
    assert not {"evaluate", "generate", "save"} & record.phases.keys()


# What it corrects


def forecasted(train=100.0, **facts) -> Forecast:
    """Of a run whose every phase but the training takes nothing to speak of."""
    parts = {"weights": 2 * GIB, "optimizer": GIB, "activations": 6 * GIB}
    moments = {"train forward": {"allocated": 9 * GIB, "reserved": 10 * GIB, "parts": parts},
               "evaluate": {"allocated": 3 * GIB, "reserved": 4 * GIB, "parts": {}}}  # fmt: skip
    work = {"micro-batch": {"products": PRODUCTS * H200.short * train}}
    known: dict = {"steps": 50, "micro_batches": 1, "micro_tokens": 1, "traced_tokens": 1, "cannot": []}
    return Forecast("eager", moments=moments, work=work, facts=known | facts)


def probe(**changes) -> RunRecord:
    found = fabricate.record("lora")
    found.hashes["batches"] = ["x"] * 50
    found.kernels = Steps(rung="eager")
    found.phases = {"load": Phase(4.0, GIB, GIB, 2 * GIB), "attach": Phase(1.0, GIB, GIB, 2 * GIB),
                    "train": Phase(9.0, 12 * GIB, 13 * GIB, 14 * GIB)}  # fmt: skip
    found.sizes = Sizes(weight_bytes=3 * GIB, trainable_bytes=GIB, optimizer_bytes=2 * GIB)
    found.step_seconds = [9.0] * 5 + [2.0, 3.0, 3.0, 4.0]
    return replace(found, **changes)


def test_what_was_measured_stands_in_place_of_what_was_forecast():
    after = corrected(forecasted(), probe(), H200)
    assert after.peak == 12 * GIB
    assert after.device(H200) == 14 * GIB  # what the allocator held, and what the card lost beside it
    assert after.parts["optimizer"] == 2 * GIB and after.parts["weights"] == 3 * GIB
    assert sum(after.parts.values()) == after.peak
    seconds = after.seconds(H200)
    assert (seconds["load"], seconds["attach"], seconds["train"]) == (4.0, 1.0, 150.0)
    assert forecasted().seconds(H200)["train"] == pytest.approx(100)
    before, now = (one.total_seconds(H200) for one in (forecasted(), after))
    assert now[2] / now[0] < before[2] / before[0]
    assert after.unsure(after.peak) < forecasted().unsure(forecasted().peak)
    assert after.verdict(H200.of(14.5 * GIB)) == "fits" and after.verdict(H200.of(12 * GIB)) == "too large"


def test_timed_steps_stand_for_others_by_what_these_have_to_do():
    """Of 50 steps, 2 micro-batches and 4 tokens each on average; the timed ones have one and 3."""
    made = forecasted(train=1.0, micro_batches=100, micro_tokens=200, timed=[1, 3])
    after = corrected(made, probe(), H200)
    assert after.seconds(H200)["train"] == pytest.approx(3.0 * 200 / 3)
    made.work["step"] = {"products": PRODUCTS * H200.short * 2.0}  # as much of each as two of its tokens
    after = corrected(made, probe(), H200)
    assert after.seconds(H200)["train"] == pytest.approx(3.0 * (200 + 50 * 2) / (3 + 2))
    made = forecasted(train=1e-3, micro_batches=100, micro_tokens=200, timed=[1, 3])
    made.work["micro-batch"] |= {"launches": 1e4}  # these count by the probe's rung, not by the forecast's
    captured = replace(probe(), kernels=Steps(rung="eager + graph"))
    plain, graph = (corrected(made, one, H200).seconds(H200)["train"] for one in (probe(), captured))
    assert plain == pytest.approx(3.0 * 100) and graph < 0.99 * plain


def test_rollouts_of_steps_are_in_their_seconds_and_those_of_a_start_are_not():
    facts = {"micro_batches": 100, "micro_tokens": 200, "timed": [1, 3], "rollout_tokens": 8}
    for rolls_out, seconds in ((True, (3.0 * 50, 0.0)), (False, (3.0 * 200 / 3, 7.0))):
        found = probe()
        found.phases["rollout"] = Phase(7.0)
        after = corrected(forecasted(train=1.0, **facts, rolls_out=rolls_out), found, H200).seconds(H200)
        assert (after["train"], after["rollout"]) == pytest.approx(seconds)


@pytest.mark.parametrize("captured, verdict", [(2, "tight"), (3, "fits")])
def test_what_shapes_need_beside_graphs_is_forecast_until_a_probe_has_captured_all(captured, verdict):
    made = replace(forecasted(shapes=3), rung="eager + graph")
    made.moments[BESIDE] = {"allocated": 3 * GIB, "reserved": 20 * GIB, "parts": {}}
    after = corrected(made, probe(kernels=Steps(rung="eager + graph", shapes=captured)), H200)
    assert after.device(H200) == 14 * GIB and after.verdict(H200.of(16 * GIB)) == verdict
    assert BESIDE not in corrected(made, probe(), H200).moments


def test_how_a_probe_failed_is_the_verdict():
    ends = {"oom_gpu": "too large", "unsupported": "unsupported", "diverged": "diverged"}
    found = {end: corrected(forecasted(), probe(status=end, error="why"), H200) for end in ends}
    assert {end: one.verdict(H200) for end, one in found.items()} == ends
    [line] = advice.remedies(
        [Arm("lora", [spec("lora", Hyperparams())], ["will run"], found["unsupported"])], H200, {}
    )
    assert "why" in line


def test_a_probe_is_kept_for_its_card_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("TUNEOFF_CACHE", str(tmp_path))
    asked = spec("lora", Hyperparams())
    key = forecast.key_of(asked, True)
    assert key == forecast.key_of(replace(asked, seed=3, hp=Hyperparams(learning_rate=1e-5)), True)
    assert key != forecast.key_of(replace(asked, hp=Hyperparams(max_length=64)), True)
    forecast.keep(key, forecasted())
    forecast.keep(key, corrected(forecasted(), probe(), H200), H200)
    peaks = {name: forecast.foreseen([asked], True, card=card)[asked.digest].peak
             for name, card in (("any", None), ("H200", H200), ("L4", CARDS["L4"]))}  # fmt: skip
    assert peaks["H200"] == 12 * GIB and peaks["any"] == peaks["L4"] == forecasted().peak
    monkeypatch.setattr("harness.forecast.forecast.card_at_hand", lambda: H200)
    said = forecast.expected(asked)
    assert said.probed and said.peak[1] == 12 * GIB and said.seconds[1] == pytest.approx(156, abs=2)
    monkeypatch.setattr("harness.forecast.forecast.card_at_hand", lambda: None)
    assert forecast.expected(asked) is None


# What is said before


def arm(name: str, train: float, runs: int = 3, trains: bool = True) -> Arm:
    one = spec(name, Hyperparams(epochs=1.0 if trains else 0.0))
    seconds = {"start": 0.0, "load": 10.0, "attach": 0.0, "save": 0.0, "train": train, "compile": 0.0}
    return Arm(name, [one] * runs, ["will run"] * runs, forecasted(train, seconds=seconds))


@pytest.mark.parametrize(
    "hours, said",
    [(700, "is within"), (500, "2 of 3 seeds"), (130, "50% of the rows (data.train), one seed"),
     (29, "take 30 s for one seed of all")],
)  # fmt: skip
def test_hours_count_what_fewer_rows_do_not_shorten(hours, said):
    arms = [arm("base", 0.0, 1, trains=False), arm("lora", 50.0), arm("full", 150.0)]
    text = advice.within(arms, H200, hours)
    assert said in text, text
    few = [arm("base", 0.0, 1, trains=False), arm("lora", 1.0), arm("full", 150.0)]
    assert "There is time for lora alone, one seed." in advice.within(few, H200, 25)


def test_a_card_is_named_or_another_is_said_to_stand_in():
    small = forecast.card_of(8e9)
    assert small.stands_in and small.bf16 and not small.known
    assert "taken to be as fast as" in planning.the(small)
    assert arguments.card("t4").name == "T4" and arguments.card("RTX 4090").name == "RTX-4090"
    assert arguments.card("16GB") == (16e9, False)
    with pytest.raises(Exception, match="did you mean H200"):
        arguments.card("H20")


@pytest.mark.parametrize(
    "train, asked, probed", [(10.0, False, False), (10.0, True, True), (1500.0, False, True)]
)
def test_a_bench_probes_where_it_is_asked_to_or_has_an_hour_ahead(
    train, asked, probed, monkeypatch, tmp_path, capsys
):
    specs = plan(Request(["lora"], preset="demo", seeds=[0, 1, 2]))
    monkeypatch.setattr(forecast, "card_at_hand", lambda: H200)
    found = {one.digest: forecasted(train) for one in specs if one.trains}
    monkeypatch.setattr(beforehand, "forecasts", lambda *_: found)
    ends = lambda plan, runs, _: ((one, probe(status="oom_gpu", error="full")) for one in runs)  # noqa: E731
    monkeypatch.setattr(beforehand, "probes", ends)
    monkeypatch.setenv("TUNEOFF_CACHE", str(tmp_path / "cache"))
    options = SimpleNamespace(on=None, probe=asked, results=tmp_path, force=False, json=False)
    planning.before_runs(specs, Store(tmp_path), options)
    told = capsys.readouterr().out
    assert ("1 too large" in told) == probed and bool(told) == probed


def test_the_runs_of_what_a_search_finds_are_forecast_as_such(monkeypatch, tmp_path):
    """They are evaluated, as its trials are not; the probe of a trial says of both what a training takes."""
    monkeypatch.setenv("TUNEOFF_CACHE", str(tmp_path))
    tuned = plan(Request(preset="demo", methods=["lora"], seeds=[0, 1], tracks=["tuned"], trials=5))
    [tuning] = tuned.tunings
    found = {one.digest: forecasted() for one in tuned.methods()} | {tuning.identical.digest: forecasted()}
    lines = {arm.name: arm for arm in arms_of(tuned, [], found)}
    assert [lines[f"lora, {what}"].due for what in ("trials", "tuned")] == [5, 2]
    assert not lines["lora, tuned"].runs[0].trial and lines["lora, trials"].runs[0].trial
    monkeypatch.setattr(beforehand, "probes", lambda _, specs, __: [(one, probe()) for one in specs])
    after = beforehand.probed(tuned, set(), found, H200)
    assert after[tuning.trial.digest].peak == after[tuning.identical.digest].peak == 12 * GIB


@no_card
def test_a_probe_needs_the_card(capsys, tmp_path):
    asked = ["--methods", "lora", "--results", str(tmp_path), "--probe"]
    assert cli.main(["plan", *asked]) == cli.BAD_REQUEST
    assert cli.main(["plan", *asked, "--memory", "16GB"]) == cli.BAD_REQUEST
    assert capsys.readouterr().err.count("--probe makes steps on the card at hand") == 2


def test_energy_is_that_of_the_same_method_model_and_card(tmp_path):
    fabricate.keep(tmp_path, fabricate.record("lora", model="tiny"))
    watts = beforehand.watts([arm("lora", 1.0), arm("full", 1.0)], Store(tmp_path), H200)
    assert watts == [pytest.approx(400, rel=0.1), None]
    assert beforehand.watts([arm("lora", 1.0)], Store(tmp_path), CARDS["L4"]) == [None]


# What is said afterwards


def section(folder, forecasts: dict[str, float]) -> list:
    """Of a report of runs that were said to take so many times what they took, give or take a tenth."""
    for method in ("base", "lora", "dora"):
        record = fabricate.record(method)
        if method in forecasts:
            peak, seconds = record.peak("peak_allocated"), sum(p.seconds for p in record.phases.values())
            said = [(x * forecasts[method] * 0.9, x * forecasts[method], x * forecasts[method] * 1.1)
                    for x in (peak, peak, seconds)]  # fmt: skip
            record.forecast = Expected(*said, rung="eager")
        fabricate.keep(folder, record)
    [comparison] = Report.of(Store(folder)).comparisons
    return foretold(comparison, "")


def test_a_report_holds_forecasts_against_what_was_measured(tmp_path):
    _, _, table, missed, plot = section(tmp_path / "some", {"lora": 1.05, "dora": 1.25})
    rows = {row[0]: row[1:] for row in table.rows}
    assert [rows["LoRA"][i] for i in (2, 5)] == ["+5.0"] * 2
    assert [rows["DoRA"][i] for i in (2, 5)] == ["+25.0†"] * 2
    assert missed.text == "Off by more than its range: memory of 1 and time of 1 of 2 techniques."
    assert plot.name == "forecast"
    _, line = section(tmp_path / "none", {})
    assert "Nothing was forecast" in line.text


def test_a_run_without_room_is_a_miss_where_room_was_forecast(tmp_path):
    record = fabricate.record("lora", status="oom_gpu", error="out of memory")
    record.forecast = Expected(*[(4.0 * GIB, 5.0 * GIB, 6.0 * GIB)] * 3)
    record.provenance.device_bytes = 8 * GIB
    assert unforeseen(record)
    record.provenance.device_bytes = 3 * GIB
    assert not unforeseen(record)


def test_a_record_keeps_its_forecast():
    record = fabricate.record("lora")
    record.forecast = Expected((1.0, 2.0, 3.0), (2.0, 3.0, 4.0), (5.0, 6.0, 7.0), "eager + graph", True)
    again = RunRecord.from_json(record.to_json()).forecast
    assert list(again.peak) == [1.0, 2.0, 3.0] and again.probed and again.rung == "eager + graph"


def test_attention_counts_as_its_products_where_queries_share_a_key_head():
    """Those of plain attention, forward and backward; a fused backward computes its scores once more."""
    query, key = torch.empty(2, 4, 8, 16, device="meta"), torch.empty(2, 1, 12, 16, device="meta")
    aten, forward, backward = torch.ops.aten, FlopCounterMode(display=False), FlopCounterMode(display=False)
    left, right = (x.detach().expand(2, 4, -1, -1).requires_grad_() for x in (query, key))
    with forward:
        scores = left @ right.mT
        out = scores.softmax(-1) @ right.detach().clone().requires_grad_()
    with backward:
        out.backward(torch.empty_like(out))
    counted = flops()
    plain = counted[aten._scaled_dot_product_flash_attention](query, key, key, out_val=None)
    assert plain == forward.get_total_flops()
    again = counted[aten._scaled_dot_product_flash_attention_backward](query, query, key, key, out_val=None)
    assert again == backward.get_total_flops() + forward.get_total_flops() // 2
