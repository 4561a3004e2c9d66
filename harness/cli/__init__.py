"""The command line: arguments become a plan, a bench and a report.

Nothing heavy is imported before it is needed, so that help and mistakes answer at once.
"""

import io
import logging
import os
import signal
import sys
import traceback
from contextlib import contextmanager, nullcontext, redirect_stdout

from harness.cli.arguments import BAD_REQUEST, OK, SIGNALLED, SOME_FAILED, parse_arguments
from harness.cli.commands import COMMANDS, complain
from harness.errors import BadRequest, reason

__all__ = ["BAD_REQUEST", "OK", "SIGNALLED", "SOME_FAILED", "main"]


def main(typed: list[str] | None = None) -> int:
    typed = sys.argv[1:] if typed is None else typed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a letter that a terminal lacks is written as its number
            stream.reconfigure(errors="backslashreplace")
    command, options = parse_arguments(typed)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its hints on kernels are no use here
    from harness.bench import STOPPING

    for number in STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup, or a script's &, has it
            signal.signal(number, interrupt)
    sys.excepthook = lambda *error: complain("".join(traceback.format_exception(*error)))  # without secrets
    try:
        with alone() if options.json else nullcontext():
            return COMMANDS[command](options, typed)
    except BadRequest as error:
        for problem in error.problems:
            complain(f"error: {problem}")
        return BAD_REQUEST
    except KeyboardInterrupt as ended:
        complain("\ninterrupted. What had ended is kept; the same command continues.")
        return SIGNALLED + (ended.args[0] if ended.args else signal.SIGINT)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        sys.stderr.close()
        return OK
    except OSError as error:  # the folder that this was started in is gone, a disk is full
        lost = "" if error.filename else ": is the current folder still there?"
        complain(f"error: {reason(error)}{lost}")
        return BAD_REQUEST


def interrupt(number: int, frame) -> None:
    raise KeyboardInterrupt(number)


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
