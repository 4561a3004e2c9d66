"""Probes: some steps of runs, each in a child as the run itself, in a folder that is gone afterwards."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.bench.attempt import Terms
from harness.bench.places import here
from harness.plan import Plan
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.store import Store

LIMIT_SECONDS = 900  # of a probe: attaching and compiling are most of it


def probes(plan: Plan, specs: list[RunSpec], progress: Any) -> Iterator[tuple[RunSpec, RunRecord]]:
    """One after the other, so that none disturbs another. How a probe ends is its record's status. Raises
    Missing before the first."""
    if not specs:
        return
    with tempfile.TemporaryDirectory(prefix="tuneoff-probe-") as folder:
        terms = Terms(Store(Path(folder)), "", progress, LIMIT_SECONDS, every=0.0, probe=True)
        with here(plan, terms, specs[0]) as places:
            [place, *_] = places.more(specs)
            for spec in specs:
                yield spec, places.run(spec, place, (), lambda: None)
