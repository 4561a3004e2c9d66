"""One run on two devices is the run on one: on two processes of a CPU, which talk as cards do."""

import json
import os
import re
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import test_contract
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_run import SETTINGS, files  # noqa: F401, a fixture

from harness import child, machine
from harness.cli import main
from harness.errors import BadRequest
from harness.method import build, find, known_methods, resolve
from harness.plan import Request, plan
from harness.ranks import Place, Ranks
from harness.record import RunRecord
from harness.store import OUTPUTS, RESULT, SPEC
from harness.training import loop, reducer
from harness.training.devices import Devices
from harness.training.graphs import recorded
from harness.training.loop import train
from harness.training.run import Run
from methods.full import Full

ROWS = tiny.rows(6, seed=3)  # a step of 4 rows, and one of 2
HP = tiny.hyperparams(
    max_steps=2,
    batch_size=4,
    micro_batch_size=2,
    learning_rate=1e-2,
    weight_decay=0.1,
    max_new_tokens=4,
    warmup_ratio=0.0,
    epsilon=1e-4,  # else a gradient that is rounding alone is a whole step of Adam's
)
MGPO = "lora_ggpo, mgpo"
OPTIONS = {**test_contract.OPTIONS, **test_contract.PERIODS, "lora_ggpo": {"sigma": 0.3},
           MGPO: {"variant": "mgpo", "rho": 0.5}, "smt": {"share": 0.2, "warmup": 2, "block": 8}}  # fmt: skip
FAR = {"full_8bit": 1e-3}  # in 8 bits, a moment that is near two codes may become either


# Of the methods those that draw, choose or look by themselves; TUNEOFF_EVERY=1 tries all of them.
OWN = [
    "full",
    "lora",
    "qlora",
    "galore",
    "lisa",
    "grpo",
    "orpo",
    "smt",
    "lora_ggpo",
    MGPO,
    "eva",
    "peft.adalora",
]


def together() -> list[str]:
    """The methods that several devices can compute."""
    names = sorted({*known_methods(), *test_contract.VARIANTS} - {"peft", *test_contract.UNTOUCHED})
    every = [MGPO, *(name for name in names if "several cards" not in cls_of(name).cannot)]
    return every if os.environ.get("TUNEOFF_EVERY") else OWN


def cls_of(name: str):
    name = name.partition(",")[0]
    return resolve(name, find(name, known_methods()))


def training(name: str, folder, devices: Devices, hp=HP) -> dict:
    """What it came to, as JSON has it."""
    cls = cls_of(name)
    method, hp = build(cls, OPTIONS.get(name, {})), cls.own(hp)
    base = method.load(test_contract.base_loader(folder))
    model, run = tiny.attached(method, base, ROWS, hp, seed=1, devices=devices)
    devices.same(model)
    run.splits["validation"] = tiny.rows(3, seed=1)
    run.hp = replace(hp, validations=name == "full")
    train(model, run)
    record, answered = run.record, name == "full"
    return {
        "training": record.training, "validation": record.validation, "hashes": record.hashes,
        "tokens": {**vars(record.tokens), "padded": None}, "notes": record.notes,
        "weights": {name: value.tolist() for name, value in tiny.trained_weights(model).items()},
        "answers": run.decoder.answers(model, tiny.rows(5, seed=2)) if answered else [],
    }  # fmt: skip


def forked(work) -> int:
    """-> how a copy of this process ended that did the work."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    return folder


def reward(self, row, ids) -> float:
    return len(set(ids)) / len(ids) + ids[0] / 1000  # random rows have no references to earn anything by


@pytest.fixture(scope="module")
def on_two(base, tmp_path_factory):
    """What each method came to on two devices, as the first of them has it."""
    file = tmp_path_factory.mktemp("two") / "found.json"

    def all_of(place: Place) -> None:
        devices = Devices.joined(place)
        found = {name: training(name, base, devices) for name in together()}
        if not place.rank:
            file.write_text(json.dumps(found))

    def work() -> None:
        Run.reward = reward
        reducer.SMALL_BYTES = 256  # most gradients of a tiny model are exchanged as they lie, too
        ranks = Ranks()
        all_of(ranks.begin(2, all_of, lambda ending: os._exit(1)))

    assert forked(work) == 0
    return json.loads(file.read_text())


def in_the_same_parts(self, examples):
    """What a method draws for a micro-batch, as noise, is the same where these are."""
    parts = [Devices(rank, 2).share(examples, lambda row: row.length) for rank in range(2)]
    return [part for part in parts if part]


@pytest.mark.parametrize("name", together())
def test_two_devices_train_as_one(name, base, on_two, monkeypatch):
    """Losses, gradient norms, weights, what was read, learned and found out; of one, scores and answers."""
    monkeypatch.setattr(Run, "reward", reward)
    if name == "lora_ggpo":
        monkeypatch.setattr(Run, "micro_batches", in_the_same_parts)
    one, two, far = training(name, base, Devices()), on_two[name], FAR.get(name, 2e-5)
    assert len(one["training"]) == len(two["training"]) == 2
    for a, b in zip(one["training"] + one["validation"], two["training"] + two["validation"], strict=True):
        assert a == pytest.approx(b, abs=1e-5, rel=1e-5)
    for weight, value in one["weights"].items():
        torch.testing.assert_close(
            torch.tensor(two["weights"][weight]), torch.tensor(value), atol=far, rtol=0
        )
    assert one["weights"] != on_two["full"]["weights"] or name == "full"
    assert two["hashes"] == one["hashes"] and two["tokens"] == one["tokens"]
    near = {k: pytest.approx(v, rel=1e-4) if isinstance(v, float) else v for k, v in one["notes"].items()}
    assert two["notes"] == near
    assert two["answers"] == one["answers"]


@given(st.lists(st.integers(1, 500), max_size=40), st.integers(1, 5))
def test_shares_are_the_whole_once_and_even(lengths, count):
    shares = [
        Devices(rank, count).share(list(enumerate(lengths)), lambda row: row[1]) for rank in range(count)
    ]
    assert sorted(row for share in shares for row in share) == list(enumerate(lengths))
    assert all(share == sorted(share) for share in shares)  # in their order
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    totals = [sum(length for _, length in share) for share in shares]
    assert max(totals) - min(totals) <= 2 * max(lengths, default=0)


# Sums beside a backward: what stands for a card remembers each gradient as it is when a mark is made


class Mark:
    def __init__(self, parameters):
        self.parameters, self.then = parameters, []

    def record(self):
        self.then = [p.grad.clone() if p.grad is not None else None for p in self.parameters]


class Queue:
    """Of a card's stream: its sums read what stood there at the mark that they wait for."""

    def __init__(self, parameters):
        self.parameters, self.seen, self.waits = parameters, [], []

    def wait_event(self, mark):
        self.waits.append("mark")
        self.seen = mark.then

    def wait_stream(self, stream):
        self.waits.append("backward")
        self.seen = [p.grad for p in self.parameters]

    def sum(self, *tensors):
        """Two devices with the same gradients."""
        then = {p.grad.data_ptr(): old for p, old in zip(self.parameters, self.seen, strict=True)
                if p.grad is not None}  # fmt: skip
        for tensor in tensors:
            tensor.copy_(2 * then[tensor.data_ptr()])


class Twin:
    count, talking = 2, True

    def gathered(self, value):
        return [value, value]


@pytest.fixture
def beside(monkeypatch):
    """-> a reducer of these parameters, each a bucket of its own, on a card that is told late."""

    def made(parameters):
        queue, devices = Queue(parameters), Twin()
        devices.sum = queue.sum
        monkeypatch.setattr(torch.cuda, "Stream", lambda **_: queue)
        monkeypatch.setattr(torch.cuda, "Event", lambda **_: Mark(parameters))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: Queue(parameters))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
        monkeypatch.setattr(reducer, "BUCKET_BYTES", 0)
        monkeypatch.setattr(reducer, "SMALL_BYTES", 0)  # a copy would not show what it was made of
        found = reducer.Reducer(devices, parameters)
        found.listen()
        return found, queue

    return made


def test_sums_begin_beside_the_backward_and_miss_nothing(beside):
    """Of micro-batches, of what is frozen or unused at the time, and of gradients that come in two parts."""
    draw = torch.Generator().manual_seed(0)
    first, second, unused, frozen = (torch.randn(3, 3, generator=draw).requires_grad_() for _ in range(4))
    found, queue = beside([first, second, unused, frozen])
    frozen.requires_grad_(False)

    def step(*losses, looked_at=()):
        for p in (first, second, unused, frozen):
            p.grad = None
        for loss in losses:
            found.began()
            for part in loss if isinstance(loss, list) else [loss]:
                part().backward()
        expected, queue.waits = [2 * first.grad, 2 * second.grad], []
        found.add_up()
        assert unused.grad is None and frozen.grad is None
        for p, value in zip((first, second), expected, strict=True):
            torch.testing.assert_close(p.grad, value)
        return queue.waits

    def plain():
        return (first @ second @ frozen).square().sum()

    late = "backward"
    assert step(plain) == [late, late, "mark", "mark"]  # unused and frozen have nothing to wait for
    assert step(plain, plain) == [late, late, "mark", "mark"]  # of both micro-batches
    assert step(plain, lambda: first.sum()) == [late, late, late, "mark"]
    assert step([plain, lambda: first.sum()]) == [late, late, "mark", late]  # a backward in two parts
    looks = first.register_post_accumulate_grad_hook(lambda p: None)
    assert step(plain) == [late, late, "mark", late]  # who looks at a gradient may still read it
    looks.remove()
    assert found.made == set()  # of a step without rows, there is nothing that a mark could tell
    found.close()
    assert not any(first._post_accumulate_grad_hooks.values())


def test_gradients_of_any_size_and_layout_are_exchanged_as_they_lie(beside, monkeypatch):
    """Large ones in place; small ones, and those that do not lie in a row, by a copy."""
    found, _ = beside([torch.randn(3, 3).requires_grad_()])
    monkeypatch.setattr(reducer, "SMALL_BYTES", 4 * 9)
    exchanged = []
    found.devices.sum = lambda *tensors: exchanged.extend((t.mul_(2).data_ptr(), t.numel()) for t in tensors)
    large = [torch.randn(3 + i, 3) for i in range(16)]
    turned = [large[0], torch.randn(3, 4).T, *large[2:]]  # one lies otherwise, as on another device
    orders = []
    for some in (large, turned):
        gradients = [torch.randn(2), *some, torch.randn(())]
        expected, places = [2 * g for g in gradients], [g.data_ptr() for g in gradients]
        exchanged.clear()
        found.sum(gradients)
        assert all(map(torch.equal, gradients, expected)) and places == [g.data_ptr() for g in gradients]
        orders.append([size for _, size in exchanged])
        assert {place for place, _ in exchanged} >= {g.data_ptr() for g in some if g.is_contiguous()}
    assert orders[0] == orders[1] == [*(g.numel() for g in large), 3]
    exchanged.clear()
    found.sum([])
    assert not exchanged


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a GPU's own graphs and streams")
def test_a_graph_marks_at_each_replay_and_its_sums_wait_for_that(monkeypatch):
    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            torch.cuda._sleep(10**7)  # cycles: some milliseconds
            return grad.clone()

    monkeypatch.setattr(reducer, "BUCKET_BYTES", 0)
    devices, given = Twin(), torch.ones(4, device="cuda")
    devices.sum = lambda tensor: tensor.mul_(2)
    weights = [torch.ones(4, device="cuda", requires_grad=True) for _ in range(3)]
    found = reducer.Reducer(devices, weights)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)

    def step():
        found.began()
        x = given
        for weight in weights:
            x = Slow.apply(x * weight)
        x.sum().backward()

    graph, _, _ = recorded(step, torch.cuda.graph_pool_handle())
    made = frozenset(found.made)
    assert made == {0, 1, 2}
    for factor in (1, 2, 3):
        given.fill_(factor)
        torch._foreach_zero_([weight.grad for weight in weights])
        graph.replay()
        found.made = set(made)
        found.add_up()
        assert all(weight.grad.eq(2 * factor).all() for weight in weights)
    found.close()


class Told(Devices):
    """One of two, the other of which does nothing. Remembers how many values were asked for, in order."""

    def __init__(self):
        super().__init__(0, 2)
        self.asked = []

    def sum(self, *tensors):
        self.asked += [tensor.numel() for tensor in tensors]

    def gathered(self, value):
        return [value, value]


def test_a_step_asks_for_gradients_before_what_waits_for_its_backward():
    """Sums are made in the order in which they were asked for, whichever stream they are on."""
    devices = Told()
    model, run = tiny.attached(Full(), tiny.model(), ROWS, HP, devices=devices)
    one = loop.Loop(model.train(), run)
    sizes = [sum(p.numel() for p in bucket) for bucket in one.reducer.buckets]
    devices.asked.clear()
    one.step(next(iter(run.batches)))
    assert devices.asked == [1, *sizes, 1, 5] and sum(sizes) == sum(p.numel() for p in model.parameters())


# Whole runs

SHORT = ["data.train=9", "hp.batch_size=4", "hp.micro_batch_size=1", "hp.max_steps=3"]  # of 4, 4 and 1 rows


def job(files, folder, name="lora", *settings, code="", every=0) -> None:  # noqa: F811
    plugin = folder / f"{name}.py"
    if code:
        plugin.write_text(code)
    request = Request(
        [name], model=str(files / "model"), dataset=str(files / "rows.jsonl"), seeds=[0],
        settings=tiny.settings(SETTINGS, settings), plugins=[str(plugin)] if code else [],
    )  # fmt: skip
    spec = plan(request)[-1]
    asked = {"spec": spec.asked() | {"locations": spec.locations}, "command": "", "started": "", "cores": [],
             "at_once": 1, "cards": [], "checkpoint_seconds": every}  # fmt: skip
    (folder / SPEC).write_text(json.dumps(asked))


def run(folder) -> RunRecord:
    """As its child runs it, of which no process is left then."""
    session = folder / "session"

    def main() -> None:
        os.setsid()
        session.write_text(str(os.getpid()))
        child.main(folder)

    assert forked(main) == 0
    deadline = time.monotonic() + 5
    while left := [process for process in processes() if process[1] == int(session.read_text())]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    return RunRecord.from_json((folder / RESULT).read_text())


def processes() -> list[tuple[int, int]]:
    """Number and session of each that is alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
            found += [(int(stat.parent.name), int(session))] * (state != "Z")
    return found


@pytest.fixture
def two_cores(monkeypatch):
    monkeypatch.setattr(machine, "devices", lambda: 2)


@pytest.fixture(scope="module")
def on_one(files, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("one")
    job(files, folder, "full", *SHORT)
    return run(folder), outputs(folder)


def outputs(folder) -> list[str]:
    return [json.loads(line)["output"] for line in (folder / OUTPUTS).read_text().splitlines()]


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_whole_run_is_one_run(sharding, on_one, files, tmp_path, two_cores):  # noqa: F811
    """Also where shares are of different sizes, and one device has no row of the last step."""
    job(files, tmp_path, "full", *SHORT, "hp.devices=2", f"hp.sharding={sharding}")
    (one, texts), two = on_one, run(tmp_path)
    assert one.ok and two.ok, two.error
    assert tiny.losses(one) == pytest.approx(tiny.losses(two), abs=1e-5)
    assert [s["grad_norm"] for s in one.training] == pytest.approx(
        [s["grad_norm"] for s in two.training], rel=1e-4
    )
    assert one.validation == [pytest.approx(point, abs=1e-5) for point in two.validation]
    assert two.hashes["given"] == one.hashes["given"] and two.tokens.rows == one.tokens.rows
    assert replace(two.sizes, saved_bytes=None) == replace(one.sizes, saved_bytes=None)
    assert outputs(tmp_path) == texts
    assert not one.ranks and len(two.ranks) == 2
    assert [w for w in two.warnings if "peak memory is unknown" not in w] == []
    for name, phase in two.ranks[0].items():
        assert two.phases[name].seconds == phase.seconds
        assert two.phases[name].peak_host == max(ranks[name].peak_host for ranks in two.ranks)
    assert one.spec.comparison != two.spec.comparison  # other times, other memory


BREAKS = """
from dataclasses import dataclass
import os, signal
from methods.lora import LoRA

@dataclass
class Breaks(LoRA):
    def loss(self, model, batch, run):
        here = run.devices.rank == 1 and len(run.record.training) == 1
        if here and not os.environ.get("TUNEOFF_WHOLE"):
            {what}
        return super().loss(model, batch, run)
"""
ENDS = {
    "error": ("raise ValueError('of its own')", "failed", "device 2 of 2: ValueError: of its own"),
    "killed": (
        "os.kill(os.getpid(), signal.SIGKILL)",
        "interrupted",
        "device 2 of 2: its process was killed",
    ),
    "rank 0": ("os.kill(os.getppid(), signal.SIGTERM)", "interrupted", "interrupted; the same command"),
}


@pytest.mark.parametrize("what", ENDS)
def test_one_rank_ends_all_with_its_own_status(what, files, tmp_path, two_cores):  # noqa: F811
    does, status, error = ENDS[what]
    job(files, tmp_path, "breaks", "hp.devices=2", "hp.max_steps=4", code=BREAKS.format(what=does))
    record = run(tmp_path)
    assert record.status == status and error in record.error


def test_it_goes_on_where_all_were_stopped(files, tmp_path, two_cores, monkeypatch):  # noqa: F811
    code = BREAKS.format(what="raise ValueError")
    job(files, tmp_path, "breaks", "hp.devices=2", "hp.max_steps=4", code=code, every=1e-9)
    assert run(tmp_path).status == "failed"
    monkeypatch.setenv("TUNEOFF_WHOLE", "1")
    record = run(tmp_path)
    assert record.ok and [one.step for one in record.resumed] == [2]
    (whole := tmp_path / "whole").mkdir()
    job(files, whole, "breaks", "hp.devices=2", "hp.max_steps=4", code=code)
    expected = run(whole)
    assert record.training == expected.training and record.hashes["given"] == expected.hashes["given"]
    assert record.tokens == expected.tokens  # also of the rows that the other device read before


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("lora", ["hp.devices=3"], "there are 2 here, not 3: set it to 2"),
        ("lora", ["hp.devices=2", "hp.batch_size=1"], "2 devices share the 1 rows of a step"),
        ("lora", ["hp.sharding=full"], "one device has nobody to share with: set hp.devices to 2 or more"),
        ("galore_layerwise", ["hp.devices=2"], "method galore_layerwise cannot do several cards"),
        ("qlora", ["hp.devices=2", "hp.sharding=full"], "method qlora cannot do sharding"),
    ],
)
def test_what_cannot_be_is_refused_by_the_plan(name, settings, said, two_cores):
    more = ["hp.micro_batch_size=16", "hp.max_grad_norm=0"]
    with pytest.raises(BadRequest, match=re.escape(said)):
        plan(Request([name], "demo", seeds=[0], settings=more + settings))


def test_of_another_machine_no_cards_are_counted(two_cores, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TUNEOFF_FORECASTS", "0")
    typed = ["--methods", "lora", "--seeds", "0", "--set", "hp.devices=4", "--results", str(tmp_path)]
    assert main(["plan", *typed]) == 2
    assert (
        "there are 2 here, not 4: set it to 2; of another machine, plan --memory" in capsys.readouterr().err
    )
    assert main(["plan", *typed, "--memory", "80GB"]) == 0
    assert "devices 4" in capsys.readouterr().out
    typed.insert(typed.index("--results"), "hp.batch_size=3")
    assert main(["plan", *typed, "--memory", "80GB"]) == 2  # wrong on any machine


def test_one_device_is_hashed_as_before():
    spec = plan(Request(["lora"], "demo", seeds=[0]))[-1]
    assert not {"devices", "sharding"} & set(spec.asked()["hp"])
    assert spec.digest != replace(spec, hp=replace(spec.hp, devices=2)).digest
