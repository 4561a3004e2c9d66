"""The tuned track of one method: its trials, and the arm that they choose.

Both follow from the records of the trials alone, for the bench that runs them as for the report.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from harness.metrics import METRICS, Metric
from harness.record import RunRecord
from harness.search import Search, Trial, at_edge, winner
from harness.spec import RunSpec, digest

SEED = 1_000_000  # of the trials: beyond what anybody takes for a report
UNVARIED = ("", ())  # a method's further option, where there is none


@dataclass(frozen=True)
class Found:
    """What a search has come to, trial by trial. `best` and its `spec`: null where every trial broke.
    `criterion`: the metric that it is judged by; null: the validation loss."""

    tuning: "Tuning"
    trials: list[Trial]
    records: list[RunRecord]  # of the trials
    best: Trial | None
    spec: RunSpec | None
    edge: bool  # no rate was tried on one side of the best

    @property
    def criterion(self) -> Metric | None:
        record = self.records[-1]
        return None if record.judged_by_loss else METRICS.get(record.card.get("aim") or "")

    @property
    def values(self) -> list[float | None]:
        """Of the criterion, a trial each; null where it broke."""
        sign = -1 if self.criterion and self.criterion.better == "higher" else 1
        return [None if trial.loss is None else sign * trial.loss for trial in self.trials]


@dataclass(frozen=True)
class Tuning:
    """`trial`: the spec of a trial of what was asked for, at the shared rate. `rates`: the lowest and highest
    that the method declares. `tunes`: its further option, and values worth a trial."""

    trial: RunSpec
    rates: tuple[float, float]
    tunes: tuple[str, Sequence] = UNVARIED

    @property
    def identical(self) -> RunSpec:
        """What was asked for, with no change: a run of the identical track, but for its seed."""
        return replace(self.trial, search=None)

    @property
    def search(self) -> Search:
        option, values = self.tunes
        asked = (self.trial.search or {}).get(option)
        others = tuple(value for value in values if value != asked)
        return Search(self.trial.hp.learning_rate, *self.rates, (asked, *others))

    def spec(self, rate: float, value: Any) -> RunSpec:
        """Of a trial."""
        option, _ = self.tunes
        options = self.trial.options | ({option: value} if value is not None else {})
        changes = {} if rate == self.trial.hp.learning_rate else {"learning_rate": rate}
        return replace(self.trial, options=options, changes=changes, reason="one trial of a search")

    def walk(
        self, record_of: Callable[[RunSpec], RunRecord | None], most: int
    ) -> tuple[Found, RunSpec | None]:
        """Goes through the search again, as far as its trials have records, and for at most so many. -> what
        it has come to, and the next trial."""
        trials: list[Trial] = []
        records: list[RunRecord] = []
        upcoming = None
        while len(trials) < most:
            rate, value = self.search.next(trials)
            upcoming = self.spec(rate, value)
            record = record_of(upcoming)
            if record is None:
                break
            trials.append(Trial(rate, value, record.loss_of_trial))
            records.append(record)
            upcoming = None
        whole = [trial for trial in trials if trial.loss is not None]
        best = winner(whole) if whole else None
        spec = self.spec(best.rate, best.option) if best else None
        edge = best is not None and at_edge(trials, best)
        return Found(self, trials, records, best, spec, edge), upcoming


def tuned(spec: RunSpec, seed: int, trials: int) -> RunSpec:
    """The run of a trial's arm with a seed of the report: the identical one, where nothing was changed."""
    return replace(spec, seed=seed, search=None, reason=found_by(trials) if spec.changes else "")


def found_by(trials: int) -> str:
    """The reason for what a search has chosen."""
    return f"the best of {trials} trials on the validation rows"


def searches(trials: list[RunRecord]) -> list[Found]:
    """The searches that these are trials of, by their methods' newest cards."""
    groups: dict[tuple, list[RunRecord]] = {}
    for record in sorted(trials, key=lambda r: r.started):
        if record.spec.trains:
            key = (record.spec.method, record.spec.seed, digest(record.spec.search))
            groups.setdefault(key, []).append(record)
    found = []
    for group in groups.values():
        card, of = group[-1].card, {record.spec.digest: record for record in group}
        with suppress(KeyError, ValueError):  # it never ran as far as its card, or that cannot be
            newest = group[-1].spec
            asked = replace(newest, options=newest.search or {}, changes={})
            tuning = Tuning(asked, card["learning_rates"], card["tunes"])
            found.append(tuning.walk(partial(record_in, of), len(group))[0])
    return [search for search in found if search.trials]


def record_in(records: dict[str, RunRecord], spec: RunSpec) -> RunRecord | None:
    """By digest."""
    return records.get(spec.digest)
