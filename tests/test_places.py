"""Where runs go: cards of this machine, an engine's tasks; who writes a run; which is begun first."""

import ast
import json
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import fabricate
import pytest
from test_bench import stub
from test_cli import BITFIT

from harness import claims, machine
from harness.bench import attempt, loop, places, ray, remote, slurm
from harness.claims import Claim, Superseded
from harness.cli import main
from harness.errors import BadRequest
from harness.nursery import THREADS
from harness.plan import Plan, expected_seconds
from harness.record import Phase, RunRecord, Sizes
from harness.report.certificate import apart
from harness.spec import Hyperparams, RunSpec
from harness.store import Store

FIRST, SECOND, HALVES = "GPU-aaaa-1", "GPU-bbbb-2", ["MIG-cccc-3", "MIG-dddd-4"]


class Silent:
    start = event = end = lambda *_: None


# The cards of this machine


class NVML(SimpleNamespace):
    """A driver that knows two whole cards and, between them, one that is divided."""

    class NVMLError(Exception):
        pass

    cards = (FIRST, HALVES, SECOND)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.cards[index]

    def nvmlDeviceGetUUID(self, card):
        return card if isinstance(card, str) else "GPU-divided"

    def nvmlDeviceGetMaxMigDeviceCount(self, card):
        if isinstance(card, str):
            raise self.NVMLError("not supported")
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, card, index):
        if index not in (0, 4):
            raise self.NVMLError("not found")
        return card[index // 4]


VISIBLE = {  # CUDA_VISIBLE_DEVICES -> the cards, as CUDA reads it
    None: [FIRST, *HALVES, SECOND],
    "2,0": [SECOND, FIRST],
    "1": HALVES,
    "GPU-bb, MIG-dddd-4": [SECOND, HALVES[1]],
    "0,-1,2": [FIRST],
    "0,7,2": [FIRST],
    "": [],
}


@pytest.mark.parametrize("visible", VISIBLE)
def test_the_cards_are_those_that_cuda_would_see_by_their_own_names(visible, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", NVML())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.cards() == VISIBLE[visible]


def test_cards_are_chosen_by_number_or_name_and_all_that_is_wrong_is_told(monkeypatch):
    monkeypatch.setattr(machine, "cards", lambda: [FIRST, SECOND, *HALVES])
    assert places.chosen_cards(["all"]) == [FIRST, SECOND, *HALVES]
    assert places.chosen_cards(["3", "0", "GPU-b"]) == [HALVES[1], FIRST, SECOND]
    with pytest.raises(BadRequest) as raised:
        places.chosen_cards(["7", "GPU", "1", "GPU-b", "x"])
    told = [str(problem) for problem in raised.value.problems]
    wrong = [
        "'7' is no card",
        "'GPU' is the beginning of several",
        "'GPU-b' is named twice",
        "'x' is no card",
    ]
    assert all(what in line for what, line in zip(wrong, told, strict=True)) and f"0 ({FIRST})" in told[0]


@pytest.mark.parametrize("typed, says", [
    (["--gpus", "all"], "no NVIDIA card answers"), (["--on", "dask"], "unknown engine 'dask'"),
    (["--on", "ray", "--gpus", "0"], "leave it out"), (["--on", "slurm:x"], "unknown engine"),
    (["--on", "ray"], "pip install 'tuneoff[ray]'"),
])  # fmt: skip
def test_a_place_that_is_not_there_is_refused(typed, says, monkeypatch, capsys):
    monkeypatch.setattr(machine, "cards", lambda: [])
    monkeypatch.setattr(places.packages, "found", lambda name: None)
    assert main(["--methods", "lora", *typed]) == 2
    assert says in capsys.readouterr().err


def plan_of(count: int, **changes) -> Plan:
    return Plan(
        [replace(fabricate.record("lora", seed).spec, **changes) for seed in range(count)], range(count)
    )


def test_each_card_has_its_share_of_the_cores_and_all_have_as_many(monkeypatch):
    monkeypatch.setattr(machine, "physical_cores", lambda: [[i, i + 9] for i in range(9)])
    cards = [FIRST, SECOND, *HALVES]
    found = places.sharing(cards, plan_of(1))
    assert [slot.cards for slot in found] == [(card,) for card in cards] and {slot.of for slot in found} == {
        4
    }
    assert [len(slot.cores) for slot in found] == [4] * 4
    assert len(set().union(*(slot.cores for slot in found))) == 16, "none has another's"
    assert all(core + 9 in slot.cores for slot in found for core in slot.cores if core < 9), "twins together"
    assert [(slot.cards, slot.cores) for slot in places.sharing([SECOND], plan_of(1))] == [((SECOND,), ())]
    monkeypatch.setattr(machine, "physical_cores", lambda: [[0], [1]])
    assert [slot.cores for slot in places.sharing(cards, plan_of(1))] == [()] * 4
    monkeypatch.setattr(places, "devices", lambda plan: 2)
    assert [slot.cards for slot in places.sharing([*cards, "GPU-e"], plan_of(1))] == [
        (FIRST, SECOND),
        tuple(HALVES),
    ]
    with pytest.raises(BadRequest, match=r"hp\.devices=2 takes more cards than 1"):
        places.sharing([FIRST], plan_of(1))


TELLS = """
import json, os, time
folder, own = os.environ.get("MEETING"), os.environ.get("CUDA_VISIBLE_DEVICES")
if "TUNEOFF_BENCH" in os.environ and folder:
    open(os.path.join(folder, f"{own}-{time.time()}"), "w").close()
    while len({name.rpartition("-")[0] for name in os.listdir(folder)}) < 2: time.sleep(0.01)
    raise KeyError(json.dumps([own, sorted(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS")]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="no process is kept to its cores elsewhere")
def test_runs_on_several_cards_see_one_each_and_know_of_each_other(tmp_path, monkeypatch):
    """Four runs on two cards; none goes on before both cards have been used."""
    (tmp_path / "plugin.py").write_text(BITFIT + TELLS)
    (tmp_path / "meeting").mkdir()
    monkeypatch.setenv("PYTHONPATH", str(stub(tmp_path)))
    monkeypatch.setenv("MEETING", str(tmp_path / "meeting"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setitem(THREADS, "OMP_NUM_THREADS", "77")
    monkeypatch.setattr(claims, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(places, "needs", lambda plan: {})
    twelve = dict(THREADS)
    specs = [RunSpec("plugin", seed, "none", {}, Hyperparams()) for seed in range(4)]
    plan = Plan([replace(s, locations={"plugins": [str(tmp_path / "plugin.py")]}) for s in specs], range(4))
    terms = "", Silent(), False, None, 0.0
    done = list(
        loop.bench(plan, Store(tmp_path / "r"), *terms, where=partial(places.here, cards=[FIRST, SECOND]))
    )
    records = [ended.record for ended in done]
    said = [
        json.loads(r.error[r.error.index("[") : r.error.rindex("]") + 1].replace("\\", "")) for r in records
    ]
    assert {card for card, _, _ in said} == {FIRST, SECOND} and twelve == THREADS
    share = len(machine.physical_cores()) // 2
    cores = {card: set(own) for card, own, _ in said}
    if share:
        assert not cores[FIRST] & cores[SECOND] and len(cores[FIRST]) == len(cores[SECOND])
        assert {threads for _, _, threads in said} == {str(max(1, len(cores[FIRST]) - 1))}
    assert {r.provenance.at_once for r in records} == {2}
    beside = {r.spec.folder: set(r.beside) for r in records}
    assert all(run in beside[other] for run in beside for other in beside[run]) or len(beside) == 4
    assert any(beside.values()) and all(run not in others for run, others in beside.items())
    assert not list((tmp_path / "r").glob(".*.claim"))


# Which is first


def timed(method: str, seconds: float, **changes) -> RunRecord:
    record = fabricate.record(method, **changes)
    record.phases = {"train": Phase(seconds=seconds)}
    return record


def test_a_run_takes_as_long_as_those_of_its_method_for_each_token():
    spec = fabricate.record("lora").spec
    double = replace(
        spec, dataset=spec.dataset | {"train": 2 * spec.dataset["train"], "test": 2 * spec.dataset["test"]}
    )
    known = [timed("lora", s, seed=n) for n, s in enumerate((90.0, 100.0, 500.0))] + [timed("full", 7000.0)]
    assert expected_seconds(spec, known) == pytest.approx(100)
    assert expected_seconds(double, known) == pytest.approx(200, rel=1e-6)
    assert expected_seconds(fabricate.record("galore").spec, known) == pytest.approx(300), "the median of all"
    assert expected_seconds(double, []) > expected_seconds(spec, []) > 0
    assert expected_seconds(replace(spec, dataset={}), known) > 0


class Fixed:
    """So many places, where runs take as long as a table says, in which time is a number."""

    def __init__(self, count: int, one):
        self.free, self.one = [object() for _ in range(count)], one

    def more(self, specs):
        new, self.free = self.free, []
        return new

    def run(self, spec, place, signals, begun):
        begun()
        return self.one(spec)


@pytest.mark.parametrize("count", [1, 2])
def test_of_several_places_the_longest_run_is_first_and_one_place_keeps_the_order(count):
    order, turn = [], threading.Barrier(count, timeout=30)

    def one(spec):
        turn.wait()
        order.append(spec.seed)
        turn.wait()
        return spec.seed

    specs = list(plan_of(6))
    times = {0: 1, 1: 5, 2: 9, 3: 5, 4: 8, 5: 9}
    with loop.Crew(Fixed(count, one), lambda spec: None, lambda spec: times[spec.seed]) as crew:
        crew.add(specs)
        for _ in specs:
            crew.next()
    pairs = [set(order[i : i + count]) for i in range(0, 6, count)]
    assert pairs == ([{n} for n in range(6)] if count == 1 else [{2, 5}, {4, 1}, {3, 0}])


def test_a_search_goes_on_while_another_ones_trial_is_under_way(tmp_path, monkeypatch):
    """A plan of two chains of three; the second chain's first run ends when all of the first chain have."""
    specs, ended = list(plan_of(6)), threading.Event()

    class Chains:
        def upcoming(self, done):
            chains = [[s for s in specs if s.seed % 2 == odd and s.digest not in done][:1] for odd in (0, 1)]
            return list(chain(*chains))

        def total(self, done, stage):
            return 6

    def one(spec):
        if spec.seed == 4:
            ended.set()
        if spec.seed == 1:
            assert ended.wait(30)
        return fabricate.record("lora", spec.seed)

    monkeypatch.setattr(loop, "located", lambda spec, *_: spec)
    monkeypatch.setattr(loop, "cached", lambda *_: None)

    @contextmanager
    def two(*_):
        yield Fixed(2, one)

    done = [d.record.spec.seed for d in loop.bench(Chains(), Store(tmp_path), "", Silent(), where=two)]
    assert sorted(done) == list(range(6)) and done.index(4) < done.index(1)


# Who writes a run


def foreign(path: Path, **changes) -> None:
    other = {"host": "elsewhere", "boot": "b", "process": 1, "began": "1", "token": "t"} | changes
    path.write_text(json.dumps(other))


def test_one_process_at_a_time_has_a_run(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    order = []
    with Claim(tmp_path, "run") as own:
        assert claims.under_way(tmp_path, "run") and not own.waited

        def other():
            with Claim(tmp_path, "run", order.append) as claim:
                order.append(claim.waited)

        thread = threading.Thread(target=other)
        thread.start()
        while not order:
            time.sleep(0.01)
    thread.join()
    assert order[-1] is True and f"process {os.getpid()} on {claims.here()['host']}" in order
    assert not list(tmp_path.iterdir())


def test_the_claim_of_a_process_that_has_died_is_taken(tmp_path, monkeypatch):
    path = tmp_path / ".run.claim"
    foreign(path, **claims.here(), process=os.getpid(), began="0")  # its number is another's now
    assert not claims.under_way(tmp_path, "run") and not path.exists()
    foreign(path, **claims.here(), process=2**22 + 1)
    with Claim(tmp_path, "run"):
        pass
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(claims, "DEAD_SECONDS", 0.3)
    foreign(path)
    assert claims.under_way(tmp_path, "run"), "of another host nobody knows"
    began, touches = time.monotonic(), []

    def waiting(who):  # its owner lives for half a second more
        if time.monotonic() - began < 0.5:
            touches.append(os.utime(path))

    with Claim(tmp_path, "run", waiting) as claim:
        assert claim.waited and time.monotonic() - began > 0.75 and touches


def test_who_was_silent_for_too_long_writes_no_more(tmp_path):
    with Claim(tmp_path, "run") as claim:
        foreign(claim.path)
        with pytest.raises(Superseded, match="another process"):
            claim.beat(now=True)
    assert claims.owner(claim.path)["host"] == "elsewhere", "nor takes away what is another's"


def test_what_another_process_is_keeping_is_left_to_it(tmp_path):
    record = fabricate.record("lora")
    store, name = Store(tmp_path), record.spec.folder
    fabricate.keep(tmp_path, record)
    (tmp_path / name).rename(tmp_path / f".{name}")
    foreign(tmp_path / f".{name}.claim")
    store.recover()
    assert not (tmp_path / name).exists()
    (tmp_path / f".{name}.claim").unlink()
    store.recover()
    assert (tmp_path / name).exists()


def test_a_run_that_somebody_else_finishes_meanwhile_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(attempt, "run", lambda *_: pytest.fail("it ran twice"))
    record, told = fabricate.record("lora", sizes=Sizes(saved_bytes=0)), []
    path = tmp_path / f".{record.spec.folder}.claim"
    foreign(path)

    def event(spec, values):
        told.append(values["phase"])
        fabricate.keep(tmp_path, record)
        path.unlink(missing_ok=True)

    terms = attempt.Terms(Store(tmp_path), "", SimpleNamespace(event=event))
    assert attempt.alone(record.spec, terms, attempt.Slot()) == record
    assert told == ["waiting for process 1 on elsewhere"]


# An engine


class Threads(remote.Engine):
    """An engine whose tasks are threads of this process. A task whose machine is lost is begun again."""

    name, look_seconds = "threads", 0.0
    working: dict = {}
    sent: list = []

    def send(self, jobs):
        names = [f"task-{len(self.sent) + n}" for n in range(len(jobs))]
        for name, job in zip(names, jobs, strict=True):
            self.sent.append(job.spec.folder)
            thread = threading.Thread(target=self.work, args=[name, job])
            self.working[name] = thread
            thread.start()
        return names

    def work(self, name, job):
        for _ in range(1 + ray.MOST):
            try:
                job()
                break
            except ConnectionError:  # the machine is gone
                pass
        self.working.pop(name)

    def look(self):
        return set(self.working)

    def cancel(self, task):
        pass


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """-> a function that makes an engine on one store, and does its runs by `one(spec, signals)`."""
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote, "LAG_SECONDS", 0.1)
    monkeypatch.setattr(Threads, "working", {})
    monkeypatch.setattr(Threads, "sent", [])

    def make(one) -> Threads:
        store = Store(tmp_path)

        def alone(spec, terms, slot, signals):
            assert terms.store.folder == tmp_path and slot.of is None
            record = one(spec, signals)
            if record.ok:
                fabricate.keep(tmp_path, record)
            else:
                terms.store.attempt(spec)
                terms.store.keep(spec, record)
            return record

        monkeypatch.setattr(remote, "alone", alone)
        return Threads(attempt.Terms(store, "", Silent()))

    return make


def ended(engine: Threads, spec, signals=()) -> RunRecord:
    engine.more([spec])
    return engine.run(spec, None, signals, lambda: None)


def test_a_run_on_an_engine_comes_back_with_its_scores(engine):
    record = fabricate.record("lora", sizes=Sizes(saved_bytes=0))
    found = ended(engine(lambda *_: record), record.spec)
    assert found.ok and found.scores and Threads.sent == [record.spec.folder]


@pytest.mark.parametrize("losses", [0, 1, 2, 3, 4])
def test_a_lost_run_is_begun_again_twice_and_no_more(losses, engine):
    record, begun = fabricate.record("lora"), []

    def one(spec, signals):
        begun.append(spec)
        if len(begun) <= losses:
            raise ConnectionError
        return record

    found = ended(engine(one), record.spec)
    assert len(begun) == min(losses + 1, 3) and found.ok is (losses < 3)
    if not found.ok:
        assert found.status == "interrupted" and "lost 3 times" in found.error


def test_running_out_of_memory_is_a_result_and_is_not_tried_again(engine):
    record, begun = fabricate.record("lora", status="oom_gpu", error="out of memory", scores={}), []
    maker = engine(lambda spec, _: begun.append(spec) or record)
    assert ended(maker, record.spec).status == "oom_gpu" and len(begun) == 1
    remote.Job(record.spec, maker.terms)()  # its machine was lost just after
    assert len(begun) == 1


def test_a_task_that_leaves_no_word_is_an_interrupted_run(engine, monkeypatch):
    monkeypatch.setattr(remote.Job, "__call__", lambda self: None)
    found = ended(engine(None), fabricate.record("lora").spec)
    assert found.status == "interrupted" and "do all machines see the results?" in found.error


def test_a_bench_that_died_finds_what_still_runs_and_what_has_ended(engine, tmp_path):
    """One of its runs ends before the next bench begins, one after; none is sent twice."""
    records, going = [fabricate.record("lora", seed) for seed in range(2)], threading.Event()

    def one(spec, signals):
        if spec.seed:
            going.wait(30)
        return records[spec.seed]

    specs = [record.spec for record in records]
    engine(one).more(specs)  # and dies
    while not remote.read(tmp_path / remote.TOLD.format(specs[0].folder)).get("record"):
        time.sleep(0.01)
    again = engine(one)
    assert len(again.more(specs)) == 2
    threading.Timer(0.1, going.set).start()
    assert all(again.run(spec, None, (), lambda: None).ok for spec in specs)
    assert Threads.sent == [spec.folder for spec in specs]


def test_after_ctrl_c_a_task_is_asked_to_end_and_other_signals_leave_it(engine):
    asked = threading.Event()
    stopped = fabricate.record("lora", status="interrupted", error="interrupted", scores={})

    def one(spec, signals):
        while not signals:
            time.sleep(0.01)
        asked.set()
        return stopped

    first = engine(one)
    first.more([stopped.spec])
    with pytest.raises(KeyboardInterrupt):
        first.run(stopped.spec, None, [signal.SIGTERM], lambda: None)
    assert first.file(remote.SENT, stopped.spec).exists() and not asked.is_set()
    second = engine(one)
    second.more([stopped.spec])
    assert second.run(stopped.spec, None, [signal.SIGINT], lambda: None).status == "interrupted"
    assert asked.is_set() and len(Threads.sent) == 1


def test_a_task_that_is_to_make_room_is_no_loss(engine):
    record = fabricate.record("lora", status="interrupted", error="preempted", scores={})
    maker = engine(lambda *_: record)
    maker.note(record.spec, "task")
    job = remote.Job(record.spec, maker.terms)
    for _ in range(5):
        job([signal.SIGTERM])
    assert remote.read(maker.file(remote.TOLD, record.spec)) == {"begun": 0}


def test_a_run_that_ended_as_it_was_asked_to_make_room_is_done(engine):
    record = fabricate.record("lora", sizes=Sizes(saved_bytes=0))
    maker = engine(lambda *_: record)
    maker.note(record.spec, "task")
    remote.Job(record.spec, maker.terms)([signal.SIGTERM])
    assert remote.read(maker.file(remote.TOLD, record.spec))["record"]["status"] == "ok"


def test_a_forced_run_begins_anew_once_and_then_goes_on(engine, monkeypatch):
    record, asked = fabricate.record("lora", status="interrupted", error="preempted", scores={}), []
    maker = engine(None)
    monkeypatch.setattr(remote, "alone", lambda spec, terms, *_: asked.append(terms.anew) or record)
    maker.note(record.spec, "task")
    job = remote.Job(record.spec, replace(maker.terms, anew=True))
    for _ in range(3):
        job([signal.SIGTERM])
    assert asked == [True, False, False]


def test_results_that_are_away_for_a_moment_call_no_run_off(engine, tmp_path):
    record, seen = fabricate.record("lora", sizes=Sizes(saved_bytes=0)), []
    away = tmp_path.with_name("away")

    def one(spec, signals):
        while not remote.read(maker.file(remote.SENT, spec)).get("task"):
            time.sleep(0.01)
        tmp_path.rename(away)
        time.sleep(0.2)
        away.rename(tmp_path)
        seen.extend(signals)
        maker.file(remote.SENT, spec).unlink()
        while not signals:
            time.sleep(0.01)
        return record

    maker = engine(one)
    assert ended(maker, record.spec).ok and not seen


def test_what_an_earlier_attempt_has_told_is_not_shown_of_a_run_that_waits(engine, tmp_path, monkeypatch):
    record, told = fabricate.record("lora", sizes=Sizes(saved_bytes=0)), []
    stale = tmp_path / remote.ATTEMPT.format(record.spec.folder) / remote.EVENTS
    stale.parent.mkdir()
    stale.write_text('{"step": 7}\n')
    maker = engine(lambda *_: record)
    maker.terms.progress = SimpleNamespace(event=lambda spec, values: told.append(values))
    waits, work = threading.Event(), Threads.work
    monkeypatch.setattr(Threads, "work", lambda *given: waits.wait(30) and work(*given))
    maker.more([record.spec])
    threading.Timer(0.2, waits.set).start()
    assert maker.run(record.spec, None, (), lambda: None).ok and not told


def test_a_run_that_was_lost_is_not_written_beside_a_process_that_is_at_it(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(remote.Job, "__call__", lambda self: None)
    spec, order = fabricate.record("lora").spec, []
    path = tmp_path / f".{spec.folder}.claim"
    foreign(path)
    threading.Timer(0.3, lambda: order.append("let go") or path.unlink()).start()
    assert ended(engine(None), spec).status == "interrupted" and order == ["let go"]


SQUEUE = "#!/bin/sh\n[ -e {0}/away ] && echo gone >&2 && exit 1\ncat {0}/queue\n"


def test_a_controller_that_does_not_answer_ends_no_run_and_sends_none_twice(tmp_path, monkeypatch):
    squeue = tmp_path / "squeue"
    squeue.write_text(SQUEUE.format(tmp_path))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(slurm.Slurm, "look_seconds", 0.0)
    engine = slurm.Slurm(attempt.Terms(Store(tmp_path / "results"), "", Silent()), 1)
    (tmp_path / "away").touch()
    with pytest.raises(BadRequest, match="squeue does not answer: gone"):
        engine.holds("12_0")
    (tmp_path / "away").unlink()
    (tmp_path / "queue").write_text("12_0\n12_1\n")
    assert engine.holds("12_0") and not engine.holds("12_2")
    (tmp_path / "away").touch()
    monkeypatch.setattr(engine, "send", lambda jobs: ["13"])
    (tmp_path / "results").mkdir()
    engine.more([fabricate.record("lora").spec])
    assert engine.holds("12_0") and engine.holds("13"), "as it was, with what was sent since"


def test_a_machine_that_does_not_see_the_results_says_so(tmp_path):
    job = remote.Job(fabricate.record("lora").spec, attempt.Terms(Store(tmp_path / "elsewhere"), "", None))
    with pytest.raises(FileNotFoundError, match="all machines must"):
        job()


def test_no_engine_is_imported_unless_it_is_asked_for():
    for path in Path(places.__file__).parents[1].rglob("*.py"):
        lines = ast.parse(path.read_text()).body
        named = [node.module or "" for node in lines if isinstance(node, ast.ImportFrom)]
        named += [name.name for node in lines if isinstance(node, ast.Import) for name in node.names]
        assert not {"ray", "submitit"} & {name.partition(".")[0] for name in named}, path


# What the report says


def test_the_certificate_says_whether_runs_side_by_side_disturbed_one_another():
    runs = {f"lora {seed}": fabricate.record("lora", seed, disturbed=[]) for seed in range(3)}
    for record in runs.values():
        record.folder = record.spec.folder
    first, second, third = runs.values()
    first.beside, second.beside, third.beside = [second.folder], [first.folder, "gone-s0-0"], []
    _, alike, details = apart(runs)
    assert alike and details == "2 of 3 trainings had others beside them, up to 2, and none was disturbed"
    second.disturbed = ["other processes took 9%"]
    told = "disturbed, by them or by others: lora 1, beside which ran lora 0 and gone-s0-0"
    assert apart(runs)[1:] == (None, told)
    first.disturbed = second.disturbed = None
    assert apart(runs)[1] is None
