"""The faults that a bench must survive, and the tests of those that have no other place.

A test names those that it really causes: `@pytest.mark.fault(number, ...)`; `pytest -m fault` runs them all.
"""

import ast
import json
import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fabricate
import pytest
import tiny
import torch
from filelock import FileLock
from huggingface_hub import constants
from test_cli import BITFIT
from test_run import files, run  # noqa: F401

from harness import bench, machine, trial
from harness.errors import Problems
from harness.method import NAME, Method, Unsupported
from harness.plan.hub import unreachable_model
from harness.plan.model import find_model
from harness.record import SEAL
from harness.report import Report, write
from harness.spec import Hyperparams, RunSpec
from harness.store import RECORD, Store
from harness.training import evaluation, stages
from harness.training.model import load_base, resolve_precision
from methods.full import Full

ROOT = Path(__file__).resolve().parents[1]
FAULTS = {
    1: "a child is killed in the middle of a step, and the same command is given again",
    2: "the bench is killed",
    3: "SIGINT, SIGTERM, SIGHUP, to one process or to all",
    4: "a method runs out of the card's memory before its first step",
    5: "main memory runs out",
    6: "the loss is no number",
    7: "the loss or the gradient leaps",
    8: "the disk is full while a record is written",
    9: "a record is cut, empty, not finite, no object",
    10: "a record of a newer or an older schema",
    11: "two benches write into one folder",
    12: "the lock of a bench that is gone, whose number another process has now",
    13: "a folder of results that may not be written",
    14: "a gated model without a token",
    15: "a model that the hub lacks, or no hub",
    16: "no GPU",
    17: "a package that a method needs cannot be imported",
    18: "bf16 on a card that only emulates it",
    19: "wrong settings",
    20: "an unknown method",
    21: "names that lead elsewhere",
    22: "a hostile answer",
    23: "a formula in a cell of a table",
    24: "a token in an error",
    25: "references and answers that do not fit together, or are nothing",
    26: "test rows among the training rows",
    27: "rows without a token to learn",
    28: "a plugin that is broken, is named as ours are, or draws from everybody's generator",
    29: "another program on the card",
    30: "a run that takes too long, or is deaf",
    31: "the clock is set back",
    32: "fewer answers than prompts",
    33: "a model of pickled weights, or with code of its own",
    34: "a report where there is no torch",
    35: "a checkpoint that was not finished",
    36: "the disk is full while the model is saved",
    37: "SIGTERM to a bench that a script started in the background",
    38: "a pipe or a folder in place of a record",
    39: "a record in the folder of another",
    40: "a kill between two renames",
    41: "a line of events that is none",
    42: "a plugin that sleeps, exits or prints when it is imported",
    43: "a process that a plugin's process has started",
    44: "modules of the same name in the working directory",
    45: "a terminal that knows ASCII alone",
    46: "two reports at once",
    47: "a neighbour that keeps the cores busy",
    48: "an untouched model that died beside runs that did not",
    49: "no progress, and a hung import",
}


def marked(file: Path) -> list[tuple[int, str]]:
    """Number -> test, of each fault that the tests of a file say they cause."""
    tests = [node for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    marks = [(test, mark) for test in tests for mark in test.decorator_list if isinstance(mark, ast.Call)]
    return [
        (number.value, f"{file.name}::{test.name}")
        for test, mark in marks
        if ast.unparse(mark.func) == "pytest.mark.fault"
        for number in mark.args
    ]


def test_every_fault_is_caused_by_a_test():
    found = dict(fault for file in sorted((ROOT / "tests").glob("test_*.py")) for fault in marked(file))
    assert sorted(found) == sorted(FAULTS)


# Files and folders


@pytest.mark.fault(8)
def test_a_full_disk_leaves_the_earlier_run_and_nothing_half_written(tmp_path):
    store = Store(tmp_path)
    old = fabricate.keep(tmp_path, fabricate.record("lora", command="old"))
    store.attempt(old.spec)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))  # as where 500 bytes are left
    try:
        with pytest.raises(OSError, match="File too large"):
            store.keep(old.spec, fabricate.record("lora", command="new", status="ok"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    store.recover()
    assert [record.command for record in store.load()[0]] == ["old"]
    assert not list(tmp_path.rglob("*.part"))
    assert not (tmp_path / f".{old.spec.folder}" / RECORD).exists(), (
        "no half a record is taken for a whole one"
    )


@pytest.mark.fault(12)
def test_a_lock_ends_with_its_process_whoever_has_its_number_now(tmp_path):
    code = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()"
    code += "; print(1, flush=True); time.sleep(99)"
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    holder.stdout.readline()
    (tmp_path / ".holder").write_text(str(os.getpid()))  # as after a new start of the machine
    with pytest.raises(bench.Busy, match=f"({os.getpid()})"), bench.lock(tmp_path):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with bench.lock(tmp_path), pytest.raises(Exception, match="could not be acquired"):
        FileLock(tmp_path / ".lock", timeout=0).acquire()


@pytest.mark.fault(46)
def test_reports_that_are_written_at_once_are_each_whole(tmp_path, undrawn):
    results = fabricate.results(tmp_path / "results", ["lora"], [0, 1])
    formats = ("md", "csv", "json")
    reports = [Report.of(Store(results), now="now") for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda report: write(report, tmp_path / "together", formats), reports))
    write(reports[0], tmp_path / "alone", formats)
    for name in formats:
        file = f"report.{name}"
        assert (tmp_path / "together" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()
    assert not list((tmp_path / "together").glob(".*"))


# Names


NAMES = ("../../x", "a/b", "a\0b", "a" * 300, "CON", "Lora", "lоra", "lora ", ".lora", "lora\n", "", "-rf")


@pytest.mark.fault(21)
@pytest.mark.parametrize("name", NAMES)
def test_no_name_of_a_method_leads_out_of_the_results(name, tmp_path):
    assert not NAME.fullmatch(name)
    record = fabricate.keep(tmp_path / "results", fabricate.record("lora"))
    file = tmp_path / "results" / record.spec.folder / RECORD
    value = json.loads(file.read_text())
    value["spec"]["method"] = name
    del value[SEAL]
    file.write_text(json.dumps(value))
    before = sorted(tmp_path.rglob("*"))
    records, [line] = Store(tmp_path / "results").load()
    assert not records and "is no method's name" in line
    assert sorted(tmp_path.rglob("*")) == before


# Models


class Hub(BaseHTTPRequestHandler):
    """It has one gated model, and nothing else."""

    def do_GET(self):
        gated = "/gated" in self.path
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *said):
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.fault(14)
def test_a_gated_model_is_told_with_the_way_to_its_licence(hub):
    said = str(unreachable_model("some/gated"))
    assert "is gated" in said and "hf auth login" in said
    assert "accept its licence at https://huggingface.co/some/gated" in said


@pytest.mark.fault(15)
def test_a_model_that_the_hub_lacks_and_a_hub_that_is_gone_are_told_apart(hub, monkeypatch):
    assert "is not on the hub, or is private" in str(unreachable_model("some/absent"))
    hub.shutdown()
    hub.server_close()
    said = str(unreachable_model("some/gated"))
    assert "cannot be reached" in said and "--model DIR" in said
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in str(unreachable_model("some/gated"))


EVIL = "from pathlib import Path\nPath({file!r}).touch()\nclass C: pass\n"


@pytest.mark.fault(33)
def test_neither_pickled_weights_nor_a_models_own_code_are_read(tmp_path):
    folder, ran = tmp_path / "model", tmp_path / "ran"
    folder.mkdir()
    config = {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "evil.py").write_text(EVIL.format(file=str(ran)))
    torch.save({"weight": torch.ones(2)}, folder / "pytorch_model.bin")
    problems = Problems()
    find_model(str(folder), problems)
    assert "has no .safetensors weights" in str(problems[0]) and "save_pretrained" in str(problems[0])
    spec = RunSpec("lora", 0, "model", {}, Hyperparams(), locations={"model": str(folder)})
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_base(spec, torch.float32, "cpu")
    (folder / "config.json").write_text(json.dumps(tiny.gemma().to_dict()))
    with pytest.raises(OSError, match="safetensors"):
        load_base(spec, torch.float32, "cpu")
    assert not ran.exists()


# The machine


@pytest.mark.fault(18)
def test_a_card_that_emulates_bf16_computes_in_fp32_or_not_at_all(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "computes_bf16", lambda: False)
    assert resolve_precision("auto") == resolve_precision("fp32") == "fp32"
    with pytest.raises(Unsupported, match=r"no bf16 arithmetic: use --set hp\.precision=fp32"):
        resolve_precision("bf16")


@pytest.mark.fault(16)
def test_without_a_gpu_a_run_asks_nothing_of_one(run, monkeypatch):  # noqa: F811
    """Its peaks are counted otherwise, and what only a card could tell is unknown, not 0."""

    def asked(*_, **__):
        raise AssertionError("of a card that is not there")

    for name in ("reset_peak_memory_stats", "max_memory_allocated", "max_memory_reserved", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, asked)
    record, _ = run("lora", "hp.max_steps=1")
    assert record.memory.peak > 0 and record.provenance.device == "cpu"
    assert {phase.peak_device for phase in record.phases.values()} == {None}
    assert {phase.joules for phase in record.phases.values()} == {None}


@pytest.mark.fault(31)
def test_a_clock_that_is_set_back_changes_no_duration(monkeypatch):
    days = (10**9 - 86400 * i for i in range(10**6))
    monkeypatch.setattr(time, "time", lambda: next(days))
    start = time.perf_counter()
    _, _, record = tiny.fit(Full(), tiny.hyperparams(max_steps=3), tiny.rows(24))
    passed = time.perf_counter() - start
    assert len(record.step_seconds) == 3 and all(0 < seconds < passed for seconds in record.step_seconds)


# Data and answers


@pytest.mark.fault(27)
def test_where_nothing_can_be_learned_it_is_told_before_a_step(run):  # noqa: F811
    record, folder = run("full", "hp.max_length=1", status="failed")
    assert "row is left" in record.error and "hp.max_length=1" in record.error
    assert not record.training and not (folder / "outputs.jsonl").exists()


@pytest.mark.fault(25, 32)
def test_an_answer_too_few_is_an_error_and_no_other_score(monkeypatch):
    made, rows = tiny.run(method=Full(), hp=tiny.hyperparams(max_new_tokens=2)), tiny.rows(3)
    own = made.decoder.answers
    monkeypatch.setattr(made.decoder, "answers", lambda *given: own(*given)[1:])
    monkeypatch.setattr(made.template, "question", lambda example, _: example)
    with pytest.raises(ValueError, match="zip"):
        evaluation.test(tiny.model(), made, rows)


# Trainings


class Leaps(Method):
    calls = 0

    def loss(self, model, batch, run):  # noqa: F811
        self.calls += 1
        return super().loss(model, batch, run) * (20 if self.calls == 3 else 1)


@pytest.mark.fault(7)
def test_a_loss_that_leaps_is_told():
    hp = tiny.hyperparams(max_steps=4)
    [warning] = stages.leaps(tiny.fit(Leaps(), hp, tiny.rows(32))[2])
    assert "times its first at step 3 of 4" in warning and "hp.learning_rate" in warning
    assert stages.leaps(tiny.fit(Full(), hp, tiny.rows(32))[2]) == []


STRAY = """import random, sys
random.seed({0}), sys.modules["numpy"].random.seed({0}), sys.modules["torch"].manual_seed({0})
"""


@pytest.mark.fault(28)
def test_a_plugin_that_draws_from_everybodys_generator_disturbs_nobody(run, monkeypatch):  # noqa: F811
    monkeypatch.setattr(trial, "tried", lambda *_: [])  # a process for each would take a second
    losses = []
    for number in (1, 2):
        random.seed(number)
        record, _ = run("stray", "hp.max_steps=2", code=STRAY.format(number) + BITFIT)
        losses.append(tiny.losses(record))
    assert losses[0] == losses[1]
