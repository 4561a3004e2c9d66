"""Runs on a Ray cluster, an actor each, which lives as long as its run, whatever becomes of the bench."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from harness.bench.attempt import Terms
from harness.bench.remote import LOSSES, Engine, Job
from harness.errors import BadRequest
from harness.nursery import python_path
from harness.spec import digest

NAMESPACE = "tuneoff"
MOST = LOSSES + 1  # times that Ray begins a run again: the last only says that it was lost too often


class Runner:
    """Does a run where Ray has put it. Where a machine is lost, Ray begins it again on another."""

    def __init__(self, job: Job):
        import ray

        job()
        ray.actor.exit_actor()  # its card is free for the next, also where no bench is there any more


class Ray(Engine):
    name, log = "ray", "`ray logs` may say more"

    def __init__(self, terms: Terms, devices: int):
        super().__init__(terms)
        self.needs = share(devices)

    def send(self, jobs: list[Job]) -> list[str]:
        import ray

        of = digest(str(self.terms.store.folder.resolve()))
        names = [f"{of}-{job.spec.folder}" for job in jobs]
        for job, name in zip(jobs, names, strict=True):
            self.cancel(name)  # of an earlier bench, for a run that is to be done anew
            options = {"name": name, "lifetime": "detached", "max_restarts": MOST, **self.needs}
            options["runtime_env"] = {"env_vars": {"PYTHONPATH": python_path()}}
            ray.remote(Runner).options(**options).remote(job)
        return names

    def look(self) -> set[str]:
        from ray.util import list_named_actors

        return set(list_named_actors())

    def cancel(self, task: str) -> None:
        import ray

        with suppress(ValueError):  # there is none such
            ray.kill(ray.get_actor(task))


def share(devices: int) -> dict[str, int]:
    """What a run asks Ray for: cards where the cluster has any, and on every machine as many cores, the same
    for all runs, as a machine with the fewest has for each."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards = devices if any(node.get("GPU") for node in nodes) else 0
    if cards > max((node.get("GPU", 0) for node in nodes), default=0):
        raise BadRequest(f"--on ray: no machine of the cluster has hp.devices={devices} cards")
    able = [node for node in nodes if node.get("CPU") and node.get("GPU", 0) >= cards]
    cores = min((node["CPU"] // max(1, node.get("GPU", 0)) for node in able), default=1)
    return {"num_gpus": cards, "num_cpus": max(1, int(cores) * max(1, cards))}


@contextmanager
def opened(terms: Terms, devices: int, address: str) -> Iterator[Ray]:
    """Of an address, else where RAY_ADDRESS or a running `ray start` says; else one of this machine's own,
    which ends with the bench."""
    import ray

    try:
        ray.init(address or None, namespace=NAMESPACE, log_to_driver=False, logging_level="error")
        yield Ray(terms, devices)
    finally:
        ray.shutdown()
