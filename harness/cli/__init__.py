"""The command line: arguments become a plan, a bench and a report.

Nothing heavy is imported before it is needed, so that help and mistakes answer at once.
"""

import argparse
import io
import json
import logging
import os
import shlex
import signal
import sys
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path

from harness.errors import brief, redacted, writable
from harness.plain import plain

OK, SOME_FAILED, BAD_REQUEST, SIGNALLED = 0, 1, 2, 128  # and the signal's number, as shells have it
COMMANDS = ("run", "list", "plan", "data", "check", "report", "doctor")
EPILOG = """examples:
  run_bench.py --methods qlora galore                   the demo: real parts, small, no GPU needed
  run_bench.py --methods full lora --model DIR --dataset rows.jsonl --set hp.learning_rate=1e-4
  run_bench.py plan --preset NAME                       what would run, what is cached
  run_bench.py report                                   the report again, from cached results

exit status: 0 all runs ok, 1 some run is not, 2 bad request (nothing started), 130 interrupted,
143 ended by SIGTERM, 129 by SIGHUP
"""


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in COMMANDS else "run"
    rest = arguments[1:] if arguments and arguments[0] in COMMANDS else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal lacks is written as its number
            stream.reconfigure(errors="backslashreplace")
    made = parser(command)
    if odd := next((text for text in rest if not writable(text)), None):
        made.error(f"{brief(odd)} is not UTF-8 text: no record could name it")
    if lost := next((text for text in rest if text.startswith("--") and text.endswith("=--")), None):
        made.error(f"{lost}: -- is no value")  # argparse would drop it
    options = made.parse_args(rest)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its hints on kernels are no use here
    from harness.bench import STOPPING

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, or a script's &, has it
            signal.signal(number, interrupt)
    commands = {"run": run, "plan": plan, "list": show, "data": look, "check": check, "report": report,
                "doctor": doctor}  # fmt: skip
    try:
        with alone() if options.json else nullcontext():
            return commands[command](options, arguments)
    except KeyboardInterrupt as ended:
        complain("interrupted. What had ended is kept; the same command continues.")
        return SIGNALLED + (ended.args[0] if ended.args else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:  # the folder that this was started in is gone, a disk is full
        complain(str(error) if error.filename else f"{error}: is the current folder still there?")
        return BAD_REQUEST


@contextmanager
def alone():
    """Standard output is for one JSON value: what anybody else writes there, as a plugin's import through a
    shell, goes to standard error."""
    if sys.stdout is not sys.__stdout__ or not (sys.stdout and sys.stderr):  # it is taken, or there is none
        yield
        return
    with open(os.dup(1), "w", encoding=sys.stdout.encoding, errors="backslashreplace") as own:
        os.dup2(2, 1)
        try:
            with redirect_stdout(own):
                yield
        finally:
            sys.__stdout__.flush()
            os.dup2(own.fileno(), 1)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Also of what was typed by accident: a token, an escape."""
        super().error(plain(redacted(message)))


class Once(argparse.Action):
    """Of two values the last would hold in silence."""

    def __call__(self, parser, namespace, value, option_string=None):
        if getattr(namespace, self.dest) is not self.default:
            parser.error(f"{option_string} is given twice")
        setattr(namespace, self.dest, value)


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    return Path(os.path.expanduser(text))


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on, not {text!r}")
    return int(text)


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


def parser(command: str) -> argparse.ArgumentParser:
    about = {
        "run": "Compares fine-tuning methods on one model and dataset. Commands: run (the default), "
        "list, plan, data, check, report, doctor; each has its own --help.",
        "plan": "What a run with the same arguments would do, and what is cached. Starts nothing.",
        "list": "What can be asked for.",
        "data": "What a model will see of a dataset: rows with what is learned marked, lengths, what is cut.",
        "check": "Tries what every method must hold on one of your own, trained on the demo for some steps.",
        "report": "Renders the report again from cached results. Needs no torch.",
        "doctor": "What this machine has, what is wrong with it, and the remedy.",
    }
    made = Parser(
        prog="run_bench.py" + ("" if command == "run" else f" {command}"),
        description=about[command],
        epilog=EPILOG if command == "run" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    if command in ("run", "plan"):
        add(
            "--methods",
            nargs="+",
            action="extend",
            metavar="NAME",
            help="methods to compare (see: list methods)",
        )
        add(
            "--preset",
            action=Once,
            metavar="NAME|FILE",
            help="a whole comparison (see: list presets); demo if no model or dataset is named",
        )
        add(
            "--model",
            action=Once,
            metavar="ID|DIR",
            help="hub id or folder; random:DIR draws the weights, to measure cost alone",
        )
        add(
            "--dataset",
            action=Once,
            metavar="NAME|FILE|DIR",
            help="a spec (see: list datasets), or a file or folder of rows",
        )
        add(
            "--source",
            metavar="NAME=PATH",
            nargs="+",
            action="extend",
            default=[],
            help="a local copy in place of the hub, for a part of the dataset",
        )
        add(
            "--seeds",
            nargs="+",
            action="extend",
            type=int,
            metavar="N",
            help="one run of each method for each; three or more allow a ranking",
        )
        add(
            "--set",
            metavar="KEY=VALUE",
            nargs="+",
            action="extend",
            default=[],
            help="hp.NAME, data.NAME or METHOD.OPTION",
        )
        add(
            "--plugins",
            nargs="+",
            metavar="FILE",
            action="extend",
            default=[],
            help="files that each define a method",
        )
        add("--force", action="store_true", help="run again what is cached")
    if command == "run":
        add("--time-limit", type=duration, metavar="TIME",
            help="ends each run that takes longer, as 90s, 30m or 2h (default: none)")  # fmt: skip
    if command == "list":
        add("what", nargs="?", choices=("methods", "datasets", "presets", "results"), help="default: all")
        add(
            "--plugins",
            nargs="+",
            metavar="FILE",
            action="extend",
            default=[],
            help="files that each define a method",
        )
    if command == "data":
        add("name", metavar="NAME|FILE|DIR", nargs="?",
            help="a spec (see: list datasets), or a file or folder of rows; none: all specs' "
            "fields")  # fmt: skip
        add("--preset", action=Once, metavar="NAME|FILE",
            help="whose dataset, model and options, where none is named")  # fmt: skip
        add("--model", action=Once, metavar="ID|DIR",
            help="whose tokenizer; the preset's or the demo's by default")  # fmt: skip
        add("--source", metavar="NAME=PATH", nargs="+", action="extend", default=[],
            help="a local copy in place of the hub, for a part of the dataset")  # fmt: skip
        add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[], help="data.NAME or hp.NAME")
        add("--rows", action=Once, type=count, default=3, metavar="N", help="rows to show (default: 3)")
    if command == "check":
        add("method", metavar="FILE|NAME", help="a file that defines a method, or the name of one")
        add("--set", metavar="KEY=VALUE", nargs="+", action="extend", default=[],
            help="METHOD.OPTION, hp.NAME or data.NAME")  # fmt: skip
    if command not in ("doctor", "data", "check"):
        add(
            "--results",
            action=Once,
            type=folder,
            default=Path("results"),
            metavar="DIR",
            help="where records are kept (default: results)",
        )
    if command in ("run", "plan", "report"):
        add(
            "--reports",
            action=Once,
            type=folder,
            default=Path("reports"),
            metavar="DIR",
            help="where reports are written (default: reports)",
        )
    if command == "report":
        add("--format", action=Once, nargs="+", choices=("md", "html"), default=["md", "html"],
            help="default: both")  # fmt: skip
    add(
        "--json",
        action="store_true",
        help="print one JSON value on standard output, progress on standard error",
    )
    return made


def duration(text: str) -> float:
    """`30m` -> 1800.0 seconds."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        if unit and 0 < (seconds := float(number) * unit) < float("inf"):
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"write it as 90s, 30m or 2h, not {text!r}")


def request(options):
    from harness.plan import Request

    return Request(
        methods=options.methods,
        preset=options.preset,
        model=options.model,
        dataset=options.dataset,
        sources=options.source,
        seeds=options.seeds,
        settings=options.set,
        plugins=options.plugins,
    )


def planned(options):
    """-> specs, or None after telling every error, those of the folders included."""
    from harness import plan as planning

    errors, specs = [], None
    try:
        specs = planning.plan(request(options))
    except planning.BadRequest as error:
        errors += error.errors
    for name in ("results", "reports"):
        folder = getattr(options, name, None)
        if folder and (reason := planning.unwritable(folder)):
            errors.append(f"--{name}: {reason}")
    for error in errors:
        complain(error)
    return None if errors else specs


def run(options, arguments: list[str]) -> int:
    from harness import bench
    from harness.cli import progress
    from harness.store import Store

    specs = planned(options)
    if specs is None:
        return BAD_REQUEST
    store = Store(options.results)
    watcher = progress.make(sys.stderr if options.json else sys.stdout)
    done = []
    try:
        with bench.lock(options.results):
            runs = bench.bench(
                specs, store, command_line(arguments), watcher, options.force, options.time_limit
            )
            for ended in runs:
                done.append(ended)
        files = render(store, options.reports, ("md", "html"))
    except (bench.Busy, bench.Missing) as error:
        for line in str(error).splitlines():
            complain(line)
        return BAD_REQUEST
    except (OSError, ValueError) as error:  # a full disk, a record that was tampered with
        complain(f"{error}. {len(done)} of {len(specs)} runs are kept; the same command continues.")
        return SOME_FAILED
    finally:
        watcher.close()
    records = [ended.record for ended in done]
    cached = [ended.record.spec.folder for ended in done if ended.cached]
    if options.json:
        runs = [
            {
                "run": r.spec.folder,
                "status": r.status,
                "error": r.error,
                "cached": r.spec.folder in cached,
                "scores": {name: score["value"] for name, score in r.scores.items()},
            }
            for r in records
        ]
        print(json.dumps({"runs": runs, "reports": [str(file) for file in files]}, indent=1))
    else:
        print_table(records)
        print(f"{len(cached)} of {len(records)} cached" + (f": {', '.join(cached)}" if cached else ""))
        for ended in done:
            if ended.cached and bench.stale(ended.record):
                print(
                    f"stale: {ended.record.spec.folder}: its method's code has changed; --force runs it again"
                )
        for ended in done:
            for warning in ended.record.warnings if not ended.cached else []:
                print(plain(f"note: {ended.record.spec.folder}: {warning}"))
        for record in records:
            if not record.ok:
                print(plain(f"not ok: {record.spec.folder}: {record.status}: {record.error}"))
        print("report: " + "  ".join(str(file) for file in files))
    return OK if all(record.ok for record in records) else SOME_FAILED


def plan(options, arguments: list[str]) -> int:
    from dataclasses import replace

    from harness.bench import lacks, stale
    from harness.store import Store

    specs = planned(options)
    if specs is None:
        return BAD_REQUEST
    store = Store(options.results)
    rows = []
    for spec in specs:
        earlier = store.find(spec)
        changed = " (its method's code has changed; --force runs it again)"
        state = (
            "will run"
            if earlier is None or options.force
            else f"will run again ({earlier.status})"
            if not earlier.ok
            else "will run again (the untouched model has answers now)"
            if lacks(earlier, specs, store)
            else "cached" + changed * stale(replace(earlier, spec=spec))
        )
        rows.append({"run": spec.folder, "method": spec.method, "seed": spec.seed, "state": state})
    if options.json:
        print(json.dumps(rows, indent=1))
        return OK
    spec = specs[-1]
    print(plain(f"model {spec.model}; dataset {spec.dataset['name']}: {describe_data(spec.dataset)}"))
    print(
        "hyperparameters: "
        + ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in vars(spec.hp).items())
    )
    for part, columns in unused(spec).items():
        print(plain(f"not used of {part}: {', '.join(columns)}"))
    for row in rows:
        print(plain(f"  {row['state']:12} {row['run']}"))
    return OK


def unused(spec) -> dict[str, list[str]]:
    """Part -> its columns that no row is made of, where all parts lie on this machine."""
    from harness.data import cache

    sources = spec.locations["sources"]
    if len(sources) < len(spec.dataset["parts"]):
        return {}
    found = cache.splits_of(spec.dataset, sources).unused
    return {part: columns for part, columns in found.items() if columns}


def describe_data(dataset: dict) -> str:
    from harness.data.splits import describe

    return f"{describe(dataset)} rows of each of {', '.join(part['name'] for part in dataset['parts'])}"


def show(options, arguments: list[str]) -> int:
    from harness import method
    from harness import plan as planning
    from harness.data import splits
    from harness.store import Store

    errors: list[str] = []
    plugins = planning.find_plugins(options.plugins, errors)
    if reason := planning.unreadable(options.results):
        errors.append(f"--results: {reason}")
    found = {}
    if options.what in (None, "methods"):
        try:
            found["methods"] = {n: method.summary(s) for n, s in method.available(plugins).items()}
        except ValueError as error:
            errors.append(str(error))
    if errors:
        for error in errors:
            complain(error)
        return BAD_REQUEST
    if options.what in (None, "datasets"):
        found["datasets"] = {n: title(planning.find_dataset, n, {}) for n in splits.available()}
    if options.what in (None, "presets"):
        found["presets"] = {n: title(planning.load_preset, n) for n in planning.available()}
    if options.what in (None, "results"):
        records, corrupt = Store(options.results).load()
        found["results"] = {r.folder: r.status + (f": {r.error}" if r.error else "") for r in records}
        for line in corrupt:
            complain(f"corrupt: {line}")
    if options.json:
        print(json.dumps(found, indent=1))
        return OK
    for what, items in found.items():
        print(f"{what}:")
        for name, text in items.items():
            print(plain(f"  {name:24} {text}"))
        if not items:
            print("  none")
    return OK


def title(find, *arguments) -> str:
    """Of a preset or a dataset; what is wrong with its file, where something is."""
    errors: list[str] = []
    found = find(*arguments, errors)
    return f"cannot be read: {'; '.join(errors)}" if errors else found["title"]


def look(options, arguments: list[str]) -> int:
    from rich.console import Console

    from harness.cli import preview
    from harness.data.rows import DataError
    from harness.plan import BadRequest

    try:
        if options.name is None and options.preset is None:
            print(json.dumps(preview.mappings()) if options.json else preview.mappings())
            return OK
        found = preview.look(
            options.name, options.model, options.source, options.set, options.rows, options.preset
        )
    except (BadRequest, DataError) as error:
        for line in str(error).splitlines():
            complain(line)
        return BAD_REQUEST
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        preview.show(found, Console())
    return OK


def report(options, arguments: list[str]) -> int:
    from harness import plan as planning
    from harness.store import Store

    for name, reason in (
        ("results", planning.unreadable(options.results)),
        ("reports", planning.unwritable(options.reports)),
    ):
        if reason:
            complain(f"--{name}: {reason}")
            return BAD_REQUEST
    try:
        files = render(Store(options.results), options.reports, tuple(options.format))
    except (OSError, ValueError) as error:
        complain(str(error))
        return BAD_REQUEST
    print(
        json.dumps([str(f) for f in files], indent=1)
        if options.json
        else "report: " + "  ".join(map(str, files))
    )
    return OK


def render(store, folder: Path, formats: tuple[str, ...]) -> list[Path]:
    from harness.report import render as made

    return made(store, folder, formats)


def print_table(records) -> None:
    from tabulate import tabulate

    from harness.report import brief_table

    print()
    print(
        tabulate(
            brief_table(records),
            headers="keys",
            showindex=False,
            disable_numparse=True,
            maxheadercolwidths=12,
        )
    )
    print()


def check(options, arguments: list[str]) -> int:
    from harness.plan import BadRequest

    try:
        spec = checked(options.method, options.set)
    except BadRequest as error:
        for line in error.errors:
            complain(line)
        return BAD_REQUEST
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch is imported: a check is on the CPU
    import warnings

    from transformers.utils import logging as hints

    from harness.contract import Stage, examine

    warnings.simplefilter("ignore")  # the libraries' own, on what the harness calls
    hints.set_verbosity_error()
    hints.disable_progress_bar()
    findings = []
    for finding in examine(Stage.of(spec)):
        findings.append(finding)
        if not options.json:
            mark = {True: "ok  ", False: "FIX ", None: "-   "}[finding.ok]
            print(plain(f"{mark} {finding.holds}") + plain(f"\n     -> {finding.says}") * bool(finding.says))
    if options.json:
        print(json.dumps([vars(finding) for finding in findings], indent=1))
    return SOME_FAILED if any(finding.ok is False for finding in findings) else OK


def checked(text: str, settings: list[str]):
    """-> the spec of one run of a method, by its name or its file, on the demo. Raises BadRequest."""
    from harness.errors import absent
    from harness.plan import BadRequest, Request
    from harness.plan import plan as planned

    file = Path(os.path.expanduser(text))
    own = file.suffix == ".py" or os.sep in text
    if own and (reason := absent(file, "file")):
        raise BadRequest([reason])
    name = file.stem if own else text
    spec = planned(Request(methods=[name], plugins=[text] * own, seeds=[0], settings=settings))[-1]
    if not spec.trains:
        raise BadRequest([f"{name} trains nothing: there is nothing to check"])
    return spec


def doctor(options, arguments: list[str]) -> int:
    from harness.doctor import examine

    findings = examine()
    if options.json:
        print(json.dumps(findings, indent=1))
    else:
        for finding in findings:
            mark = {"ok": "ok  ", "note": "note", "wrong": "FIX "}[finding["state"]]
            print(
                f"{mark} {finding['what']}" + (f"\n     -> {finding['remedy']}" if finding["remedy"] else "")
            )
    return SOME_FAILED if any(f["state"] == "wrong" for f in findings) else OK


def command_line(arguments: list[str]) -> str:
    """As it was typed, the home folder written as ~."""
    text = shlex.join(["run_bench.py", *arguments])
    home = os.path.expanduser("~").rstrip("/")  # empty where it is / itself
    return redacted(text.replace(home + "/", "~/") if home else text)


def complain(text: str) -> None:
    text = redacted(text)
    with suppress(OSError):  # the terminal is gone
        print(plain(f"error: {text}" if not text.startswith("interrupted") else f"\n{text}"), file=sys.stderr)
