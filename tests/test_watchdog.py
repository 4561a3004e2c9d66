"""A run that would not end by itself is ended, with its status, and says where it was; others go on."""

import signal
import subprocess
import sys
import time

import pytest
from test_bench import child, nursery  # noqa: F401

from harness import machine, watchdog
from harness.bench import attempt
from harness.watchdog import Watchdog, watching

TELLS = "open(sys.argv[1] + '/events.jsonl', 'a', 1).write('{\"step\": 1}\\n')\n"
WORKS = f"for step in range(40):\n    {TELLS}    time.sleep(0.1)\n"
WAITS = (
    "import threading\ndef waits_for_a_lock(): threading.Lock().acquire() and threading.Event().wait(99)\n"
)
HANGS = f"{WAITS}waits_for_a_lock()"


@pytest.mark.fault(30, 49)
@pytest.mark.parametrize("case", ["works", "hangs", "is deaf", "hangs in an import"])
def test_a_run_without_progress_is_ended_and_says_where_it_was(case, nursery, tmp_path, monkeypatch):  # noqa: F811
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" * (case == "is deaf")
    code = {"works": WORKS, "hangs in an import": HANGS}.get(case, TELLS + deaf + HANGS)
    monkeypatch.setattr(watchdog, "START_SECONDS", 2.5)
    monkeypatch.setattr(attempt, "GRACE_SECONDS", 1 if deaf else 30)
    stall = 60 if "import" in case else 2.5
    record, folder = child(tmp_path, code, None, nursery.child, stall=stall)
    if case == "works":  # for longer
        assert record.status == "failed" and "the end" in record.error
        return
    assert record.status == "timeout" and "log.txt ends with where it was" in record.error
    assert ("an import may hang" in record.error) == ("import" in case)
    assert "in waits_for_a_lock" in (folder / "log.txt").read_text()


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(watchdog, "time", Clock())
    monkeypatch.setattr(machine, "free_bytes", lambda: None)
    return watchdog.time


def looks(dog: Watchdog, clock: Clock, seconds: float):
    """A look a second for so long. -> the first end that one gives."""
    for _ in range(int(seconds)):
        clock.now += 1
        if end := dog.look():
            return end
    return None


def test_a_machine_that_slept_was_not_silent(clock):
    dog = Watchdog(1, None, 3600)
    dog.heard()
    assert not looks(dog, clock, 3500)
    clock.now += 9 * 3600  # a closed lid, a paused container
    assert not looks(dog, clock, 90)
    assert looks(dog, clock, 20).status == "timeout"


@pytest.mark.parametrize(
    ("stall", "heard", "seconds"),
    [(3600, True, 3600), (3600, False, 600), (60, False, 60), (0, True, None), (0, False, None)],
)
def test_how_long_a_run_may_be_silent(stall, heard, seconds, clock):
    dog = Watchdog(1, None, stall)
    if heard:
        dog.heard()
    end = looks(dog, clock, 10_000)
    assert (clock.now == seconds + 1) if seconds else end is None


# Main memory

GIB = 2**30


@pytest.mark.fault(5)
def test_near_the_end_of_memory_the_largest_run_is_ended_and_no_small_one(tmp_path, monkeypatch):
    large = f"block = bytearray({watchdog.NEAR_BYTES} + 2**25)\ntime.sleep(60)"
    monkeypatch.setattr(machine, "free_bytes", lambda: 100 * 2**20)
    with watching(1, None, 0) as small:
        record, folder = child(tmp_path, large)
        assert small.starved() is None
    assert record.status == "oom_host" and "as main memory was down to 100 MiB" in record.error
    assert "hp.micro_batch_size" in record.error and not watchdog.UNDER_WAY
    assert "KeyboardInterrupt" not in (folder / "log.txt").read_text(), "there is no memory to ask it with"


def test_of_two_the_larger_one_is_ended(monkeypatch):
    monkeypatch.setattr(machine, "free_bytes", lambda: 2**20)
    monkeypatch.setattr(machine, "resident_bytes", lambda process: process * GIB)
    with watching(2, None, 0) as second, watching(3, None, 0) as third:
        assert second.starved() is None and third.starved().status == "oom_host"
    monkeypatch.setattr(machine, "free_bytes", lambda: GIB)
    assert third.starved() is None


MEMORY = {  # what a group's files say, by its version -> bytes that it leaves
    "second": ({"max": "5000", "current": "4500",
                "stat": "anon 100\nactive_file 1000\ninactive_file 2000\n"}, 3500),
    "first": ({"limit_in_bytes": "5000", "usage_in_bytes": "4500",
               "stat": "active_file 7\ntotal_active_file 1000\ntotal_inactive_file 2000\n"}, 3500),
    "no limit": ({"max": "max", "current": "4500"}, float("inf")),
    "no stat": ({"max": "5000", "current": "4500"}, 500),
}  # fmt: skip


@pytest.mark.parametrize("case", MEMORY)
def test_files_that_were_read_take_no_memory_from_a_group(case, tmp_path):
    files, expected = MEMORY[case]
    for name, text in files.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.left_in(tmp_path) == expected


def test_a_limit_above_a_processs_own_group_counts(tmp_path, monkeypatch):
    """As Slurm sets it: of the job, not of the step."""
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    monkeypatch.setattr(
        machine.Path, "read_text", reading(machine.Path.read_text, "0::/job_1/step_0/task_0\n")
    )
    (tmp_path / "job_1/step_0").mkdir(parents=True)
    (tmp_path / "job_1/memory.max").write_text("300000")
    (tmp_path / "job_1/memory.current").write_text("100000")
    assert machine.free_bytes() == 200_000


def reading(own, groups: str):
    return lambda path, *more: groups if str(path) == "/proc/self/cgroup" else own(path, *more)


def test_resident_memory_is_of_the_process_that_is_asked():
    process = subprocess.Popen(
        [sys.executable, "-c", f"b = bytearray({GIB // 4}); input()"], stdin=subprocess.PIPE
    )
    end = time.monotonic() + 30
    while machine.resident_bytes(process.pid) < GIB // 4 and time.monotonic() < end:
        time.sleep(0.05)
    assert GIB // 4 < machine.resident_bytes(process.pid) < GIB // 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert machine.resident_bytes(process.pid) == 0
