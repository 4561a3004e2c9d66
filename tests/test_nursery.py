"""Runs as copies of a nursery: as fresh as an interpreter's, and as well looked after; runs side by side."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import fabricate
import pytest
import torch
from test_bench import begin, child, nursery, stub, until  # noqa: F401

from harness import machine
from harness import nursery as nurseries
from harness.bench import places
from harness.bench.attempt import Slot, Terms, run
from harness.bench.loop import Crew
from harness.cli.progress import Lines
from harness.cli.remaining import Remaining
from harness.forks import in_a_copy
from harness.nursery import Fresh, Nursery
from harness.plan import Plan
from harness.record import RunRecord
from harness.store import Store

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no process is copied elsewhere")
STATE = """
import json, resource, threading
fds = {os.readlink(f"/proc/self/fd/{fd}").partition(":")[0] for fd in (0, 1, 2)}
state = {
    "cwd": os.getcwd(), "arguments": [Path(a).name for a in sys.argv[1:]], "path": sys.path,
    "files": sorted(fds),
    "leads": [os.getsid(0) == os.getpid(), os.getpgrp() == os.getpid()], "threads": threading.active_count(),
    "tasks": len(os.listdir("/proc/self/task")), "cores": sorted(os.sched_getaffinity(0)),
    "signals": [str(signal.getsignal(n)) for n in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)],
    "blocked": [str(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
    "limits": resource.getrlimit(resource.RLIMIT_NOFILE), "nice": os.nice(0), "umask": os.umask(0o22),
    "environment": {k: v for k, v in os.environ.items()
                    if k not in ("TUNEOFF_RUN", "PYTHONPATH", "PYTEST_CURRENT_TEST")},
    "open": sum(1 for fd in range(3, 64) if os.path.exists(f"/proc/self/fd/{fd}")),
}
raise KeyError("state" + json.dumps(state))
"""


def state(folder: Path, start) -> dict:
    folder.mkdir()
    _, run = child(folder, "from pathlib import Path\n" + STATE, 60, start)
    told = next(line for line in (run / "log.txt").read_text().splitlines() if line.startswith("KeyError"))
    found = json.loads(told[told.index("{") : told.rindex("}") + 1].encode().decode("unicode_escape"))
    found["path"] = [entry for entry in found["path"] if "stubs" not in entry and str(folder) not in entry]
    return found


def test_a_copy_finds_what_a_fresh_process_finds(nursery, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("PYTHONPATH", "")
    fresh, copied = state(tmp_path / "fresh", Fresh), state(tmp_path / "copied", nursery.child)
    assert copied == fresh


DAEMON = """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(1); os.close(2)
        open({file!r}, "w").write(str(os.getpid()))
        time.sleep(99)
    os._exit(0)
while not os.path.exists({file!r}) or not open({file!r}).read(): time.sleep(0.01)
"""


@pytest.mark.fault(43)
def test_what_a_copy_has_forked_off_ends_with_it(nursery, tmp_path):  # noqa: F811
    """It has no environment of its own to be known by, is in no group of the run's and no child of it."""
    file = tmp_path / "daemon"
    child(tmp_path, DAEMON.format(file=str(file)), 60, nursery.child)
    assert not Path(f"/proc/{file.read_text()}").exists()


def test_a_run_whose_nursery_is_killed_is_interrupted_and_the_next_is_fresh(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(stub(tmp_path)))
    with Nursery({}) as own:
        kill = f"os.kill({own.process.pid}, signal.SIGKILL); time.sleep(99)"
        record, folder = child(tmp_path, kill, 60, own.child)
        assert record.status == "interrupted" and "killed from outside" in record.error
        own.process.wait()
        record, _ = child(tmp_path, "raise KeyError(os.environ['TUNEOFF_RUN'])", 60, own.child)
        assert str(tmp_path) in (folder / "log.txt").read_text() and record.status == "failed"


def test_a_nursery_ends_with_its_bench_and_leaves_nobody(tmp_path):
    code = (
        "import sys, time; from harness.nursery import Nursery\n"
        "nursery = Nursery({}); print(nursery.process.pid, flush=True); time.sleep(99)"
    )
    bench_of = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(nurseries.ROOT), str(stub(tmp_path))])},
    )  # fmt: skip
    pid = int(bench_of.stdout.readline())
    bench_of.kill()
    bench_of.wait()
    until(lambda: not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_text())


# The card


def test_what_an_import_asks_of_the_card_is_asked_in_a_copy(monkeypatch):
    asked = []

    def capability(device=None):
        asked.append(device)
        return (9, getattr(device, "idx", device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: asked.append("available") or True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    with nurseries.card_is_asked_in_a_copy() as found:
        assert torch.cuda.is_available() and torch.cuda.device_count() == 2
        assert torch.cuda.get_device_capability() == found[0] == (9, 0)
        assert [torch.cuda.get_device_capability(torch.cuda.device(i)) for i in range(2)] == found
        assert torch.cuda.get_device_capability(torch.device("cuda", 1)) == (9, 1)
        assert not asked, "of the card itself"
    assert torch.cuda.get_device_capability is capability and torch.cuda.is_available() and asked


@pytest.mark.skipif(torch.cuda.is_available(), reason="other tests of this process have asked for the card")
def test_who_has_threads_is_not_copied():
    assert in_a_copy(lambda: str(nurseries.uncopyable()).encode(), 30) == b"None"

    def beside_a_thread() -> bytes:
        threading.Thread(target=time.sleep, args=[9], daemon=True).start()
        return str(nurseries.uncopyable()).encode()

    assert in_a_copy(beside_a_thread, 30).startswith(b"an import has started threads")


def test_who_has_asked_for_the_card_is_not_copied(monkeypatch):
    """As torch finds it out: what has asked is marked in its copies."""
    here = os.getpid()
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: os.getpid() != own)

    def asked() -> bytes:
        nonlocal own
        own = os.getpid()
        return str(nurseries.uncopyable()).encode()

    own = here
    assert in_a_copy(asked, 30).startswith(b"a copy of it cannot use the card")


# Side by side


def specs(count: int) -> list:
    return [fabricate.record("lora", seed).spec for seed in range(count)]


class Slots:
    """Of this machine, with `one(spec, slot, signals)` in place of a run."""

    def __init__(self, count: int, one):
        self.free, self.one = [Slot(cores=(core,), of=count) for core in range(count)], one

    def more(self, specs):
        new, self.free = self.free, []
        return new

    def run(self, spec, place, signals, begun):
        begun()
        return self.one(spec, place, signals)


def together(count: int, places: Slots) -> list:
    """What runs of the seeds up to a count give, in the order of their ends."""
    with Crew(places, lambda spec: None, lambda spec: 0.0) as crew:
        crew.add(specs(count))
        return [crew.next() for _ in range(count)]


def test_as_many_runs_go_at_once_as_there_are_slots_each_in_a_slot_of_its_own():
    met, used, busy = threading.Barrier(2, timeout=30), [], []

    def one(spec, slot, signals):
        assert slot.cores not in busy
        busy.append(slot.cores)
        assert len(busy) <= 2
        met.wait()  # that another is under way
        used.append((spec.seed, slot.cores))
        met.wait()
        busy.remove(slot.cores)
        return spec.seed

    ended = [(spec.seed, record) for spec, record in together(6, Slots(2, one))]
    assert sorted(ended) == [(seed, seed) for seed in range(6)]
    assert [{seed for seed, _ in used[i : i + 2]} for i in (0, 2, 4)] == [{0, 1}, {2, 3}, {4, 5}]
    assert all({cores for _, cores in used[i : i + 2]} == {(0,), (1,)} for i in (0, 2, 4))


def test_after_a_signal_no_other_run_begins_and_those_under_way_are_awaited():
    begun, ended, met = [], [], threading.Barrier(2, timeout=30)

    def one(spec, slot, signals):
        begun.append(spec.seed)
        met.wait()
        if spec.seed == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        while not signals:
            time.sleep(0.01)
        ended.append(spec.seed)
        return None

    with pytest.raises(KeyboardInterrupt) as raised:
        together(5, Slots(2, one))
    assert raised.value.args == (signal.SIGTERM,)
    assert sorted(begun) == sorted(ended) == [0, 1]


def test_after_a_fault_no_other_run_begins():
    begun = []

    def one(spec, slot, signals):
        begun.append(spec.seed)
        if spec.seed == 1:
            raise OSError(28, "No space left on device")
        return None

    with pytest.raises(OSError, match="No space"):
        together(9, Slots(1, one))
    assert begun == [0, 1]


GIB = 2**30
PLACES = {  # threads of a run, a card, cores by their twins, free GiB, GiB of the model -> slots' cores
    "two cores": (1, False, [[0], [1]], 16, 0.1, [(0,), (1,)]),
    "a card": (1, True, [[0], [1]], 16, 0.1, [()]),
    "twins are one core": (1, False, [[0, 1]], 16, 0.1, [()]),
    "two pairs of twins": (1, False, [[0, 2], [1, 3]], 16, 0.1, [(0, 2), (1, 3)]),
    "all cores but one": (3, False, [[0], [1], [2], [3]], 16, 0.1, [()]),
    "half of them": (2, False, [[0], [1], [2], [3]], 16, 0.1, [(0, 1), (2, 3)]),
    "never more than two": (1, False, [[0], [1], [2], [3]], 64, 0.1, [(0,), (1,)]),
    "little memory": (1, False, [[0], [1]], 5, 0.1, [()]),
    "a large model": (1, False, [[0], [1]], 16, 2, [()]),
    "unknown threads": (None, False, [[0], [1]], 16, 0.1, [()]),
}


@pytest.mark.parametrize("case", PLACES)
def test_a_slot_has_cores_and_memory_of_its_own(case, tmp_path, monkeypatch):
    threads, card, cores, free, size, expected = PLACES[case]
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(int(size * GIB))
    monkeypatch.setattr(machine, "physical_cores", lambda: cores)
    monkeypatch.setattr(machine, "free_bytes", lambda: free * GIB)
    monkeypatch.setattr(machine, "quota", lambda: float("inf"))
    plan = Plan([replace(specs(1)[0], locations={"model": str(tmp_path)})], [0])
    found = places.slots(SimpleNamespace(threads=threads, card=card, child=None), plan)
    assert [slot.cores for slot in found] == expected
    assert {slot.of for slot in found} == {len(expected)}


def test_a_run_keeps_to_the_cores_of_its_slot_and_its_record_says_how_many_went_at_once(begin, tmp_path):  # noqa: F811
    core = min(machine.cores())
    (tmp_path / "plugin.py").write_text("raise KeyError(sorted(__import__('os').sched_getaffinity(0)))")
    spec = replace(specs(1)[0], method="plugin", locations={"plugins": [str(tmp_path / "plugin.py")]})
    store = Store(tmp_path / "results")
    slot = Slot(begin, (core,), 2)
    record = run(spec, Terms(store, "", SimpleNamespace(event=lambda *_: None)), slot)
    assert record.error.endswith(f"[{core}]")
    assert len(record.started) == len("2026-01-31T12:00:00.000000+00:00"), (
        "runs side by side keep their order"
    )
    assert record.provenance.at_once == 2
    assert RunRecord.from_json(record.to_json()).provenance.at_once == 2


def test_lines_of_runs_side_by_side_name_their_run():
    screen = StringIO()
    lines = Lines(screen, Remaining(Plan([], [0])))
    first, second = specs(2)
    lines.start(first, 1, 2)
    lines.start(second, 2, 2)
    for step in (50, 100):
        for spec in (second, first):
            lines.event(spec, {"step": step, "steps": 100, "loss": 1.0})
    lines.end(fabricate.record("lora", 1), False)
    said = screen.getvalue().splitlines()
    assert [line.partition(":")[0] for line in said] == [
        "[1/2] lora, seed 0", "[2/2] lora, seed 1", *["[2/2] lora, seed 1", "[1/2] lora, seed 0"] * 2,
        "lora, seed 1", "1 of 2 runs done",
    ]  # fmt: skip


def test_free_memory_is_what_a_container_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    free = machine.free_bytes()
    assert free and free > GIB // 4
    (tmp_path / "memory.max").write_text("300000000\n")
    (tmp_path / "memory.current").write_text("100000000\n")
    assert machine.free_bytes() == 200_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_bytes() > GIB // 4


def test_twins_of_one_core_stand_together():
    assert sorted(core for twins in machine.physical_cores() for core in twins) == sorted(machine.cores())
