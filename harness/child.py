"""The process of one run: a copy of the nursery's, or `python -m harness.child FOLDER`. However it ends, it
leaves a record.

FOLDER holds spec.json; this process leaves events.jsonl, outputs.jsonl, model/ and, last, result.json.
"""

import faulthandler
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from harness import machine, method, packages
from harness.forks import die_with
from harness.plain import redacted
from harness.ranks import Ending, Place, Ranks
from harness.record import Provenance, RunRecord
from harness.spec import RunSpec
from harness.store import SPEC, leave


def main(folder: Path) -> None:
    for number in ENDING:
        signal.signal(number, interrupt)
    if WHERE:
        faulthandler.register(WHERE)
    job = json.loads((folder / SPEC).read_text("utf-8"))
    if job["cores"]:
        os.sched_setaffinity(0, job["cores"])
    if job["cards"]:  # before anybody has asked for one
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(job["cards"])
    spec = RunSpec.from_json(job["spec"])
    record = RunRecord(
        spec=spec,
        status="failed",
        command=job["command"],
        provenance=Provenance(at_once=job["at_once"]),
        started=job["started"],
    )
    ended_by, ranks = None, Ranks()

    def compute(place: Place) -> None:
        from harness.training import execute, probe

        if job.get("probe"):
            return probe(spec, chosen, record, folder, place)
        execute(spec, chosen, record, folder, job["checkpoint_seconds"], place)

    try:
        try:
            chosen = chosen_method(spec, record)
            check_devices(spec.devices)
            compute(ranks.begin(spec.devices, lambda place: ending_of(compute, place), stuck(record, folder)))
            record.status = "ok"
        finally:
            deaf()
    except BaseException as error:  # whatever ends a run is its status, never its absence
        asked = isinstance(error, KeyboardInterrupt)
        record.status, record.error = (not asked and ranks.first_to_fail()) or diagnose(error)
        ended_by = error
    leave(record, folder)
    if ended_by:
        traceback.print_exception(ended_by)


def check_devices(asked: int) -> None:
    """Raises Unsupported where there are not so many."""
    if asked > 1 and asked > (there := machine.devices()):
        raise method.Unsupported(f"hp.devices={asked}, and there are {there} here: --set hp.devices={there}")


def ending_of(work: Callable[[Place], None], place: Place) -> Ending | None:
    """How it failed, if it did."""
    try:
        work(place)
    except BaseException as error:
        traceback.print_exception(error)
        return diagnose(error)
    return None


def stuck(record: RunRecord, folder: Path) -> Callable[[Ending], object]:
    """Ends a run whose own thread waits for a rank that is gone."""

    def end(ending: Ending) -> None:
        record.status, record.error = ending
        leave(record, folder)
        os._exit(0)

    return end


def chosen_method(spec: RunSpec, record: RunRecord) -> method.Method:
    """The method with its options: nothing heavy is imported yet. Raises Unsupported without a package, and
    for an ensemble without one of its members."""
    if spec.members:
        return ensemble(spec, record)
    cls = method.resolve(
        spec.method, method.find(spec.method, method.known_methods(spec.locations.get("plugins", [])))
    )
    record.card, record.hashes["method_code"] = method.card(cls), method.code_hash(cls)
    record.overrides = dict(cls.overrides)
    record.overrides |= {name: (value, spec.reason) for name, value in spec.changes.items()}
    if missing := [name for name in cls.needs if not packages.found(name)]:
        needed = " ".join(missing)
        raise method.Unsupported(f"{spec.method} needs {', '.join(missing)}: pip install {needed}")
    return method.build(cls, spec.options)


def ensemble(spec: RunSpec, record: RunRecord) -> method.Method:
    from harness.training import Ensemble, outputs_of

    record.card = method.card(Ensemble)
    members = list(zip(spec.members, map(Path, spec.locations["members"]), strict=True))
    record.hashes["members"] = outputs_of(members)
    return Ensemble(spec.options["average"], members)


WHERE = getattr(signal, "SIGUSR1", None)  # asks for a trace of every thread, whatever it waits for
ENDING = (signal.SIGINT, signal.SIGTERM)  # the first is ignored below a script's & until it is handled


def interrupt(*_) -> None:
    deaf()
    raise KeyboardInterrupt


def deaf() -> None:
    """No further signal disturbs the writing of what was measured: who cannot wait for it kills."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


AGAIN = "the same command runs it again"
SMALLER = "lower hp.micro_batch_size or hp.max_length, or set hp.gradient_checkpointing=true"
OUT_OF_MEMORY = {  # how those say it who hold the memory: allocators, drivers, libraries, C++ and the system
    "oom_gpu": (
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "[CUDA]: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "cudaErrorMemoryAllocation",
        "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
        "HIP out of memory",
    ),
    "oom_host": ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory"),
}


def exhausted(text: str) -> str | None:
    """The status of what says that memory ran out."""
    return next((status for status, marks in OUT_OF_MEMORY.items() if any(m in text for m in marks)), None)


def out_of_memory(status: str, text: str) -> tuple[str, str]:
    return status, f"out of memory on the {'GPU' if status == 'oom_gpu' else 'host'}: {SMALLER}. {text[:300]}"


def diagnose(error: BaseException) -> tuple[str, str]:
    """-> status and one line of what went wrong, with the remedy where there is one."""
    text = redacted(" ".join(str(error).split()))
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", f"interrupted; {AGAIN}"
    if kind == "Diverged":
        return "diverged", f"{text}: try a lower hp.learning_rate"
    if isinstance(error, method.Unsupported):
        return "unsupported", text
    said = "oom_gpu" if kind == "OutOfMemoryError" else "oom_host" if isinstance(error, MemoryError) else None
    if status := said or exhausted(text):
        return out_of_memory(status, text)
    return "failed", f"{kind}: {text[:500]}"


if __name__ == "__main__":
    die_with(int(os.environ.get("TUNEOFF_BENCH", os.getppid())))
    main(Path(sys.argv[1]))
    os._exit(0)  # the record is whole: no thread that a method has left holds up the bench
