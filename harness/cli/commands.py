"""What each command does: options and what was typed in, an exit status out. Raises BadRequest."""

import json
import os
import shlex
import shutil
import sys
from contextlib import suppress
from math import inf

from harness.cli.arguments import OK, RUNS_AGAIN, SOME_FAILED, program
from harness.errors import BadRequest, Problems, absent, reason, unreadable, unwritable
from harness.plain import plain, redacted


def run_command(options, typed: list[str]) -> int:
    from harness import bench
    from harness.cli import models, planning, progress
    from harness.store import Store
    from harness.tracking import Tracking

    specs, store = planned(options, bool(options.on), keep=True), Store(options.results)
    where = bench.chosen(options.on, options.gpus)
    planning.before_runs(specs, store, options)  # it makes copies of this process, which has no threads yet
    watcher = progress.make(sys.stderr if options.json else sys.stdout, specs)
    tracking = Tracking(options.track_with, options.results, options.reports / "tracking")
    done: list = []
    command, stopped = command_line(typed), None
    try:
        with bench.lock(options.results):
            limits = options.time_limit, options.checkpoints, options.stall_limit
            for ended in bench.bench(specs, store, command, watcher, options.force, *limits, where):
                done.append(ended)
                if not ended.cached:
                    tracking.tell(store.path(ended.record.spec).name)
    except BadRequest:
        raise
    except KeyboardInterrupt as signalled:
        stopped = signalled
    except (OSError, ValueError) as error:  # a full disk, a record that was tampered with
        return unfinished(error, done, specs)
    finally:
        watcher.close()
        for note in tracking.close():
            complain(f"note: {note}")
    try:
        if done or not stopped:
            tell(done, store, options)
            models.describe_all(store, specs, done)
    except (OSError, ValueError) as error:
        return unfinished(error, done, specs)
    finally:
        if stopped:
            raise stopped
    return SOME_FAILED if failed(done) or any(ended.record.lacks_model for ended in done) else OK


def unfinished(error: Exception, done: list, specs: list) -> int:
    complain(
        f"error: {reason(error)}. {len(done)} of {len(specs)} runs are kept; the same command continues."
    )
    return SOME_FAILED


def tell(done: list, store, options) -> None:
    """Writes the report of what there is, and says what was found."""
    report, files = reported(store, options)
    if options.json:
        runs = [as_json(ended) for ended in done]
        print(json.dumps({"runs": runs, "reports": files}, indent=1))
    else:
        print_runs(done)
        print(conclusion(report, [ended.record for ended in done]))
        print("report: " + "  ".join(files), flush=True)


def planned(options, elsewhere: bool, keep: bool = False):
    """The plan of a request, or every problem, those of the folders included. `elsewhere`, `keep`: as a
    request and its plan have them."""
    from harness.plan import Request, plan
    from harness.tracking import missing as untracked

    typed = ("methods", "preset", "model", "dataset", "seeds", "plugins")
    request = Request(**{name: getattr(options, name) for name in typed},
                      sources=options.source, settings=options.set, sweeps=options.sweep,
                      tracks=options.track, trials=options.trials, repeat=options.repeat,
                      ensembles=options.ensemble, elsewhere=elsewhere)  # fmt: skip
    problems, found = Problems(), None
    with problems.caught():
        found = plan(request, keep)
    for folder in ("results", "reports"):
        problems.add(f"--{folder}", unwritable(getattr(options, folder)))
    if found and not problems:
        problems.add("--results", room(found, options))
    problems.extend(untracked(getattr(options, "track_with", ())))
    if getattr(options, "on", None) or getattr(options, "gpus", ()):
        from harness.bench import chosen

        with problems.caught():
            chosen(options.on, options.gpus)
    if "pdf" in getattr(options, "format", ()):
        from harness.report import REMEDY, missing

        problems.add("--format pdf", missing(), REMEDY)
    problems.refuse()
    return found


def room(specs, options):
    """Why there is none on the disk for what the runs that are not there yet will leave."""
    from harness.preflight import crowded
    from harness.store import Store

    store = Store(options.results)
    runs = [spec for spec in specs if options.force or not store.find(spec)]
    runs += [tuning.trial for tuning in specs.tunings for _ in specs.seeds]  # whatever is found best
    problem, note = crowded(runs, options.results)
    if note and vars(options).get("checkpoints"):
        complain(f"note: {note}")
    return problem


def as_json(ended) -> dict:
    record = ended.record
    return {
        "run": record.spec.folder,
        "status": record.status,
        "error": record.error,
        "cached": ended.cached,
        "scores": record.scores,
    }


def print_runs(done: list) -> None:
    """What the table does not say of them."""
    from harness.bench import stale

    cached = [ended.record for ended in done if ended.cached]
    print(f"{len(cached)} of {len(done)} cached")
    for record in cached:
        if stale(record):
            print(f"stale: {record.spec.folder}: {RUNS_AGAIN}")
    for ended in done:
        for warning in ended.record.warnings if not ended.cached else []:
            print(plain(f"note: {ended.record.spec.folder}: {warning}"))
    for record in failed(done):
        print(plain(f"not ok: {record.spec.folder}: {record.status}: {record.error}"))


def failed(done: list) -> list:
    """The records of runs that should have been ok: that a trial diverges is what a search finds out."""
    records = [ended.record for ended in done if not ended.record.ok]
    return [record for record in records if not (record.spec.trial and record.status == "diverged")]


def plan_command(options, typed: list[str]) -> int:
    from harness.cli import planning
    from harness.store import Store

    return planning.show(planned(options, bool(options.memory)), Store(options.results), options)


def list_command(options, typed: list[str]) -> int:
    from harness import method
    from harness.cli import listing
    from harness.data import dataset_names, load_spec
    from harness.plan import find_plugins, load_preset, preset_names
    from harness.store import Store

    problems, asked = Problems(), options.what
    found: dict[str, dict] = {}
    plugins = find_plugins(options.plugins, problems)
    problems.add("--results", unreadable(options.results))
    if asked in (None, "methods"):
        with problems.caught():
            sources = method.known_methods(plugins)
            found["methods"] = {n: method.summary(s) for n, s in sources.items()}
            found["variants"] = {n: own for n, s in sources.items() if (own := method.variants(n, s))}
    problems.refuse()
    if asked in (None, "datasets"):
        found["datasets"] = {n: title(lambda _, n=n: load_spec(n, {})["title"]) for n in dataset_names()}
    if asked in (None, "presets"):
        found["presets"] = {n: title(lambda said, n=n: load_preset(n, said).title) for n in preset_names()}
    records, corrupt = Store(options.results).load() if asked in (None, "results") else ([], [])
    for line in corrupt:
        complain(f"error: corrupt: {line}")
    if options.json:
        results = (
            {"results": {r.folder: listing.run(r) for r in records}} if asked in (None, "results") else {}
        )
        print(json.dumps(found | results, indent=1))
        return OK
    of_family = found.pop("variants", {})
    for what, items in found.items():
        print(listing.names(what, items, of_family if what == "methods" else {}))
    if asked in (None, "results"):
        print(listing.results(records))
    return OK


def title(read) -> str:
    """Of a preset or a dataset; what is wrong with its file, where something is."""
    problems, text = Problems(), ""
    with problems.caught():
        text = read(problems)
    return f"cannot be read: {'; '.join(map(str, problems))}" if problems else text


def data_command(options, typed: list[str]) -> int:
    from rich.console import Console

    from harness.cli import preview
    from harness.plan import Request

    if options.name is None and options.preset is None:
        print(json.dumps(preview.mappings()) if options.json else preview.mappings())
        return OK
    request = Request(preset=options.preset, dataset=options.name, model=options.model,
                      sources=options.source, settings=options.set)  # fmt: skip
    found = preview.preview(request, options.rows)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        preview.show(found, Console())
    return OK


def report_command(options, typed: list[str]) -> int:
    from harness.store import Store

    problems = Problems()
    problems.add("--results", unreadable(options.results))
    problems.add("--reports", unwritable(options.reports))
    problems.refuse()
    try:
        report, files = reported(Store(options.results), options)
    except (OSError, ValueError) as error:
        raise BadRequest(reason(error)) from error
    if options.json:
        print(json.dumps(files, indent=1))
    else:
        print(conclusion(report))
        print("report: " + "  ".join(files))
    return OK if len(files) == len(dict.fromkeys(options.format)) else SOME_FAILED


def reported(store, options) -> tuple:
    """-> the report, and the documents that were written; of what cannot be written here, the reason is
    told. Raises OSError, ValueError."""
    from harness.report import Report, Unwritten, earlier, write

    report = Report.of(store, budget(options))
    try:
        files = write(report, options.reports, tuple(dict.fromkeys(options.format)))
    except Unwritten as error:
        complain(f"error: {error}")
        files = error.written
    if report.corrupt:
        complain(
            f"note: not in the report, as it cannot be read: {report.corrupt[0]}"
            + f"; {len(report.corrupt) - 1} more" * (len(report.corrupt) > 1)
            + f"; `check {options.results}` names all"
        )
    if stale := earlier(report, options.reports, files):
        named = ", ".join(map(str, stale))
        complain(f"note: not rendered now, and perhaps of other runs or another budget: {named}")
    return report, [str(file) for file in files]


def conclusion(report, records: list | None = None) -> str:
    from harness import report as reports

    return reports.conclusion(report, records, shutil.get_terminal_size().columns) + "\n"


def budget(options):
    """What --memory and --hours leave."""
    from harness.report import Budget

    size, binary = options.memory or (inf, True)
    return Budget(size, options.hours or inf, binary)


def grade_command(options, typed: list[str]) -> int:
    import time

    from harness.grade import Grades, Sheet, serving
    from harness.report import contestants
    from harness.store import Store

    problems, store = Problems(), Store(options.results)
    problems.add("--results", absent(options.results, "folder") or unwritable(options.results))
    problems.refuse()
    title, runs = contestants(store, options.comparison, options.methods or [])
    sheet = Sheet.drawn(title, store, runs, options.prompts, options.seed)
    grades = Grades(options.results)
    with serving(sheet, grades, options.port) as address:
        if options.json:
            print(json.dumps({"address": address, "grades": str(grades.folder)}), flush=True)
        else:
            print(plain(f"{title}: {sheet.answers} answers to {len(sheet.questions)} prompts"))
            print(
                f"open {address}\nCtrl-C ends; each grade is kept in {grades.folder} as it is given",
                flush=True,
            )
        with suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)
    if not options.json:
        print(f"\n{program()} report puts the grades in the report")
    return OK


def merge_command(options, typed: list[str]) -> int:
    from harness.cli import models

    return models.merge(options)


def push_command(options, typed: list[str]) -> int:
    from harness.cli import models

    return models.push(options)


def attention_command(options, typed: list[str]) -> int:
    from harness.cli import models

    return models.attention(options)


def lm_eval_command(options, typed: list[str]) -> int:
    from harness.cli import tasks

    return tasks.lm_eval(options)


def doctor_command(options, typed: list[str]) -> int:
    from harness.doctor import examine

    findings, marks = examine(), {"ok": "ok  ", "note": "note", "wrong": "FIX "}
    if options.json:
        print(json.dumps(findings, indent=1))
    else:
        for finding in findings:
            remedy = f"\n     -> {finding['remedy']}" if finding["remedy"] else ""
            print(f"{marks[finding['state']]} {finding['what']}{remedy}")
    return SOME_FAILED if any(f["state"] == "wrong" for f in findings) else OK


def check_command(options, typed: list[str]) -> int:
    from harness.cli import checking

    return checking.check(options)


COMMANDS = {
    "run": run_command, "plan": plan_command, "list": list_command, "data": data_command,
    "check": check_command, "report": report_command, "grade": grade_command, "merge": merge_command,
    "push": push_command, "attention": attention_command, "lm-eval": lm_eval_command,
    "doctor": doctor_command,
}  # fmt: skip


def command_line(typed: list[str]) -> str:
    """As it was typed, the home folder written as ~."""
    text = shlex.join([program(), *typed])
    home = os.path.expanduser("~").rstrip("/")  # empty where it is / itself
    return redacted(text.replace(home + "/", "~/") if home else text)


def complain(text: str) -> None:
    with suppress(OSError):  # the terminal is gone
        print(plain(redacted(text)), file=sys.stderr)
