"""Which runs are next: those that were asked for, and those that a search finds."""

from collections.abc import Sequence
from functools import partial
from math import inf
from statistics import median

from harness.record import RunRecord
from harness.spec import RunSpec
from harness.tuning import Tuning, record_in, tuned


class Plan(list):
    """Of RunSpec: the runs that are known beforehand, ensembles behind their members. `tunings`: the searches
    that find the others, of so many `trials` each. `unused`: part of the dataset -> its columns that no row
    is made of, where all parts lie here."""

    def __init__(
        self, specs: list[RunSpec], seeds: list[int], tunings: Sequence[Tuning] = (), trials: int = 0
    ):
        super().__init__(sorted(once(specs), key=lambda spec: (not spec.untouched, bool(spec.members))))
        self.seeds, self.tunings, self.trials = seeds, tunings, trials
        self.unused: dict[str, list[str]] = {}

    def upcoming(self, done: dict[str, RunRecord]) -> list[RunSpec]:
        """The runs whose turn it is, those of `done`, by digest, having ended; none when all have. First the
        untouched model, alone; then others of it, which nobody waits for, and a trial of each method, again
        and again; then all others, seed by seed, so that drift of the machine hits every method and both
        tracks alike; at last what is made of these."""
        walks = [tuning.walk(partial(record_in, done), self.trials) for tuning in self.tunings]
        best = [(found.spec, len(found.trials)) for found, _ in walks if found.spec]
        chosen = [tuned(spec, seed, trials) for spec, trials in best for seed in self.seeds]
        trials = [trial for _, trial in walks if trial]
        trained = [spec for spec in self if spec.trains] + chosen
        trained.sort(key=lambda spec: (spec.repeat, self.seeds.index(spec.seed)))
        stages = (
            [spec for spec in self if spec.method == "base"],  # to its answers all others prefer references
            [spec for spec in self if spec.untouched] + (trials or trained),
            self.ensembles,
        )
        pending = ([spec for spec in once(stage) if spec.digest not in done] for stage in stages)
        return next(filter(None, pending), [])

    def total(self, done: dict[str, RunRecord], stage: list[RunSpec]) -> int:
        """How many runs there are: at most, until all searches have ended."""
        if stage[0].members:
            return len(done) + len(stage)
        if stage[0].trains and not stage[0].trial:
            return len(done) + len(stage) + len(self.ensembles)
        return len(self) + len(self.tunings) * (self.trials + len(self.seeds))

    @property
    def ensembles(self) -> list[RunSpec]:
        return [spec for spec in self if spec.members]

    def methods(self) -> list[RunSpec]:
        """One run of each, at the least."""
        return [*self, *(tuning.trial for tuning in self.tunings)]


def once(specs: list[RunSpec]) -> list[RunSpec]:
    """Each where it stands first: the best arm of a search may be the identical one."""
    return [spec for i, spec in enumerate(specs) if spec not in specs[:i]]


def expected_seconds(spec: RunSpec, records: list[RunRecord]) -> float:
    """How long a run takes: as those of its method in `records`, which ended well, else as any of them, for
    each token that it may read or write; where there are none, of those tokens one takes a second."""
    kind = (spec.method, spec.trains)
    known = [(sum(phase.seconds for phase in r.phases.values()) / tokens(r.spec), r.spec) for r in records]
    own = [pace for pace, of in known if (of.method, of.trains) == kind]
    return tokens(spec) * median(own or [pace for pace, _ in known] or [1.0])


def tokens(spec: RunSpec) -> float:
    """That a run reads and writes, at most; of a trial, which answers nothing, those that it trains on."""
    hp, dataset = spec.own_hp, spec.dataset
    parts = len(dataset.get("parts", []))
    train, test = parts * dataset.get("train", 0), parts * dataset.get("test", 0)
    rows = min(train * hp.epochs, (hp.max_steps or inf) * hp.batch_size)
    answers = 0 if spec.trial and spec.trains else test
    return 1 + rows * hp.max_length + answers * (hp.max_length + hp.max_new_tokens)
