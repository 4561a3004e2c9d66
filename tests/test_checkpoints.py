"""A training that was stopped goes on as if it had not been: to the bit, on the CPU. Of every method
tests/test_contract.py holds it."""

import json
import os
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_cli import BITFIT, SMALL, bench, records

from harness.cli.progress import step_text
from harness.measuring.contention import Contention
from harness.store import CHECKPOINTS, EVENTS, OUTPUTS
from harness.training import checkpoint, evaluation, stages
from harness.training.checkpoint import STATE, TENSORS, Checkpoints, lost, take_record
from harness.training.loop import train
from methods.galore import GaLore
from methods.galore_layerwise import GaLoreLayerwise
from methods.lora import LoRA

HP = tiny.hyperparams(max_steps=7, batch_size=4, micro_batch_size=2, validations=2)
OFTEN = 1e-9  # seconds: after each step
ROWS = tiny.rows(40)


class Killed(Exception):
    pass


def training(method, folder, every=300.0, on_step=lambda **_: None, hp=HP):
    """As a run has it, with checkpoints in a folder. -> record, trained weights."""
    model, run = tiny.attached(method, None, ROWS, hp)
    run.splits["validation"], run.report = tiny.rows(4, seed=1), on_step
    run.checkpoints, run.record.phases = Checkpoints(folder, run, every), run.meter.phases
    train(model, run, run.checkpoints.newest(model))
    return run.record, tiny.trained_weights(model)


def at(step: int, does):
    def told(**values):
        if values.get("step") == step:
            does()

    return told


def killed():
    raise Killed


GALORES = [lambda cls=cls: cls(rank=4, gap=3) for cls in (GaLore, GaLoreLayerwise)]


@pytest.mark.parametrize("method", [LoRA, *GALORES], ids=["LoRA", "GaLore", "GaLore layerwise"])
def test_a_killed_training_goes_on_to_the_bit(method, tmp_path):
    hp = replace(HP, micro_batch_size=4) if "accumulation" in method().cannot else HP
    whole, expected = training(method(), tmp_path / "whole", hp=hp)
    with pytest.raises(Killed):
        training(method(), tmp_path / "killed", OFTEN, at(5, killed), hp=hp)
    record, weights = training(method(), tmp_path / "killed", OFTEN, hp=hp)
    assert [one.step for one in record.resumed] == [4] and not whole.resumed
    assert tiny.losses(record) == tiny.losses(whole) and record.validation == whole.validation
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    assert record.hashes == whole.hashes and record.tokens == whole.tokens
    assert len(record.step_seconds) == 7
    assert not list((tmp_path / "whole").iterdir() if (tmp_path / "whole").exists() else [])  # five minutes
    assert len(list((tmp_path / "killed").glob("[0-9]*"))) == 2


def test_asked_to_end_it_writes_down_its_last_step(tmp_path):
    """And what a run had cost before counts on: seconds, peaks, and the steps' own."""
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            training(LoRA(), tmp_path, on_step=at(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, handler)
    (folder,) = tmp_path.iterdir()
    kept = json.loads((folder / STATE).read_text())
    earlier = json.loads(dict(kept["kept"]["dict"])["record"])["phases"]["train"]
    record, _ = training(LoRA(), tmp_path)
    assert record.resumed[0].step == int(folder.name) >= 3
    assert record.phases["train"].seconds > earlier["seconds"] > 0
    assert (record.phases["train"].peak_host or 0) >= (earlier["peak_host"] or 0)


@pytest.fixture
def heeding():
    handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, handler)


def asked(times: int = 1):
    for _ in range(times):
        os.kill(os.getpid(), signal.SIGTERM)


def equal(first, second):
    return all(torch.equal(second[name], value) for name, value in first.items())


@pytest.mark.parametrize("when", ["twice in a step", "in a validation", "in the last step"])
def test_whenever_it_is_asked_to_end_it_goes_on_as_if_it_had_not_been(when, heeding, tmp_path, monkeypatch):
    """A scheduler's signal comes twice: to the run itself, and by its bench. A validation is not awaited."""
    whole, expected = training(LoRA(), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        told = at({"twice in a step": 3, "in the last step": 7}.get(when, 0), lambda: asked(2))
        if when == "in a validation":
            patch.setattr(evaluation, "likelihoods", lambda *_: asked() or time.sleep(60))
        training(LoRA(), tmp_path / "stopped", 300.0, told)
    (kept,) = (tmp_path / "stopped").glob("[0-9]*")
    record, weights = training(LoRA(), tmp_path / "stopped")
    assert [one.step for one in record.resumed] == [int(kept.name)]
    assert int(kept.name) == 4 if when == "in a validation" else int(kept.name) >= 3
    assert tiny.losses(record) == tiny.losses(whole) and record.validation == whole.validation
    assert equal(expected, weights) and len(record.step_seconds) == 7


def test_a_long_training_leaves_a_checkpoint_before_it_is_evaluated(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def passes(seconds):
        return lambda **_: now.append(now.pop() + seconds)

    expected = training(LoRA(), tmp_path, 300.0, passes(1))[1]
    assert not list(tmp_path.iterdir()), "seven seconds are not worth one"
    training(LoRA(), tmp_path, 300.0, passes(20))
    assert [path.name for path in tmp_path.iterdir()] == ["000000007"]
    (tmp_path / ".000000008.part").mkdir()  # of a writer that was killed
    record, weights = training(LoRA(), tmp_path)
    assert record.resumed[0].step == 7 and equal(expected, weights) and len(record.training) == 7
    assert not list(tmp_path.glob(".*"))


def test_what_disturbed_a_stopped_attempt_is_not_forgotten(tmp_path, monkeypatch):
    busy = ["other processes took 40% of the processor time that the run could use (4.0 of 10.0 s)"]
    for attempt in (1, 2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Contention, "of_cores", lambda _, n=attempt: busy * (n == 1))
            training(LoRA(), tmp_path, OFTEN, at(2 + 2 * attempt, killed))
    model, run = tiny.attached(LoRA(), None, ROWS, HP)
    checkpoints = Checkpoints(tmp_path, run, 0)
    take_record(run, checkpoints.newest(model))
    run.meter.contention.known = True
    assert run.meter.contention.reasons([]) == [f"before it was stopped, {busy[0]}"]


TOLD = '{"phase": "train"}\n{"step": 3, "seconds": 1.5}\n{"step": 4, "seconds": 2.0}\n{"step": 5, "sec'


@pytest.mark.parametrize(
    ("text", "done", "seconds"),
    [(TOLD, 3, 0.5), (TOLD, 2, 0.5), (TOLD, 4, 0.0), (TOLD, 5, None), (TOLD, 1, None),
     ("", 1, None), (None, 1, None)],
)  # fmt: skip
def test_what_a_stop_has_cost_is_known_or_not(text, done, seconds, tmp_path):
    if text is not None:
        (tmp_path / "events.jsonl").write_text(text)
    assert lost(tmp_path / "events.jsonl", done) == seconds


def test_tokens_a_second_and_the_time_left_are_of_all_steps_also_after_a_stop(monkeypatch):
    """Eight steps of 100 tokens and 3 s, of which six were made before it was stopped."""
    now = [1000.0]
    monkeypatch.setattr(stages, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    run, said = tiny.run(hp=HP), []
    run.batches, run.report = SimpleNamespace(tokens=[100] * 10), lambda **values: said.append(values)
    report = stages.with_progress(run, earlier=18.0)
    for step in (7, 8):
        now[0] += 3.0
        report(step=step, steps=10, loss=1.0)
    assert step_text(said[-1]).startswith("step 8/10, loss 1.000, 33 tokens/s, 6 s left")


def changed(folder):
    with (folder / TENSORS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))


@pytest.mark.fault(35)
def test_what_is_broken_is_told_and_the_one_before_is_taken(tmp_path):
    with pytest.raises(Killed):
        training(LoRA(), tmp_path, OFTEN, at(5, killed))
    changed(tmp_path / "000000004")
    (tmp_path / "000000005").mkdir()
    (tmp_path / "000000005" / TENSORS).touch()  # not finished: it has no mark yet
    record, _ = training(LoRA(), tmp_path, OFTEN)
    assert record.resumed[0].step == 3
    assert any(
        "step 4 is not used: tensors.safetensors was changed" in warning for warning in record.warnings
    )


@pytest.mark.parametrize(
    ("other", "hp", "said"),
    [(LoRA(rank=4), HP, "other weights"), (LoRA(), replace(HP, learning_rate=1e-2), "it was made with spec")],
    ids=["rank", "spec"],
)  # fmt: skip
def test_another_training_does_not_go_on_from_it(other, hp, said, tmp_path):
    with pytest.raises(Killed):
        training(LoRA(), tmp_path, OFTEN, at(3, killed))
    fresh, _ = training(other, tmp_path / "fresh", hp=hp)
    record, _ = training(other, tmp_path, hp=hp)
    assert not record.resumed and tiny.losses(record) == tiny.losses(fresh)
    assert any(said in warning for warning in record.warnings)


KILLS = """
    def optimizer(self, model, run):
        import os, pathlib, signal

        made, mark, done = super().optimizer(model, run), pathlib.Path(__file__).with_suffix(".killed"), [0]

        def count(*_):
            done[0] += 1
            if done[0] == 6 and not mark.exists() and "sturdy" in __file__:
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)

        made.register_step_post_hook(count)
        return made
"""


@pytest.mark.fault(1)
def test_a_killed_run_is_gone_on_from_by_the_same_command(tmp_path):
    for name in ("sturdy", "calm"):
        (tmp_path / f"{name}.py").write_text(BITFIT + KILLS)
    steps = ["hp.max_steps=8", "hp.batch_size=4", "hp.micro_batch_size=4", "--checkpoints", "0.001s"]
    asked = ["--seeds", 0, "--plugins", "sturdy.py", "calm.py", *SMALL, *steps]
    first = bench("--methods", "sturdy", *asked, cwd=tmp_path)
    assert first.returncode == 1 and records(tmp_path)["sturdy-0"]["status"] == "interrupted"
    second = bench("--methods", "sturdy", "calm", *asked, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    found = records(tmp_path)
    sturdy, calm = found["sturdy-0"], found["calm-0"]
    (resumed,) = sturdy["resumed"]
    assert 0 < resumed["step"] < 8 and resumed["spent"] > 0 and not calm["resumed"]
    for name in ("training", "validation", "tokens", "signatures", "sizes"):  # two processes, the same bits
        assert sturdy[name] == calm[name]
    assert all(sturdy["hashes"][name] == calm["hashes"][name] for name in ("batches", "given", "learned"))
    events = (next(tmp_path.glob("results/sturdy-*")) / EVENTS).read_text().splitlines()
    told = [event for event in map(json.loads, events) if event.keys() & {"earlier", "step"}]
    before = sum(sturdy["step_seconds"][: resumed["step"]])
    assert told[0]["earlier"] > before and told[1]["step"] == resumed["step"] + 1
    assert sturdy["phases"]["train"]["seconds"] > sum(sturdy["step_seconds"]), "of both processes"
    assert told[1]["seconds"] > before, "as long as all those steps took whose tokens it counts"
    outputs = [next(tmp_path.glob(f"results/{name}-*")) / OUTPUTS for name in ("sturdy", "calm")]
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    assert not list(tmp_path.glob(f"results/*/{CHECKPOINTS}")) and not list(tmp_path.glob("results/.s*"))
