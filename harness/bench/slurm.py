"""Runs in a Slurm array, a task each, which Slurm begins again where a machine is lost or taken away.

What a cluster asks for besides (partition, account, time) sbatch reads itself: SBATCH_PARTITION and so on.
"""

import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from harness.bench.attempt import Terms
from harness.bench.remote import ENDING_SECONDS, Engine, Job
from harness.errors import BadRequest
from harness.nursery import python_path

MINUTES = 24 * 60  # of a task: SBATCH_TIMELIMIT says otherwise; then it is begun again, from its checkpoint
FOLDER = ".slurm"  # in the results: what submitit keeps of its tasks, and their output


class Requeued:
    """A task as submitit begins it, and as it is asked to go away before its time or its machine is over."""

    def __init__(self, job: Job):
        self.job = job
        self.signals: list[int] = []
        self.thread: threading.Thread | None = None

    def __call__(self) -> None:
        self.thread = threading.Thread(target=self.job, args=[self.signals])
        self.thread.start()
        while self.thread.is_alive():
            self.thread.join(1)  # between which signals are heard

    def checkpoint(self):
        from submitit.helpers import DelayedSubmission

        self.signals.append(signal.SIGTERM)
        if self.thread:
            self.thread.join(ENDING_SECONDS - 10)  # of Slurm's patience; the rest is for queueing again
        return DelayedSubmission(Requeued(self.job))


class Slurm(Engine):
    name, log = "slurm", f"{FOLDER} in the results has its output"
    look_seconds = 10.0  # its controller serves everybody

    def __init__(self, terms: Terms, devices: int):
        super().__init__(terms)
        self.devices = devices

    def send(self, jobs: list[Job]) -> list[str]:
        import submitit

        limit = self.terms.limit
        # A training may take many times a task's limit: submitit would give it up after three.
        folder = self.terms.store.folder.resolve() / FOLDER
        executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10**6)
        executor.update_parameters(
            job_name="tuneoff",
            time=max(1, round(limit / 60) + 15) if limit else MINUTES,
            signal_delay_s=ENDING_SECONDS,
            additional_parameters={"requeue": True},
            setup=[f"export PYTHONPATH={shlex.quote(python_path())}"],
            **({"gpus_per_node": self.devices} if has_cards() else {}),
        )
        try:
            return [str(job.job_id) for job in executor.submit_array([Requeued(job) for job in jobs])]
        except submitit.core.utils.FailedJobError as error:  # no such partition, no account
            raise BadRequest(f"--on slurm: {' '.join(str(error).split())}") from error

    def look(self) -> set[str]:
        asked = subprocess.run(
            ["squeue", "--me", "--noheader", "--array", "--format=%i"], capture_output=True, text=True
        )
        if asked.returncode and not self.looked:  # else what an earlier bench has sent would be sent twice
            raise BadRequest(f"--on slurm: squeue does not answer: {asked.stderr.strip()}")
        return self.there if asked.returncode else set(asked.stdout.split())  # it is away: as it was

    def cancel(self, task: str) -> None:
        subprocess.run(["scancel", task], capture_output=True)


def has_cards() -> bool:
    asked = subprocess.run(["sinfo", "--noheader", "--format=%G"], capture_output=True, text=True)
    return "gpu" in asked.stdout


@contextmanager
def opened(terms: Terms, devices: int) -> Iterator[Slurm]:
    engine = Slurm(terms, devices)
    yield engine
    if not engine.silent and not list(terms.store.folder.glob(".*.sent")):
        shutil.rmtree(terms.store.folder / FOLDER, ignore_errors=True)
