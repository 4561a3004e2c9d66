"""The command check: of a method what every one must hold, of results whether they are whole."""

import json
import os
from pathlib import Path

from harness.cli.arguments import OK, SOME_FAILED
from harness.errors import BadRequest, absent
from harness.plain import plain
from harness.record import RunRecord
from harness.store import CHECKPOINTS, MODEL, RUN, STOPPED, Store, intact, weights_digest

AGAIN = "the command that made it runs it again"


def check(options) -> int:
    folder = Path(os.path.expanduser(options.what))
    return check_results(folder, options.json) if folder.is_dir() else check_method(options)


def check_results(folder: Path, as_json: bool) -> int:
    """Reads all that is there, as a report would, and changes nothing."""
    store = Store(folder)
    records, wrong = store.load()
    broken = [r for r in records if r.ok and not (store.find(r.spec) and as_saved(folder, r))]
    wrong += [f"{folder / r.folder}: its model {fault(folder, r)}" for r in broken]
    whole, runs = len(records) - len(broken), len(records) - len(broken) + len(wrong)
    notes = [f"{folder / r.folder}: {r.error or r.status}" for r in records if not r.ok]
    if loose := sum(not record.sealed for record in records):
        notes.append(
            f"{folder}: an edit would not be seen in records of earlier versions, of which it has {loose}"
        )
    stopped = [path.parent for path in sorted(folder.glob(f".*/{CHECKPOINTS}"))]
    wrong += [
        f"{path}: not as it was written: it will not be used"
        for run in stopped
        for path in sorted((run / CHECKPOINTS).glob("[0-9]*"))
        if not intact(path)
    ]
    notes += [
        f"{path}: goes on when it is asked for again" for path in stopped if RUN.fullmatch(path.name[1:])
    ]
    forced = sorted(folder.glob(STOPPED.format("*")))
    notes += [f"{path}: goes on when its run is forced again; else it can be removed" for path in forced]
    notes += [f"{path}: was set aside, and is in no report" for path in sorted(folder.glob("*.aside-*"))]
    if not runs:
        below = sorted({path.parent.parent for path in folder.glob("*/*/record.json")})
        near = f": try {', '.join(map(str, below[:3]))}" if below else ""
        raise BadRequest(f"{folder} holds no runs{near}")
    if as_json:
        print(json.dumps({"whole": whole, "wrong": wrong, "notes": notes}, indent=1))
        return SOME_FAILED if wrong else OK
    print(f"ok   whole, in record, outputs, hashes and model: {whole} of {runs} runs")
    for line in notes:
        print(plain(f"note {line}"))
    for line in wrong:
        print(plain(f"FIX  {line}\n     -> {AGAIN}"))
    return SOME_FAILED if wrong else OK


def fault(folder: Path, record: RunRecord) -> str:
    if record.lacks_model:
        return "was not saved"
    there = (folder / record.folder / MODEL).is_dir()
    return "is not as it was saved" if there else "is not there: its scores are, and a report has them"


def as_saved(folder: Path, record: RunRecord) -> bool:
    """By the digest of its weights, which records of earlier versions lack."""
    expected = record.hashes.get("model")
    return expected is None or weights_digest(folder / record.folder / MODEL) == expected


def check_method(options) -> int:
    spec = one_run(options.what, options.set)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch is imported: a check is on the CPU
    import warnings

    from transformers.utils import logging as hints

    from harness.contract import Stage, examine

    warnings.simplefilter("ignore")  # the libraries' own, on what the harness calls
    hints.set_verbosity_error()
    hints.disable_progress_bar()
    findings, marks = [], {True: "ok  ", False: "FIX ", None: "-   "}
    for finding in examine(Stage.of(spec)):
        findings.append(finding)
        if not options.json:
            print(plain(f"{marks[finding.ok]} {finding.holds}"))
            if finding.says:
                print(plain(f"     -> {finding.says}"))
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    return SOME_FAILED if any(finding.ok is False for finding in findings) else OK


def one_run(text: str, settings: list[str]):
    """The spec of a run of one method, by its name or its file, on the demo."""
    from harness.plan import Request, plan

    file = Path(os.path.expanduser(text))
    own = file.suffix == ".py" or os.sep in text
    if own and (reason := absent(file, "file")):
        raise BadRequest(reason)
    name = file.stem if own else text
    spec = plan(Request(methods=[name], plugins=[text] * own, seeds=[0], settings=settings))[-1]
    if not spec.trains:
        raise BadRequest(f"{name} trains nothing: there is nothing to check")
    return spec
