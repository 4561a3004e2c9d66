"""What can be typed: the commands and their arguments."""

import argparse
import os
import re
import sys
from pathlib import Path

from harness import __version__
from harness.errors import Problem, brief, unknown, writable
from harness.plain import plain, redacted
from harness.search import TRIALS

OK, SOME_FAILED, BAD_REQUEST, SIGNALLED = 0, 1, 2, 128  # and the signal's number, as shells have it
TOO_LARGE = 3  # something of a plan cannot fit its card
RUNS_AGAIN = "its method's code has changed; --force runs it again"
COMMANDS = {
    "run": "Compares fine-tuning methods on one model and dataset. Commands: run (the default), list, plan, "
    "data, check, report, grade, merge, push, attention, lm-eval, doctor; each has its own --help.",
    "plan": "What a run with the same arguments would do and take of a card, and what is cached. Starts "
    "nothing, but for the steps of --probe.",
    "list": "What can be asked for.",
    "data": "What a model will see of a dataset: rows with what is learned marked, lengths, what is cut. "
    "What was read is kept for a run, as a run would.",
    "check": "Tries what every method must hold on one of your own, trained on the demo for some steps; or "
    "reads a folder of results, and says what in it is not whole.",
    "report": "Renders the report again from cached results. Needs no torch.",
    "grade": "Serves a page, to this machine alone, on which people grade answers without knowing whose.",
    "merge": "Makes a plain model folder, as transformers loads it, of what a finished run has saved.",
    "attention": "What a run's model attends to in one test conversation, before and after: for its report.",
    "lm-eval": "Asks the models of finished runs, and the untouched one, tasks of lm-evaluation-harness: for "
    "the report.",
    "push": "Uploads the model of a finished run to the hub, with its card; private unless --public.",
    "doctor": "What this machine has, what is wrong with it, and the remedy.",
}
EPILOG = """examples:
  {0} --methods qlora galore                   the demo: real parts, small, no GPU needed
  {0} --methods full lora --model DIR --dataset rows.jsonl --set hp.learning_rate=1e-4
  {0} plan --preset NAME                       what would run, what is cached
  {0} report                                   the report again, from cached results
  {0} grade                                    people grade ten answers of each method

exit status: 0 all runs ok, 1 some run is not, 2 bad request (nothing started), 3 of plan: something cannot
fit the card, 130 interrupted, 143 ended by SIGTERM, 129 by SIGHUP
"""


def parse_arguments(typed: list[str]) -> tuple[str, argparse.Namespace]:
    """-> the command and its options. Ends the process with what is wrong with them."""
    named = bool(typed) and typed[0] in COMMANDS
    command, rest = (typed[0], typed[1:]) if named else ("run", typed)
    made = parser(command)
    if odd := next((text for text in rest if not writable(text)), None):
        made.error(f"{brief(odd)} is not UTF-8 text: no record could name it")
    if lost := next((text for text in rest if text.startswith("--") and text.endswith("=--")), None):
        made.error(f"{lost}: -- is no value")  # argparse would drop it
    return command, made.parse_args(rest)


def program() -> str:
    """What it was called as: the script of an installation, or the project's own."""
    return "tuneoff" if Path(sys.argv[0]).stem == "tuneoff" else "run_bench.py"


def parser(command: str) -> argparse.ArgumentParser:
    made = Parser(
        prog=program() if command == "run" else f"{program()} {command}",
        description=COMMANDS[command],
        epilog=EPILOG.format(program()) if command == "run" else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, commands, reading in ARGUMENTS:
        if command in commands:
            made.add_argument(name, **reading)
    return made


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


# Kinds of values


def folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("the name of a folder is empty")
    return Path(os.path.expanduser(text))


def count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a whole number from 0 on, not {text!r}")
    return int(text)


def natural(text: str) -> int:
    if not count(text):
        raise argparse.ArgumentTypeError("a whole number from 1 on, not 0")
    return int(text)


def port(text: str) -> int:
    if natural(text) > 65535:
        raise argparse.ArgumentTypeError(f"a port is at most 65535, not {text!r}")
    return int(text)


def duration(text: str) -> float:
    """`30m` -> 1800.0 seconds."""
    number, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    try:
        if unit and 0 < (seconds := float(number) * unit) < float("inf"):
            return seconds
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"write it as 90s, 30m or 2h, not {text!r}")


def often(text: str) -> float:
    """As a duration, or 0."""
    return 0.0 if text == "0" else duration(text)


DECIMAL = {"GB": 10**9, "MB": 10**6, "TB": 10**12}
BINARY = {"GiB": 2**30, "MiB": 2**20, "TiB": 2**40}
TIMES = {"h": 3600, "hour": 3600, "hours": 3600, "min": 60, "minutes": 60, "m": 60, "s": 1}


def memory(text: str) -> tuple[float, bool]:
    """`24GB` -> (24e9 bytes, whether it was said in units of 1024)."""
    amount, unit = measure(text, DECIMAL | BINARY, "24GB")
    return amount, unit in BINARY


def card(text: str):
    """The name of a card that a forecast knows, as `T4`; else as memory."""
    from harness.forecast import CARDS

    if found := named(text):
        return found
    if text.strip()[:1].isalpha():
        raise argparse.ArgumentTypeError(str(unknown("card", text, CARDS, "16GB")))
    return memory(text)


def room(text: str) -> tuple[float, bool]:
    """As memory, of a named card too."""
    found = named(text)
    return (found.bytes, True) if found else memory(text)


def named(text: str):
    """The card of this name, or none."""
    from harness.forecast import CARDS

    return {name.lower(): found for name, found in CARDS.items()}.get(text.strip().lower().replace(" ", "-"))


def hours(text: str) -> float:
    """`4`, `4h` or `240min` -> seconds."""
    return measure(text, TIMES, "4h", bare="h")[0]


def measure(text: str, units: dict[str, int], example: str, bare: str = "") -> tuple[float, str]:
    """A number above 0 and a unit, in any case, with or without a space between them. -> the amount, in
    units of 1, and the unit. `bare`: that of a number without one."""
    spelled = {unit.lower(): unit for unit in units}
    said = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", text.strip().lower(), re.ASCII)
    unit = spelled.get(said[2] or bare) if said else None
    if said and unit and 0 < (amount := float(said[1]) * units[unit]) < float("inf"):
        return amount, unit
    number, letters = re.search(r"[0-9]{1,9}([.,][0-9]{1,9})?", text), re.search(r"[a-z]", text.lower())
    alike = (unit for unit in units if letters and unit[0].lower() == letters[0])
    right = number[0].replace(",", ".") if number and number[0].strip("0.,") else example.rstrip("GBh")
    nearest = right + next(alike, example.lstrip("0123456789"))
    wrong = Problem(f"a number above 0 and a unit, not {brief(text)}", "", nearest, tuple(units))
    raise argparse.ArgumentTypeError(str(wrong))


# The arguments, each with the commands that take it


def once(metavar: str, help: str, **more) -> dict:
    return {"action": Once, "metavar": metavar, "help": help, **more}


def several(metavar: str, help: str, **more) -> dict:
    return {"action": "extend", "nargs": "+", "metavar": metavar, "help": help, **more}


def flag(help: str) -> dict:
    return {"action": "store_true", "help": help}


ASKING, WITHIN, KEPT = ("run", "plan"), ("run", "report"), ("merge", "push", "attention", "lm-eval")
LISTS = ("methods", "datasets", "presets", "results")
ROWS = 3  # of a dataset that are shown: more than one, and they fit a screen
PROMPTS = 10  # whose answers people grade: what the brief asks for
# As accelerate calls them, and pip.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
FORMATS = ("md", "html", "pdf", "csv", "json", "tex")
DATASET = "a spec (see: list datasets), or a file or folder of rows"
ARGUMENTS = (
    ("what", ["list"], {"nargs": "?", "choices": LISTS, "help": "default: all"}),
    ("name", ["data"], {"nargs": "?", "metavar": "NAME|FILE|DIR",
                        "help": f"{DATASET}; none: all specs' fields"}),
    ("what", ["check"], {"metavar": "FILE|NAME|DIR", "help": "a file that defines a method, its name, or a "
                         "folder of results"}),
    ("run", KEPT[:2], {"metavar": "RUN", "help": "a finished run: its id (see list results), or method"}),
    ("runs", ["attention"], {"nargs": "+", "metavar": "RUN", "help": "as merge takes it"}),
    ("tasks", ["lm-eval"], {"nargs": "+", "metavar": "TASK", "help": "a task or a group of lm_eval"}),
    ("--runs", ["lm-eval"], several("RUN", "as merge takes it (default: all that have kept a model)",
                                    default=[])),
    ("--include-path", ["lm-eval"], once("DIR", "a folder of further tasks, your own", type=folder)),
    ("--num-fewshot", ["lm-eval"], once("N", "examples before each question (default: the task's own)",
                                        type=count)),
    ("--limit", ["lm-eval"], once("N", "the first so many rows of each task (default: all)", type=natural)),
    ("--force", ["lm-eval"], flag("ask again what was asked before")),
    ("repo", ["push"], {"metavar": "OWNER/NAME", "help": "of the repository on the hub"}),
    ("--to", ["merge"], once("DIR", "the new folder (default: merged, beside the run's model)", type=folder)),
    ("--merged", ["push"], flag("the merged model, made first where it is not there, in place of what the "
                                "run saved")),
    ("--public", ["push"], flag("everybody may see the repository")),
    ("--methods", ASKING, several("NAME", "methods to compare (see: list methods)")),
    ("--preset", ASKING, once("NAME|FILE", "a whole comparison (see: list presets); demo if no model or "
                              "dataset is named")),
    ("--preset", ["data"], once("NAME|FILE", "whose dataset, model and options, where none is named")),
    ("--model", ASKING, once("ID|DIR", "hub id or folder; random:DIR draws the weights, to measure cost "
                             "alone")),
    ("--model", ["data"], once("ID|DIR", "whose tokenizer; the preset's or the demo's by default")),
    ("--model", KEPT, once("ID|DIR", "the run's base, where the run knows it as a folder that lies elsewhere "
                           "now: that folder, or its hub id")),
    ("--dataset", ASKING, once("NAME|FILE|DIR", DATASET)),
    ("--source", (*ASKING, "data"), several("NAME=PATH", "a local copy in place of the hub, for a part of "
                                            "the dataset", default=[])),
    ("--seeds", ASKING, several("N", "one run of each method for each; three or more allow a ranking",
                                type=int)),
    ("--set", ASKING, several("KEY=VALUE", "hp.NAME, data.NAME or METHOD.OPTION", default=[])),
    ("--set", ["check"], several("KEY=VALUE", "METHOD.OPTION, hp.NAME or data.NAME", default=[])),
    ("--sweep", ASKING, several("METHOD.NAME=VALUE,VALUE", "a row for each value of an option or a "
                                "hyperparameter of one method", default=[])),
    ("--ensemble", ASKING, several("METHOD+METHOD", "rows of their own for the finished runs of these "
                                   "methods together: outputs averaged, and weights where all can be merged",
                                   default=[])),
    ("--track", ASKING, {"action": Once, "nargs": "+", "choices": ("identical", "tuned"),
                         "default": ["identical"], "help": "identical: the same hyperparameters for all (the "
                         "default); tuned: each method's own best, by as many trials each on the validation "
                         "rows; or both"}),
    ("--trials", ASKING, once("N", f"of the tuned track, for each method (default: {TRIALS})", type=natural,
                              default=TRIALS)),
    ("--repeat", ASKING, once("N", "times to run the first run again, unchanged: how far apart it comes out "
                              "is the noise floor (default: 0)", type=count, default=0)),
    ("--set", ["data"], several("KEY=VALUE", "data.NAME or hp.NAME", default=[])),
    ("--rows", ["data"], once("N", f"rows to show (default: {ROWS})", type=count, default=ROWS)),
    ("--plugins", (*ASKING, "list", *KEPT), several("FILE", "files that each define a method", default=[])),
    ("--force", ASKING, flag("run again what is cached")),
    ("--time-limit", ["run"], {"type": duration, "metavar": "TIME",
                               "help": "ends each run that takes longer, as 90s, 30m or 2h (default: none)"}),
    ("--stall-limit", ["run"], {"type": often, "metavar": "TIME", "default": 3600.0,
                                "help": "ends each run that makes no progress for so long; 0: none (default: "
                                "1h)"}),
    ("--checkpoints", ["run"], {"type": often, "metavar": "TIME", "default": 300.0,
                                "help": "between two of a training, from which it goes on if it is stopped; "
                                "0: none (default: 5m)"}),
    ("--gpus", ["run"], several("N|all", "as many runs at once as these cards: all, numbers as nvidia-smi "
                                "has them, or UUIDs (default: one run at a time)", default=[])),
    ("--on", ["run"], once("ray[:ADDRESS]|slurm", "runs are tasks of a Ray cluster or of Slurm, whose "
                           "machines all see the folder of --results")),
    ("--methods", ["grade"], several("NAME", "whose answers, beside the untouched model's (default: all)")),
    ("--comparison", ["grade"], once("N", "as the report has them, the newest first (default: 1)",
                                     type=natural, default=1)),
    ("--prompts", ["grade"], once("N", f"test rows to grade the answers to (default: {PROMPTS})",
                                  type=natural, default=PROMPTS)),
    ("--seed", ["grade"], once("N", "of the draw of these rows (default: 0)", type=count, default=0)),
    ("--port", ["grade"], once("N", "of the page's address (default: any that is free)", type=port,
                               default=0)),
    ("--memory", ["plan"], once("SIZE|CARD", "what fits a card that is not at hand, as 16GB, 24GiB or T4",
                                type=card)),
    ("--probe", ASKING, flag("first make some steps of each method on the card, which correct its "
                             "forecast; a run of more than an hour does so anyway")),
    ("--hours", ["plan"], once("N", "what of the plan fits so many hours, as 4, 0.5, 4h or 30min",
                               type=hours)),
    ("-v", ["plan"], flag("the name of each run, too") | {"dest": "verbose"}),
    ("--memory", WITHIN, once("SIZE|CARD", "decide which to take on a card of this memory, as 24GB (of "
                              "1000), 24GiB (of 1024) or T4", type=room)),
    ("--hours", WITHIN, once("N", "decide which to take within so many hours a run, as 4, 0.5, 4h or 30min",
                             type=hours)),
    ("--results", (*ASKING, "list", "report", "grade", *KEPT), once(
        "DIR", "where records are kept (default: results)", type=folder, default=Path("results"))),
    ("--reports", (*ASKING, "report"), once(
        "DIR", "where reports are written (default: reports)", type=folder, default=Path("reports"))),
    ("--format", ["run", "report"], {"action": Once, "nargs": "+", "choices": FORMATS,
                                     "default": ["md", "html"], "help": "of the report, any of "
                                     f"{', '.join(FORMATS)} (default: md html)"}),
    ("--track-with", ["run"], {"action": Once, "nargs": "+", "choices": TRACKERS, "metavar": "NAME",
                               "default": [], "help": "tell these of each run when it has ended: its curves, "
                               f"costs and scores; any of {', '.join(TRACKERS)} (default: none)"}),
    ("--json", COMMANDS, flag("print one JSON value on standard output, progress on standard error")),
    ("--version", ["run"], {"action": "version", "version": f"tuneoff {__version__}"}),
)  # fmt: skip
