"""Damaged records, outputs and events: whatever stands in them, a report is made of the runs that are whole.

The real runs of results/reference/demo, shortened, are each damaged in a way drawn from a seeded generator.
TUNEOFF_FUZZ=10000 draws as many.
"""

import copy
import json
import os
import random
import re
import signal
from collections import Counter
from contextlib import contextmanager
from functools import partial
from io import StringIO
from pathlib import Path

import fabricate
import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from harness import report
from harness.bench.attempt import follow
from harness.cli.progress import Lines, outcome
from harness.cli.remaining import Remaining
from harness.plan import Plan
from harness.record import SEAL, RunRecord
from harness.report import comparisons, documents, results
from harness.spec import content_hash, digest, folder_name
from harness.store import OUTPUTS, RECORD, Store

REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "demo"
RECORDS = Path(__file__).with_name("records")
EXAMPLES = int(os.environ.get("TUNEOFF_FUZZ", "250"))
WRITTEN, DRAWN = (
    10,
    100,
)  # one of so many is written though it lacks a run, or drawn with its plots: they take long
SECONDS = 30  # a report of five short runs takes one
STRANGE = [
    None, True, False, 0, -1, 1, -7.0, 0.5, 1e-9, 99.0, 1e300, -1e300, 10**30, 2**63, "", "x", "NaN", "1",
    "../../outside/x", "\x1b]0;owned\x07", "\ud800", "\u202e", "<script>", "a" * 5000, [], {}, [[]], [None],
    {"value": -7}, {"seconds": -50}, ["a", 1, None], {"": {"": {"": [1]}}}, float("nan"), float("inf"),
]  # fmt: skip
# Whoever changes one of these changes what a run says: the report must say so, or refuse the run. Only a
# hyperparameter that is left out of a renamed run has its default, as where a version did not ask for it.
SAID = re.compile(
    r"^(?!remove \.spec\.hp\.)\w+ \.(spec|status|card\.title|phases\.train\.seconds)\b"
    r"|^\w+ \.\d+\.(id|part|prompt|reference|tokens|nll|correct|sums|stopped)\b"
)


def shortened(folder: Path) -> Path:
    """Three of the runs, with few test rows and steps."""
    for path in sorted(REFERENCE.iterdir()):
        if path.name.startswith(("base-", "qlora-s0", "galore-s0")):
            outputs = Store(REFERENCE).outputs(RunRecord.from_json((path / RECORD).read_text("utf-8")))[::15]
            value = json.loads(RunRecord.from_json((path / RECORD).read_text("utf-8")).to_json())
            value |= {name: value[name][:6] for name in ("training", "step_seconds")}
            value["hashes"] |= {n: h[:6] for n, h in value["hashes"].items() if isinstance(h, list)}
            value["data"]["rows"]["test"] = len(outputs)
            write(folder / path.name, value, outputs)
            value["hashes"]["outputs"] = content_hash(folder / path.name / OUTPUTS)
            write(folder / path.name, value, outputs)
    return folder


def write(folder: Path, value, outputs) -> None:
    """Without the digest of itself, by which any change would be refused before it is read."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RECORD).write_text(json.dumps({name: value[name] for name in value if name != SEAL}))
    (folder / OUTPUTS).write_text("".join(json.dumps(output) + "\n" for output in outputs))


def places(value, path=()):
    """Every place in a JSON value: the keys that lead to it."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def damage(whole, draw: random.Random) -> tuple[object, str]:
    """Another JSON value, and what was done to it where."""
    while (done := damaged(copy.deepcopy(whole), draw))[0] == whole:
        pass
    return done


def damaged(value, draw: random.Random) -> tuple[object, str]:
    groups = {}
    for path in places(value):
        if path:
            groups.setdefault(path[0] if isinstance(path[0], str) else "", []).append(path)
    *parents, key = draw.choice(groups[draw.choice(sorted(groups))])
    inside = value
    for parent in parents:
        inside = inside[parent]
    where = "".join(f".{part}" for part in (*parents, key))
    way = draw.choice(("replace", "replace", "replace", "remove", "shift", "swap", "add"))
    old = inside[key]
    if way == "remove":
        del inside[key]
    elif way == "shift" and isinstance(old, int | float):
        inside[key] = draw.choice([-old, old + 1, old * 2, old * 1e6, float(old), old + 0.01])
    elif way == "swap" and isinstance(inside, dict):
        other = draw.choice(sorted(inside))
        inside[key], inside[other] = inside[other], inside[key]
    elif way == "add" and isinstance(old, dict | list):
        new = draw.choice(STRANGE)
        old.append(new) if isinstance(old, list) else old.update({draw.choice(["x", "", "\x1b[2J"]): new})
    else:
        inside[key] = draw.choice(STRANGE)
    return value, f"{way} {where}"


def torn(data: bytes, draw: random.Random) -> bytes:
    """As a full disk, a lost block or an editor leaves a file."""
    i, j = sorted(draw.randrange(len(data)) for _ in range(2))
    return draw.choice([
        data[:i], data[i:], data[:i] + data[j:], data[:i] + b"\0" * (j - i) + data[j:], b"", b"null",
        b"[" * 10**5, data[:i] + bytes([draw.randrange(256)]) + data[i + 1 :], data + data, b"\xff" + data,
    ])  # fmt: skip


@contextmanager
def limited():
    def late(*_):
        raise AssertionError(f"no end after {SECONDS} s")

    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


def written(store: Store) -> str:
    """The report's text without its plots."""
    records, corrupt = store.load()
    said = report.Report(comparisons(records), store, corrupt, "now")
    for record in records:
        outcome(record, True)
    table = "".join(results(comparison, 80) for comparison in said.comparisons)
    made = said.documents(set())
    page, text = ("".join(report.WRITERS[kind](said, made).values()) for kind in ("html", "md"))
    assert not set("\x00\x1b\x07\u202e\ud800") & {*page, *text, *table}
    page.encode(), text.encode()
    return text


@pytest.fixture
def runs(tmp_path, monkeypatch):
    figures = documents.__globals__["figures"]
    monkeypatch.setitem(documents.__globals__, "figures", lambda *_: [])
    return shortened(tmp_path / "results"), figures


def test_damaged_runs_are_named_and_the_rest_is_reported(runs, tmp_path, monkeypatch):
    folder, figures = runs
    store, draw, counts = Store(folder), random.Random(0), Counter()
    whole = {p.name: ((p / RECORD).read_bytes(), (p / OUTPUTS).read_bytes()) for p in folder.iterdir()}
    specs = {name: RunRecord.from_json(record.decode()).spec for name, (record, _) in whole.items()}
    untouched = written(store)
    for example in range(EXAMPLES):
        name, kind = (
            draw.choice(sorted(whole)),
            draw.choice(("record", "record", "record", "outputs", "torn")),
        )
        place, (record, outputs), what = folder / name, whole[name], ""
        if kind == "record":
            value, what = damage(json.loads(record), draw)
            (place / RECORD).write_text(json.dumps(value))
            with pytest.raises(ValueError):
                RunRecord.from_json(json.dumps(value | {SEAL: digest(json.loads(record))}))
            if draw.random() < 0.5:  # whoever changes a spec can rename its folder
                place = place.rename(renamed(place, value))
        elif kind == "outputs":
            lines, what = damage([json.loads(line) for line in outputs.splitlines()], draw)
            (place / OUTPUTS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        else:
            file = place / draw.choice((RECORD, OUTPUTS))
            file.write_bytes(torn(file.read_bytes(), draw))
        with limited():
            refused = bool(store.standing(place.name)[1])
            counts["refused" if refused else "read"] += 1
            if refused:
                assert not store.find(specs[name]), what
            if not refused or example % WRITTEN == 0:
                records, corrupt = store.load()
                assert {r.folder for r in records} >= set(whole) - {name} and place.exists(), what
                assert len(records) + len(corrupt) == len(whole) and len(corrupt) == refused, what
                assert all(place.name in line for line in corrupt), what
                text = written(store)
                counts["read and said"] += text != untouched and not refused
                untrained = name.startswith("base") and (".spec.hp." in what or ".spec.options" in what)
                assert text != untouched or untrained or not SAID.search(what), what
            if not refused and example % DRAWN == 0:
                with monkeypatch.context() as patch:
                    patch.setitem(documents.__globals__, "figures", figures)
                    report.render(store, tmp_path / "reports")
        if place.name != name:
            place.rename(folder / name)
        (folder / name / RECORD).write_bytes(record)
        (folder / name / OUTPUTS).write_bytes(outputs)
    assert written(store) == untouched
    print(EXAMPLES, counts)


def test_damaged_records_of_an_earlier_schema_are_read_or_named(tmp_path):
    draw, store = random.Random(0), Store(tmp_path)
    runs = [path.parent for path in sorted(RECORDS.rglob(RECORD))]
    for _ in range(EXAMPLES):
        run = draw.choice(runs)
        record = json.loads((run / RECORD).read_text("utf-8"))
        outputs = [json.loads(line) for line in (run / OUTPUTS).read_text("utf-8").splitlines()]
        if draw.random() < 0.7:
            record, what = damage(record, draw)
        else:
            outputs, what = damage(outputs, draw)
        write(tmp_path / run.name, record, outputs)
        with limited():
            found, reason = store.standing(run.name)
        assert bool(found) != bool(reason), what


def renamed(place: Path, value) -> Path:
    try:
        return place.with_name(folder_name(value["spec"]).encode()[:200].decode())
    except (KeyError, TypeError, ValueError):  # no spec, or a name that no folder can have
        return place


class Ended:
    def poll(self):
        return 0


def test_damaged_events_end_no_bench(tmp_path):
    real = [
        {"phase": "train"}, {"step": 3, "steps": 10, "loss": 1.5, "tokens": 99, "seconds": 2.5, "peak": 9},
        {"step": 4, "steps": 10, "loss": None}, {"answered": 5, "rows": 40},
    ]  # fmt: skip
    draw, progress = random.Random(0), Lines(StringIO(), Remaining(Plan([], [0])))
    spec = fabricate.record("lora").spec
    progress.start(spec, 1, 1)
    events = tmp_path / "events.jsonl"
    for _ in range(EXAMPLES):
        value, _ = damage(real, draw)
        lines = "".join(json.dumps(event) + "\n" for event in value).encode()
        events.write_bytes(draw.choice((lines, torn(lines, draw), lines + b"{}\n[]\n5\n")))
        with limited():
            follow(Ended(), events, partial(progress.event, spec), lambda: None)
