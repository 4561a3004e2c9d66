"""What counts as a run, and what is kept of one wherever a kill falls."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import fabricate
import pytest

from harness.bench import attempt, places
from harness.bench import loop as bench
from harness.cli import main
from harness.plan import Plan
from harness.record import SEAL, RunRecord
from harness.spec import content_hash, digest
from harness.store import (
    CHECKPOINTS,
    EARLIER_EVENTS,
    EVENTS,
    MARK,
    MODEL,
    OUTPUTS,
    RECORD,
    Store,
    append,
    save,
)

ROOT = Path(__file__).parents[1]
SAVED = 4096  # bytes
ROWS = 9


def kept(folder: Path, method: str = "lora", seed: int = 0, **changes) -> RunRecord:
    """A whole run with its model."""
    found = fabricate.record(method, seed, **changes)
    found.sizes.saved_bytes = SAVED
    fabricate.keep(folder, found, fabricate.outputs(method, seed, ROWS))
    if found.ok:
        found.hashes["outputs"] = content_hash(folder / found.spec.folder / OUTPUTS)
    save(folder / found.spec.folder / RECORD, found.to_json())
    model_in(folder / found.spec.folder)
    return found


def model_in(folder: Path) -> int:
    (folder / MODEL).mkdir()
    return (folder / MODEL / "adapter_model.safetensors").write_bytes(bytes(SAVED))


def edit(path: Path, change) -> None:
    """As of an earlier version, whose records have no digest: what it says is looked at then."""
    value = json.loads(path.read_text("utf-8"))
    value.pop(SEAL, None)
    change(value)
    path.write_text(json.dumps(value))


def by_hand(path: Path, change) -> None:
    value = json.loads(path.read_text("utf-8"))
    change(value)
    path.write_text(json.dumps(value))


def out_of_the_store(path: Path) -> None:
    """Moves a file or folder beside the store, and leaves a link to it."""
    moved = next(parent for parent in path.parents if parent.name == RESULTS).with_name("outside")
    path.rename(moved)
    path.symlink_to(moved)


def to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def with_(change):
    """A record, changed."""
    return lambda run: edit(run / RECORD, change)


def with_outputs(change):
    return lambda run: (run / OUTPUTS).write_text(change((run / OUTPUTS).read_text()))


def one_row_for_another(run: Path) -> None:
    """With all that is derived from the outputs."""
    first, _, *rest = (run / OUTPUTS).read_text().splitlines()
    test = [json.loads(line) for line in (first, first, *rest)]
    (run / OUTPUTS).write_text("".join(json.dumps(output) + "\n" for output in test))
    edit(run / RECORD, lambda record: record.update(hashes={"outputs": content_hash(run / OUTPUTS)}))


def with_a_row(**changes):
    """Outputs of which the first is another, with all that is derived from them."""

    def change(run: Path) -> None:
        first, *rest = (run / OUTPUTS).read_text().splitlines()
        lines = [json.dumps(json.loads(first) | changes), *rest]
        (run / OUTPUTS).write_text("".join(line + "\n" for line in lines))
        edit(run / RECORD, lambda record: record["hashes"].update(outputs=content_hash(run / OUTPUTS)))

    return change


RESULTS = "results"
FAULTS = {  # what is done to a run -> what is said of it
    "another rate": (
        with_(lambda r: r["spec"]["hp"].update(learning_rate=9.0)),
        "its spec or the folder's name",
    ),
    "another seed": (with_(lambda r: r["spec"].update(seed=7)), "its spec or the folder's name"),
    "another name": (
        lambda run: run.rename(run.with_name(run.name[:-1] + "x")),
        "its spec or the folder's name",
    ),
    "a path for a name": (with_(lambda r: r["spec"].update(method="../../outside/x")), "is no method's name"),
    "a start below 0": (with_(lambda r: r.update(start={"rouge_l": [-7, 9]})), "must be from 0 to 1"),
    "half a start": (with_(lambda r: r.update(start={"bleu4": [1, 1]})), "bleu4 has not 10 numbers"),
    "no hash": (with_(lambda r: r["hashes"].pop("outputs")), "no hash of"),
    "ROUGE-L above 1": (with_a_row(sums={"rouge_l": [2.0, 1]}), "ROUGE-L must be from 0 to 1, not 2"),
    "another count": (with_a_row(correct=999), "more is right"),
    "seconds below 0": (
        with_(lambda r: r["phases"]["train"].update(seconds=-50)),
        "seconds must be from 0 to",
    ),
    "NaN": (with_(lambda r: r["step_seconds"].append(float("nan"))), "NaN is not a number"),
    "infinity": (with_outputs(lambda text: text.replace('"nll": ', '"nll": 1e999', 1)), "is not a number"),
    "no aim": (with_(lambda r: r["card"].update(aim="bleu")), "record.card.aim must be one of"),
    "no status": (with_(lambda r: r.update(status="fine")), "record.status must be one of"),
    "no phase": (with_(lambda r: r["phases"].update(nap={})), "a name in record.phases must be one of"),
    "a newer schema": (with_(lambda r: r.update(schema=3)), "upgrade tuneoff"),
    "a number by hand": (
        lambda run: by_hand(run / RECORD, lambda r: r["phases"]["train"].update(seconds=1.0)),
        "record.json was changed since the run",
    ),
    "half a record": (lambda run: os.truncate(run / RECORD, 500), "column"),
    "lists in lists": (lambda run: (run / RECORD).write_text("[" * 10**5), "without end"),
    "not UTF-8": (lambda run: (run / RECORD).write_bytes(b"\xff\xfe{}"), "utf-8"),
    "no record": (lambda run: (run / RECORD).unlink(), "record.json is missing"),
    "an empty record": (lambda run: os.truncate(run / RECORD, 0), "Expecting value"),
    "no object": (lambda run: (run / RECORD).write_text("[1]"), "not a run record"),
    "a folder": (lambda run: ((run / RECORD).unlink(), (run / RECORD).mkdir()), "record.json is not a file"),
    "a pipe": (lambda run: pipe(run / RECORD), "record.json is not a file"),
    "outputs are a pipe": (lambda run: pipe(run / OUTPUTS), "outputs.jsonl is not a file"),
    "a link out": (lambda run: out_of_the_store(run / RECORD), "record.json is a link out of"),
    "a link to itself": (lambda run: to_itself(run / RECORD), "record.json is missing"),
    "outputs link out": (lambda run: out_of_the_store(run / OUTPUTS), "outputs.jsonl is a link out of"),
    "all of it links out": (out_of_the_store, "record.json is a link out of"),
    "its model links out": (lambda run: out_of_the_store(run / MODEL), "model is a link out of"),
    "a file of its model links out": (
        lambda run: out_of_the_store(run / MODEL / "adapter_model.safetensors"),
        "model/adapter_model.safetensors is a link out of",
    ),
    "no outputs": (lambda run: (run / OUTPUTS).unlink(), "outputs.jsonl is missing"),
    "empty outputs": (with_outputs(lambda text: ""), "was changed"),
    "half an output": (lambda run: os.truncate(run / OUTPUTS, 500), "outputs.jsonl, line"),
    "another answer": (
        with_outputs(lambda text: text.replace('"output": "', '"output": "so ', 1)),
        "was changed",
    ),
    "an output less": (with_outputs(lambda text: text.partition("\n")[2]), "was changed"),
    "fewer rows than were tested": (
        with_(lambda r: r["data"].update(rows={"test": ROWS + 1})),
        "has not one output for each of 10 test rows",
    ),
    "one row for another": (one_row_for_another, "has not one output for each of 9 test rows"),
    "no training": (with_(lambda r: r.update(phases={})), "its phase train is missing"),
    "no time": (with_(lambda r: r["phases"].update(train={})), "its phase train is missing"),
    "a text for a count": (with_(lambda r: r["tokens"].update(attach="7")), "tokens.attach must be"),
    "a text for columns": (with_(lambda r: r["data"].update(unused="x")), "data.unused must be"),
}


@pytest.mark.fault(9, 38, 39)
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_whole_run_is_named_and_not_cached_and_stays(name, tmp_path):
    damage, said = FAULTS[name]
    store = Store(tmp_path / RESULTS)
    spec, other = kept(store.folder).spec, kept(store.folder, seed=1).spec
    assert store.find(spec).spec == spec and store.load()[1] == []
    damage(store.folder / spec.folder)
    before = sorted(tmp_path.rglob("*"))
    assert store.find(spec) is None
    records, (line,) = store.load()
    assert [record.spec for record in records] == [other]
    assert spec.folder[:-1] in line and said in line
    assert sorted(tmp_path.rglob("*")) == before


def test_a_run_without_its_model_is_reported_and_run_again(tmp_path):
    store = Store(tmp_path)
    spec = kept(tmp_path).spec
    (model,) = tmp_path.rglob("*.safetensors")
    os.truncate(model, SAVED - 1)
    assert store.find(spec) is None and len(store.load()[0]) == 1
    model.unlink()
    assert store.find(spec) is None and store.load()[1] == []
    model.symlink_to("nowhere.safetensors")
    assert store.find(spec) is None and store.load()[1] == []


def test_a_run_whose_model_had_no_room_is_reported_and_run_again_from_its_last_checkpoint(tmp_path):
    store = Store(tmp_path)
    spec = kept(tmp_path, command="old").spec
    for number, anew in enumerate((False, False, True)):
        folder = store.attempt(spec, anew)
        there = [path.name for path in folder.glob(f"{CHECKPOINTS}/*")]
        assert there == (["000000060"] if number == 1 else []), "forced, it begins anew"
        (folder / CHECKPOINTS / "000000060").mkdir(parents=True, exist_ok=True)
        found = attempted_in(folder, spec, "new")
        found.sizes.saved_bytes = None
        shutil.rmtree(folder / MODEL)
        store.keep(spec, found)
        (record,), corrupt = store.load()
        assert record.command == "new" and not corrupt and store.find(spec) is None
        assert (tmp_path / spec.folder / CHECKPOINTS / "000000060").is_dir()
    store.keep(spec, attempted(store, spec, "newest"))
    assert store.find(spec).command == "newest" and not list(tmp_path.rglob(CHECKPOINTS))


@pytest.mark.parametrize("indent, newline", [(None, "\n"), (3, "\r\n")])
def test_a_record_that_is_set_out_otherwise_is_the_same(indent, newline, tmp_path):
    found = fabricate.record("lora", notes={"by layer": {2: 0.1, 10: 1e-9}, "odd": "\ud800 é"})
    path = tmp_path / RECORD
    value = json.loads(found.to_json())
    path.write_text(json.dumps(dict(reversed(value.items())), indent=indent), "utf-8", newline=newline)
    assert RunRecord.from_json(path.read_text("utf-8")).sealed
    del value[SEAL]
    assert not RunRecord.from_json(json.dumps(value)).sealed


def test_a_record_of_a_version_that_asked_for_less_is_still_found(tmp_path):
    """A hyperparameter that has come since has its default; the folder is named after what was asked then."""
    kept(tmp_path)
    (path,) = tmp_path.glob(f"*/{RECORD}")
    edit(path, lambda record: record["spec"]["hp"].pop("packing"))
    wrong = RunRecord.from_json(path.read_text())
    path.parent.rename(tmp_path / wrong.folder)
    (record,), corrupt = Store(tmp_path).load()
    assert not corrupt and record.spec.hp.packing is False
    assert len(Store(tmp_path).outputs(record)) == ROWS


def attempted(store: Store, spec, command: str) -> RunRecord:
    """A second attempt that has ended ok, ready to be kept."""
    return attempted_in(store.attempt(spec), spec, command)


def attempted_in(folder, spec, command: str) -> RunRecord:
    found = fabricate.record(spec.method, spec.seed, command=command)
    test = fabricate.outputs(spec.method, spec.seed, ROWS)
    (folder / OUTPUTS).write_text("".join(json.dumps(output) + "\n" for output in test))
    found.hashes["outputs"] = content_hash(folder / OUTPUTS)
    found.sizes.saved_bytes = model_in(folder)
    return found


@pytest.mark.parametrize("fault", ["a newer schema", "half an output", "a link out", "no record"])
def test_what_cannot_be_read_is_set_aside_and_never_overwritten(fault, tmp_path):
    store = Store(tmp_path / RESULTS)
    spec = kept(store.folder).spec
    for number in (1, 2):
        FAULTS[fault][0](store.folder / spec.folder)
        damaged = {p.name: p.read_bytes() for p in (store.folder / spec.folder).iterdir() if p.is_file()}
        store.keep(spec, attempted(store, spec, "again"))
        aside = store.folder / f"{spec.folder}.aside-{number}"
        assert damaged == {p.name: p.read_bytes() for p in aside.iterdir() if p.is_file()}
        found = store.find(spec)
        assert found.command == "again" and f"moved to {aside.name}" in found.warnings[-1]
        assert store.load()[1] == [], "what was set aside is no fault of the results"
        (tmp_path / "outside").unlink(missing_ok=True)


CALLS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")  # all that change a disk, as Python tells


def killed_at(number: int, action) -> bool:
    """Runs it in a process that is killed before one of its calls. -> whether it was."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0
    try:
        calls = count(1)
        sys.addaudithook(lambda event, _: event in CALLS and next(calls) == number and os._exit(9))
        action()
    finally:
        os._exit(0)


@pytest.mark.fault(40)
@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_at_any_call_loses_neither_the_earlier_run_nor_the_new_one(damaged, tmp_path):
    for number in count(1):
        store = Store(tmp_path / str(number))
        spec = kept(store.folder, command="old").spec
        if damaged:
            FAULTS["half an output"][0](store.folder / spec.folder)
        found = attempted(store, spec, "new")
        killed = killed_at(number, partial(store.keep, spec, found))
        commands = [json.loads(path.read_text())["command"] for path in store.folder.rglob(RECORD)]
        ended = "new" in commands
        assert "old" in commands or (ended and not damaged)
        store.recover()
        standing = store.find(spec)
        if damaged and not ended:
            assert standing is None
        else:
            assert standing.command == ("new" if ended else "old")
        assert len(list(store.folder.glob("*.aside-*"))) == (damaged and ended)
        assert not list(store.folder.glob(".*.earlier"))
        if not killed:
            break
    assert ended and number > 8


def test_one_that_is_not_ok_never_takes_the_place_of_one_that_is(tmp_path):
    store = Store(tmp_path)
    spec = kept(tmp_path, command="old").spec
    store.attempt(spec)
    store.keep(spec, fabricate.record("lora", status="failed", error="no"))
    assert store.find(spec).command == "old" and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("killed", ["run", "bench"])
def test_a_run_that_is_forced_and_stopped_goes_on_when_it_is_forced_again(killed, tmp_path):
    store = Store(tmp_path)
    spec = kept(tmp_path, command="old").spec
    (store.attempt(spec, anew=True) / CHECKPOINTS / "000000004").mkdir(parents=True)
    append(tmp_path / f".{spec.folder}" / EVENTS, {"step": 5, "seconds": 2.0})
    if killed == "run":
        (tmp_path / f".{spec.folder}" / ".result.json.ab12.part").touch()
        store.keep(spec, fabricate.record("lora", status="interrupted", error="killed"))
    assert store.find(spec).command == "old"
    folder = store.attempt(spec, anew=True)
    assert (folder / CHECKPOINTS / "000000004").is_dir()
    assert (folder / CHECKPOINTS / EARLIER_EVENTS).is_file(), "what was lost is known"
    store.keep(spec, attempted_in(folder, spec, "new"))
    assert store.find(spec).command == "new" and not list(tmp_path.glob(".*"))


def test_one_that_has_failed_and_is_forced_begins_anew_and_nothing_half_written_stays(tmp_path):
    store = Store(tmp_path)
    spec = fabricate.record("lora").spec
    folder = store.attempt(spec)
    (folder / CHECKPOINTS / "000000004").mkdir(parents=True)
    (folder / ".result.json.ab12.part").touch()
    store.keep(spec, fabricate.record("lora", status="interrupted", error="killed"))
    assert {path.name for path in store.path(spec).iterdir()} == {RECORD, CHECKPOINTS}
    assert (
        list(store.attempt(spec, anew=True).iterdir()) == [] and not (store.path(spec) / CHECKPOINTS).exists()
    )


def test_a_run_without_the_untouched_models_answers_is_run_again_once_they_are_there(tmp_path, monkeypatch):
    store, asked = Store(tmp_path), []
    base = kept(tmp_path, "base", status="failed", error="killed")
    for seed, hashes in enumerate(({"before": None}, {"before": "5e1f"}, {})):  # {}: before it was recorded
        kept(tmp_path, seed=seed, hashes=hashes)
    specs = Plan([base.spec, *(fabricate.record("lora", seed).spec for seed in range(3))], [0, 1, 2])

    class Silent:
        start = end = event = lambda *_: None

    def run(spec, *_):  # no child: only who is asked to run matters here
        asked.append((spec.method, spec.seed))
        return base if spec.method == "base" else fabricate.record("lora", spec.seed)

    monkeypatch.setattr(attempt, "run", run)
    monkeypatch.setattr(places, "Nursery", lambda *_: nullcontext())
    monkeypatch.setattr(places, "slots", lambda *_: [attempt.Slot()])
    list(bench.bench(specs, store, "", Silent()))
    assert asked == [("base", 0)], "the untouched model has failed again"
    fabricate.keep(tmp_path, replace(base, status="ok", error=None))
    asked.clear()
    list(bench.bench(specs, store, "", Silent()))
    assert asked == [("lora", 0)]


def test_many_may_write_one_file_at_once(tmp_path):
    texts = [str(i) * 10_000 for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda text: [save(tmp_path / "report.md", text) for _ in range(20)], texts))
    assert (tmp_path / "report.md").read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["report.md"]


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}


@pytest.mark.fault(45)
@pytest.mark.parametrize("locale", [{}, ASCII])
def test_what_a_record_says_is_shown_and_never_obeyed_by_a_terminal(locale, tmp_path):
    evil = "\x1b]0;owned\x07 \x9b2J \ud800 \u202e é"
    found = fabricate.record("lora", status="failed", error=evil, model=evil)
    (tmp_path / found.spec.folder).mkdir()
    save(tmp_path / found.spec.folder / RECORD, found.to_json())
    (tmp_path / f"{evil.partition(' ')[0]}-s0-0123456789ab").mkdir()  # no record in it: named
    command = [sys.executable, str(ROOT / "run_bench.py"), "list", "results", "--results", str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, **locale}, capture_output=True, cwd=tmp_path, check=True
    )
    shown = (done.stdout + done.stderr).decode("ascii" if locale else "utf-8")
    assert not set("\x1b\x07\x9b\u202e") & set(shown)
    assert "U+001B" in done.stdout.decode("ascii", "replace") and b"U+001B" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_lone_surrogate_costs_no_record(tmp_path):
    """As in the error of a file whose name is not UTF-8."""
    found = fabricate.record("lora", status="failed", error="no file \udce9")
    save(tmp_path / RECORD, found.to_json())
    assert RunRecord.from_json((tmp_path / RECORD).read_text("utf-8")).error == found.error
    append(tmp_path / "events.jsonl", {"error": "\udce9"})
    assert json.loads((tmp_path / "events.jsonl").read_text("utf-8")) == {"error": "\udce9"}


def test_the_command_check_names_what_is_not_whole_and_changes_nothing(tmp_path, capsys):
    folder, kept = tmp_path / "results", []
    for seed in range(3):
        found = fabricate.record("lora", seed)
        found.sizes.saved_bytes = 5 if seed == 1 else 0
        found.hashes["model"] = digest([hashlib.sha256(b"whole").hexdigest()]) if seed == 1 else None
        kept.append(folder / fabricate.keep(folder, found).spec.folder)
    first, second, third = kept
    (second / MODEL).mkdir()
    (second / MODEL / "model.safetensors").write_bytes(b"whole")
    assert main(["check", str(folder)]) == 0 and "3 of 3 runs" in capsys.readouterr().out
    (first / OUTPUTS).write_text((first / OUTPUTS).read_text()[:-40])
    (second / MODEL / "model.safetensors").write_bytes(b"whole"[::-1])  # as long
    damaged = folder / f".{third.name}" / CHECKPOINTS / "000000007"
    damaged.mkdir(parents=True)
    by_hand(third / RECORD, lambda record: record.update(sizes={}))
    (damaged / "state.json").write_text("{}")
    (damaged / MARK).write_text(json.dumps({"state.json": hashlib.sha256(b"[]").hexdigest()}))
    (folder / f".{third.name}.stopped").mkdir()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    code, said = main(["check", str(folder)]), capsys.readouterr().out
    assert code == 1 and f"FIX  {first}: {OUTPUTS}, line" in said
    assert f"FIX  {damaged}: not as it was written" in said and "0 of 3 runs" in said
    assert f"FIX  {third}: record.json was changed since the run" in said
    assert f"FIX  {second}: its model" in said and f"note {folder / ('.' + third.name)}: goes on" in said
    assert f"note {folder / ('.' + third.name)}.stopped: goes on when its run is forced" in said
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
