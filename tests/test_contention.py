"""A training that was disturbed is told: by counters of known machines, and beside a true neighbour."""

import random
import subprocess
import sys
import threading
import time
from math import inf

import pytest
import torch

from harness import machine
from harness.measuring.contention import Contention, Counters, Glance, drifting
from harness.measuring.meter import Meter

GIB = 2**30
SPIN = "import time\nwhile time.process_time() < {}: pass"  # CPU seconds of a process of its own


def trained(monkeypatch, *parts, cores=4, quota=inf, cuda=False) -> list[str]:
    """What is said of a training of such parts: seconds, and CPU seconds a second of the run's own processes,
    of others and of a hypervisor's other machines. Each second part is not of the training."""
    monkeypatch.setattr(machine, "cores", lambda: set(range(cores)))
    monkeypatch.setattr(machine, "quota", lambda: quota)
    now = Counters(1000.0, 500.0, 5.0, 50.0)
    monkeypatch.setattr(Counters, "now", lambda: Counters(**vars(now)))
    watched = Contention(cuda)
    for number, (seconds, own, others, *stolen) in enumerate(parts):
        if number % 2 == 0:
            watched.open()
        now.add(Counters(), Counters(seconds, (own + others) * seconds, sum(stolen) * seconds, own * seconds))
        watched.close()
    return watched.reasons([])


# The cores


@pytest.mark.parametrize(("cores", "share"), [(2, 0.04), (2, 0.06), (64, 0.04), (64, 0.06)])
def test_others_that_take_more_than_a_twentieth_of_what_the_run_could_use_are_told(monkeypatch, cores, share):
    told = trained(monkeypatch, (60.0, 1.0, share * cores), cores=cores)
    assert bool(told) == (share > 0.05)
    if told:
        assert told == [
            "other processes took 6% of the processor time that the run could use "
            f"({0.06 * cores * 60:.1f} of {cores * 60:.1f} s)"
        ]


def test_the_runs_own_work_disturbs_nobody_however_much_it_is(monkeypatch):
    assert trained(monkeypatch, (60.0, 4.0, 0.0)) == []


def test_what_is_not_timed_does_not_count(monkeypatch):
    """As the evaluation between: the parts with odd numbers."""
    assert trained(monkeypatch, (30.0, 1.0, 0.0), (60.0, 1.0, 3.0), (30.0, 1.0, 0.0)) == []
    (told,) = trained(monkeypatch, (30.0, 1.0, 2.0), (600.0, 1.0, 0.0), (30.0, 1.0, 0.0))
    assert "took 25%" in told


def test_a_hypervisor_that_gives_the_cores_to_others_is_told(monkeypatch):
    (told,) = trained(monkeypatch, (60.0, 2.0, 0.0, 0.5))
    assert told.startswith("other machines on this host took 12%")


def test_who_may_use_a_part_of_the_cores_is_disturbed_where_others_leave_less_than_that(monkeypatch):
    """A container with two of 16 cores' time, and a run on a GPU, which can use two."""
    for limits in ({"quota": 2.0}, {"cuda": True}):
        assert trained(monkeypatch, (60.0, 2.0, 13.0), cores=16, **limits) == []
        (told,) = trained(monkeypatch, (60.0, 1.0, 15.0), cores=16, **limits)
        assert "took 50%" in told and "of 120.0 s" in told


def test_a_count_of_hundredths_of_a_second_marks_no_short_training(monkeypatch):
    assert trained(monkeypatch, (1.0, 1.0, 0.25)) == []


def test_a_system_that_does_not_count_says_nothing_rather_than_undisturbed(monkeypatch):
    monkeypatch.setattr(machine, "busy_seconds", lambda: None)
    watched = Contention(False)
    watched.open()
    watched.close()
    assert watched.reasons([1.0] * 90) is None


@pytest.mark.parametrize(("files", "cores"), [
    ({"cpu.max": "150000 100000\n"}, 1.5), ({"cpu.max": "max 100000\n"}, inf), ({}, inf),
    ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4.0),
    ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, inf),
])  # fmt: skip
def test_a_containers_quota_is_read_in_cores(monkeypatch, tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "GROUPS", tmp_path)
    assert machine.quota() == cores


# The card


def glanced(*glances) -> list[str]:
    watched = Contention(True)
    watched.known, watched.glances = True, list(glances)
    return watched.reasons([])


@pytest.mark.fault(29)
def test_a_card_that_others_use_or_that_heat_slows_is_told():
    quiet, clocks = Glance(GIB // 2, set(), (1980, 1980)), (1200, 1980)
    assert glanced(*[quiet] * 100) == []
    assert glanced(*[quiet] * 96, *[Glance(9 * GIB, {"heat"}, clocks)] * 4) == []
    assert glanced(*[quiet] * 90, *[Glance(9 * GIB, set(), clocks)] * 10) == [
        "other programs held up to 9.0 GiB of the card in 10% of the seconds"
    ]
    slow = [Glance(0, {"heat"}, (1500, 1980)), Glance(0, {"the hardware", "heat"}, clocks)]
    assert glanced(*[quiet] * 8, *slow) == [
        "heat and the hardware slowed the card in 20% of the seconds, down to 1,200 of 1,980 MHz"
    ]


# The steps


def test_even_steps_drift_by_chance_in_one_training_of_a_thousand():
    draw = random.Random(0)
    told = [drifting([draw.lognormvariate(0, 0.4) for _ in range(100)]) for _ in range(1000)]
    assert sum(map(bool, told)) <= 4  # of 1 that is expected, 5 or more have a chance of 0.4 %
    assert not any(drifting([draw.random() for _ in range(count)]) for count in range(9))


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_steps_that_grow_slower_or_faster_are_told(factor):
    pace = [1 + 0.01 * (i % 5) for i in range(90)]
    assert drifting(pace) == drifting(pace[:45] + [1.16 * second for second in pace[45:]]) == []
    (told,) = drifting(pace[:45] + [second * factor for second in pace[45:]])
    assert f"{factor:.2f} times as long" in told


def test_a_few_long_steps_are_no_drift():
    assert drifting([1.0, 1.01] * 40 + [50.0] * 3) == []


# A machine that is there


linux = pytest.mark.skipif(machine.busy_seconds() is None, reason="this system does not count")


@linux
def test_what_this_process_its_threads_and_its_children_work_is_its_own():
    def spin():
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass

    start = Counters.now()
    spin()
    thread = threading.Thread(target=spin)
    thread.start()
    thread.join()
    subprocess.run([sys.executable, "-c", SPIN.format(0.2)], check=True)
    counted = Counters()
    counted.add(start, Counters.now())
    assert 0.55 < counted.own < counted.busy + 0.1  # the machine has counted it too, in hundredths


@pytest.mark.fault(47)
@linux
def test_a_busy_neighbour_marks_a_training_and_only_a_training():
    """More neighbours than cores: whatever else is running here, they take more than a twentieth."""
    meter = Meter(torch.device("cpu"))
    command = [sys.executable, "-c", SPIN.format(60)]
    neighbours = [subprocess.Popen(command) for _ in machine.cores()]
    try:
        time.sleep(0.5)
        with meter.phase("evaluate"):
            time.sleep(0.5)
        assert meter.contention.reasons([]) is None
        with meter.phase("train"):
            time.sleep(0.01)
            with meter.phase("validate"):
                time.sleep(0.5)
        assert meter.contention.reasons([]) == []
        with meter.phase("train"):
            time.sleep(0.5)
        assert "other processes took" in meter.contention.reasons([])[0]
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


@linux
def test_the_bench_that_waits_for_a_run_is_no_neighbour(monkeypatch):
    with subprocess.Popen([sys.executable, "-c", SPIN.format(60)]) as bench:
        time.sleep(1.0)
        alone = Counters.now()
        monkeypatch.setenv("TUNEOFF_BENCH", str(bench.pid))
        assert Counters.now().own - alone.own > 0.1
        bench.kill()


def test_a_border_costs_less_than_a_step():
    started = time.process_time()
    for _ in range(100):
        Counters.now()
    assert (time.process_time() - started) / 100 < 0.005  # seconds
