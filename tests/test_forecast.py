"""Forecasts: against what torch itself holds live, and what an H200 held."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
import torch

from harness import cli, forecast, method
from harness.forecast.cards import card_named
from harness.forecast.forecast import Forecast, drawn_out
from harness.measuring import LiveTensors
from harness.spec import Hyperparams, RunSpec
from harness.training import Loop, dry, master_weights
from harness.training.devices import Devices
from harness.training.dry import allocator, programs

CONFIG = tiny.gemma(
    num_hidden_layers=6, layer_types=["full_attention"] * 6, hidden_size=256, intermediate_size=512
)
ROWS = tiny.rows(16, prompt=(20, 40), response=(10, 30))
GIB = 2**30


def made(name: str, options=()):
    return method.build(method.resolve(name, method.find(name, method.known_methods())), dict(options))


def spec(name: str, hp, options=()) -> RunSpec:
    return RunSpec(name, 0, "tiny", {"language": "en", "reward": "rouge_l", "parts": []}, hp, dict(options))


def splits(rows) -> dict:
    return {"train": list(rows), "validation": [], "test": []}


def live(name: str, hp, options=(), rows=ROWS):
    """What two steps on the widest rows hold, as torch's own tensors say; the loop as in a run, of the first
    device if there are several."""
    own = made(name, options)
    model = tiny.model(CONFIG)
    model, run = tiny.attached(own, model, rows, hp, devices=Devices(0, hp.devices))
    master_weights(model, "fp32")
    loop = Loop(model, run)
    widest = max(run.batches, key=lambda rows: max(row.length for row in rows))
    with run.devices.silent(), LiveTensors(model, loop.optimizer) as seen:
        loop.step(widest)
        loop.step(widest)
    return seen.memory()


@pytest.fixture
def exact(monkeypatch):
    """A tiny model's tensors are smaller than the allocator's grain."""
    monkeypatch.setattr(allocator, "ROUND", 1)


@pytest.mark.parametrize(
    "name, options, devices",
    [("full", {}, 1), ("lora", {}, 1), ("galore", {"rank": 8}, 1), ("reft", {"rank": 4}, 1), ("lisa", {}, 1),
     ("lora", {}, 2)],
)  # fmt: skip
def test_a_dry_run_holds_what_a_real_training_holds(name, options, devices, exact):
    hp = tiny.hyperparams(kernels="eager", devices=devices)
    found = dry.trace(spec(name, hp, options), made(name, options), CONFIG, splits(ROWS), False, 6)
    highest = max((m for n, m in found.moments.items() if n.startswith("train")), key=lambda m: m.allocated)
    true = live(name, hp, options)
    assert highest.allocated == pytest.approx(true.peak, rel=0.03)
    parts = highest.parts
    assert parts["weights"] + parts["adapters"] == pytest.approx(true.weights, rel=0.02)
    assert parts["optimizer"] == pytest.approx(true.moments, rel=0.02, abs=4096)
    assert found.facts["micro_batches"] == 2 and found.facts["steps"] == 2
    share = sum(row.length for row in ROWS) / devices
    assert share <= found.facts["micro_tokens"] <= 1.5 * share  # padding included


def test_two_depths_tell_the_third(exact, monkeypatch):
    from harness.forecast import forecast as own

    hp, built = tiny.hyperparams(kernels="eager"), made("lora")
    monkeypatch.setattr(own, "SHALLOW", 2)
    monkeypatch.setattr(own, "DEPTHS", (2, 4))
    told = drawn_out(spec("lora", hp), built, CONFIG, splits(ROWS), True, False)
    whole = dry.trace(spec("lora", hp), built, CONFIG, splits(ROWS), False, 6)
    true = max(m.allocated for name, m in whole.moments.items() if name.startswith("train"))
    assert told.highest["allocated"] == pytest.approx(true, rel=0.01)


def test_a_compiled_layer_keeps_what_an_h200_kept(monkeypatch):
    """LoRA of rank 8 on all linear layers of Gemma 3 1B, 8 x 512 tokens, all learned, compiled and captured,
    what is cheap computed again in backward: 7.25 GiB at the highest moment (torch 2.11)."""
    cheap = ("used_far_apart", "long_fusible_chains", "materialized_backward")
    monkeypatch.setattr(programs, "GRADED", {f"ban_recompute_{what}": False for what in cheap})
    hp = Hyperparams(batch_size=8, micro_batch_size=8, max_steps=4, kernels="compiled", validations=0)
    [row] = tiny.rows(1, prompt=(0, 0), response=(511, 511))
    asked = RunSpec("lora", 0, "g", {"language": "en", "reward": "rouge_l", "parts": []}, hp)
    config = copy.deepcopy(tiny.GEMMA_3_1B)
    found = drawn_out(asked, made("lora"), config, splits([row] * 32), True, True)
    assert found.rung == "compiled + graph"
    assert found.peak / GIB == pytest.approx(7.25, rel=0.05)


def test_the_allocator_asks_for_segments_as_torch_does():
    mib, own = 2**20, allocator.Allocator()
    small = [own.take(1) for _ in range(3)]
    assert own.reserved == 2 * mib and {block.size for block in small} == {512}
    large = own.take(3 * mib)
    assert own.reserved == 22 * mib  # of 20 MiB, what is left of it is taken next
    again = own.take(16 * mib)
    assert own.reserved == 22 * mib
    huge = own.take(30 * mib + 1)
    assert own.reserved == 54 * mib  # to the next 2 MiB
    for block in (large, again, huge, *small):
        own.free(block)
    assert own.reserved == 54 * mib
    own.take(20 * mib)  # of what was put together again
    assert own.reserved == 54 * mib
    own.empty_cache()
    assert own.reserved == 20 * mib


def test_cards_are_told_by_the_names_of_their_driver():
    assert card_named("NVIDIA H200").short == 989e12
    assert card_named("NVIDIA A100-SXM4-80GB").name == "A100-80GB"
    assert not card_named("Tesla T4").bf16
    assert card_named("NVIDIA L40S").name != "L4"
    unknown = card_named("Fantasia 1", 10 * GIB)
    assert not unknown.known and unknown.bytes == 10 * GIB


def test_a_verdict_leaves_room_on_both_sides():
    moments = {"train backward": {"allocated": 10 * GIB, "reserved": 11 * GIB, "parts": {}}}
    made, card = Forecast(moments=moments), forecast.CARDS["H200"]
    verdicts = [made.verdict(card.of(size * GIB)) for size in (24, 11.5, 9)]
    assert verdicts == ["fits", "tight", "too large"]


def test_a_plan_says_what_cannot_fit_and_ends_with_3(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TUNEOFF_FORECASTS")
    monkeypatch.setenv("TUNEOFF_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["plan", "--methods", "lora", "--seeds", "0", "--results", str(tmp_path / "r")]
    assert cli.main([*asked, "--memory", "24GB"]) == 0
    told = capsys.readouterr().out
    assert "fits" in told and "too large" not in told and max(map(len, told.splitlines())) <= 80
    monkeypatch.setattr("harness.forecast.forecast.traced", lambda *_: pytest.fail("it was known"))
    assert cli.main([*asked, "--memory", "0.5GB", "--json"]) == 3
    runs = json.loads(capsys.readouterr().out)
    assert {run["forecast"]["verdict"] for run in runs} == {"too large"}


def test_a_cap_makes_a_smaller_card(monkeypatch):
    from harness.training import stages

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    card = SimpleNamespace(total_memory=40 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    stages.capped(10.0)
    stages.capped(80.0)
    stages.capped(0.0)
    assert taken == [0.25, 1.0]
    assert spec("lora", Hyperparams()).digest == spec("lora", Hyperparams(memory_cap=0.0)).digest
    assert spec("lora", Hyperparams()).digest != spec("lora", Hyperparams(memory_cap=8.0)).digest
