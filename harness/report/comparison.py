"""Records become comparisons, and a comparison's techniques: each with all of its seeds."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean
from typing import Any

import numpy as np

from harness.metrics import Metric, compared, scores
from harness.record import TRAINING, RunRecord
from harness.report.distinctions import distinctions
from harness.report.text import shorten
from harness.spec import RunSpec, digest
from harness.store import Store
from harness.tuning import Found, searches

UNTOUCHED = "base"  # the row of the untouched model: every technique's "before"
GIB = 2**30
IDENTICAL, TUNED = " with the shared hyperparameters", " with each at its own best"  # the tracks
SEEDS_TO_RANK = 3  # seeds: fewer say nothing of how a method varies from run to run
STATUS = {
    "oom_gpu": "out of GPU memory",
    "oom_host": "out of host memory",
    "diverged": "diverged",
    "failed": "failed",
    "timeout": "timed out",
    "interrupted": "interrupted",
    "unsupported": "unsupported here",
}


@dataclass(eq=False)
class Technique:
    """What is compared: a method with options and hyperparameters of its own. `sums`: of each seed that is
    done the numbers of each test row, by metric (rows, width)."""

    label: str
    records: list[RunRecord]  # one a seed, by seed
    sums: list[dict[str, np.ndarray]] = field(default_factory=list)
    outputs_of: RunRecord | None = None  # the lowest seed's, for examples
    tuned: bool = False  # what a search has found, where that is not what was asked for
    repeats: list[RunRecord] = field(default_factory=list)  # the same runs again: no sample, but the noise

    @property
    def spec(self) -> RunSpec:
        return self.records[0].spec

    @property
    def card(self) -> dict:
        return self.newest.card

    @property
    def newest(self) -> RunRecord:
        return max(self.records, key=lambda r: r.started)

    @cached_property
    def done(self) -> list[RunRecord]:
        return [r for r in self.records if r.ok]

    @property
    def objective(self) -> str:
        return self.card.get("objective") or "sft"

    @property
    def aim(self) -> str:
        """The metric that the objective aims at."""
        return self.card.get("aim") or "bleu4"

    @property
    def ranked(self) -> bool:
        """A seed that diverged is not averaged away: such a method is not ranked at all."""
        return len(self.done) >= SEEDS_TO_RANK and not self.diverged

    @property
    def diverged(self) -> bool:
        return any(record.status == "diverged" for record in self.records)

    @property
    def disturbed(self) -> bool:
        return any(record.disturbed for record in self.done)

    @property
    def unranked_because(self) -> str:
        if self.diverged:
            return "a seed diverged"
        return "single seed" if len(self.done) == 1 else f"{len(self.done)} seeds"

    def values(self, of: Callable[[RunRecord], float | None]) -> list[float]:
        """One a finished seed; unknown ones left out."""
        return [value for value in map(of, self.done) if value is not None]

    def mean(self, of: Callable[[RunRecord], float | None]) -> float | None:
        values = self.values(of)
        return fmean(values) if values else None

    @property
    def status(self) -> str:
        """Empty where all seeds are done, else what happened, in plain words."""
        missing = [r for r in self.records if not r.ok]
        reasons = list(dict.fromkeys(map(reason, missing)))
        if not missing:
            return ""
        if not self.done and len(reasons) == 1:
            return reasons[0]
        return f"{len(missing)} of {len(self.records)} seeds: {', '.join(reasons)}"


@dataclass
class Comparison:
    """Techniques that differ in method, options and hyperparameters of their own alone, each with its seeds.
    Untouched models come first."""

    techniques: list[Technique]
    warnings: list[str] = field(default_factory=list)
    searches: list[Found] = field(default_factory=list)  # of the tuned track
    parts: list[str] = field(default_factory=list)  # of each test row; from the outputs
    reference_tokens: np.ndarray | None = None  # (test rows,), end marks included; from the outputs
    verdicts: Any = None  # harness.report.verdicts.judged keeps them here
    apart: str = ""  # what it has of its own among the comparisons of its store with the same subject

    @property
    def records(self) -> list[RunRecord]:
        return [record for technique in self.techniques for record in technique.records]

    @cached_property
    def bases(self) -> list[Technique]:
        return [t for t in self.techniques if t.spec.untouched]

    @cached_property
    def trained(self) -> list[Technique]:
        return [t for t in self.techniques if t.spec.trains]

    @property
    def ensembles(self) -> list[Technique]:
        """Made of others: they stand beside these, and are ranked with nothing."""
        return [t for t in self.techniques if t.spec.members]

    def members(self, technique: Technique) -> list[Technique]:
        """Those that an ensemble is made of, as far as they are here."""
        return list(filter(None, (arm(self.techniques, member) for member in technique.spec.members)))

    @property
    def objectives(self) -> dict[str, list[Technique]]:
        """Objective -> its techniques: likelihood of references first, as most have it."""
        names = sorted({t.objective for t in self.trained}, key=lambda name: (name != "sft", name))
        return {name: [t for t in self.trained if t.objective == name] for name in names}

    @property
    def tables(self) -> dict[str, list[Technique]]:
        """Objective -> what stands in its table: an ensemble behind its members, or else in the first."""
        found = self.objectives
        for ensemble in self.ensembles:
            names = dict.fromkeys(member.objective for member in self.members(ensemble))
            name = next(iter(names if len(names) == 1 else found), "sft")
            found.setdefault(name, []).append(ensemble)
        return found

    @cached_property
    def groups(self) -> dict[str, list[Technique]]:
        """Who is ranked with whom: the techniques of one objective and one track. By what tells a group from
        the others, in words. What was asked for stands in both tracks where it is a method's own best."""
        best = [arm(self.techniques, found.spec) for found in self.searches]
        found = {}
        for objective, members in self.objectives.items():
            of = f" of the {objective} techniques" if len(self.objectives) > 1 else ""
            tracks = {IDENTICAL: [t for t in members if not t.tuned],
                      TUNED: [t for t in members if t in best]}  # fmt: skip
            apart = set(tracks[IDENTICAL]) - set(tracks[TUNED]) and tracks[TUNED]
            found |= {of + name: those for name, those in tracks.items()} if apart else {of: members}
        return found

    def groups_of(self, technique: Technique) -> list[str]:
        """Its track with the shared hyperparameters first."""
        return [name for name, members in self.groups.items() if technique in members]

    def untuned(self, technique: Technique) -> bool:
        """Whether it stands beside a better one of its own, that a search has found."""
        return any(name.endswith(IDENTICAL) for name in self.groups_of(technique)[-1:])

    def search_of(self, technique: Technique) -> Found | None:
        """That a tuned technique was found by."""
        of = (found for found in self.searches if arm([technique], found.spec))
        return next(of, None) if technique.tuned else None

    def asked_for(self, technique: Technique) -> Technique | None:
        """Of a tuned technique the one with the shared hyperparameters, where that was run."""
        found = self.search_of(technique)
        return arm(self.techniques, found.tuning.identical) if found else None

    @property
    def spec(self) -> RunSpec:
        return self.techniques[-1].spec

    @property
    def metrics(self) -> list[Metric]:
        """Those that have verdicts and plots here; the first leads."""
        return compared(self.spec.dataset)

    @property
    def random_weights(self) -> bool:
        return self.spec.model.startswith("random:")

    @property
    def plain_text(self) -> bool:
        return any(record.data.plain_text for record in self.records)

    @property
    def pairs(self) -> bool:
        """The data say which answer is the worse one; else it is the untouched model's own."""
        parts = self.spec.dataset.get("parts", [])
        return all(part.get("format") == "pairs" for part in parts if not part.get("unseen"))

    @cached_property
    def preferred_to(self) -> dict[str, list[str]]:
        """Digest of the untouched model's answers -> the runs whose preferences are over them; none: over the
        pairs of the data alone."""
        found: dict[str | None, list[str]] = {}
        for technique in self.techniques:
            for record in technique.done:
                if "before" in record.hashes and score(record, "preference_accuracy") is not None:
                    answers = record.hashes["before"]
                    found.setdefault(answers, []).append(f"{technique.label} (seed {record.spec.seed})")
        return found

    def score(self, record: RunRecord, metric: str) -> float | None:
        """Preferences for different answers are not compared: where there are such, all are unknown."""
        if metric == "preference_accuracy" and len(self.preferred_to) > 1:
            return None
        return score(record, metric)

    @property
    def twins(self) -> list[list[Technique]]:
        """Trained techniques whose answers score the same in every test row and with every seed."""
        found: dict[tuple, list[Technique]] = {}
        for technique in self.trained:
            if technique.sums:
                seeds = zip(technique.done, technique.sums, strict=True)
                rows = [(r.spec.seed, *(sums[m.name].tobytes() for m in self.metrics)) for r, sums in seeds]
                found.setdefault(tuple(rows), []).append(technique)
        return [same for same in found.values() if len(same) > 1]

    @property
    def out_of_reach(self) -> int:
        """Test rows whose reference, less its end mark, is longer than an answer may be."""
        if self.reference_tokens is None:
            return 0
        formats = {part.get("name"): part.get("format") for part in self.spec.dataset.get("parts", [])}
        asked = np.array([formats.get(part) != "text" for part in self.parts])  # a text's is cut to fit
        return int((asked & (self.reference_tokens - 1 > self.spec.hp.max_new_tokens)).sum())

    @property
    def name(self) -> str:
        """The same whatever other comparisons there are."""
        spec = self.spec
        return spec.comparison if spec.trains else spec.evaluation

    @property
    def title(self) -> str:
        return f"{self.subject}: {self.apart}" if self.apart else self.subject

    @property
    def subject(self) -> str:
        dataset = self.spec.dataset
        return f"{self.spec.model} on {dataset.get('title') or dataset.get('name') or 'unnamed data'}"

    @cached_property
    def counted(self) -> bool:
        """Whether bytes of live tensors are known; else only what the process took is."""
        return any(r.peak("peak_allocated", tuple(r.phases)) is not None for r in self.records)

    @property
    def gauge(self) -> str:
        return "Peak memory (GiB)" if self.counted else "Peak host memory (GiB)"

    def base(self, method: str) -> Technique | None:
        return next((t for t in self.bases if t.spec.method == method), None)

    def before(self, technique: Technique) -> Technique | None:
        """The untouched model; an untouched model is its own before."""
        return technique if technique.spec.untouched else self.base(UNTOUCHED)

    def own_base(self, technique: Technique) -> Technique | None:
        """The model a method starts from, where that is not the untouched one: a 4-bit one. A method that
        starts at neither scored its own start, see `own_scores`."""
        name = technique.card.get("baseline")
        own_start = any(record.start for record in technique.records)
        if not technique.spec.trains or not name or name == UNTOUCHED or own_start:
            return None
        return self.base(name)

    def own_scores(self, technique: Technique, metric: str) -> list[float]:
        """One a seed of what a method starts from, where that is not the untouched model."""
        if own := self.own_base(technique):
            return own.values(lambda r: score(r, metric))
        return technique.values(lambda r: scores(r.start).get(metric))

    def spent(self, technique: Technique, of: Callable, together: Callable = sum) -> list[float]:
        """One a finished seed of what a training took; of an ensemble, those of its members together."""
        if not technique.spec.members:
            return technique.values(of)
        members = self.members(technique)
        own = [{record.spec.seed: of(record) for record in member.done} for member in members]
        seeds = [[costs.get(r.spec.seed) for costs in own] for r in technique.done]
        whole = len(members) == len(technique.spec.members)
        return [together(costs) for costs in seeds if whole and None not in costs]

    def peak_memory(self, record: RunRecord) -> float | None:
        """GiB over attach and train; null for a model that was not trained."""
        peak = record.peak("peak_allocated" if self.counted else "peak_host")
        return peak / GIB if peak is not None and record.spec.trains else None


def comparisons(records: list[RunRecord]) -> list[Comparison]:
    """Newest first. Untouched models join every comparison that is evaluated as they were."""
    trials = [record for record in records if record.spec.trial]
    records = [record for record in records if not record.spec.trial]
    groups: dict[str, list[RunRecord]] = {}
    for record in records:
        if not record.spec.untouched:
            groups.setdefault(record.spec.comparison, []).append(record)
    evaluated = {group[0].spec.evaluation for group in groups.values()}
    for record in records:
        if record.spec.untouched and record.spec.evaluation not in evaluated:
            groups.setdefault(record.spec.evaluation, []).append(record)
    found = []
    for group in groups.values():
        evaluation = group[0].spec.evaluation
        bases = [r for r in records if r.spec.untouched and r.spec.evaluation == evaluation]
        bases.sort(key=lambda r: r.spec.method != UNTOUCHED)
        trained = [r for r in group if not r.spec.untouched]
        trained.sort(key=lambda r: bool(r.spec.members))
        searched = searches([r for r in trials if r.spec.comparison == group[0].spec.comparison])
        techniques = techniques_of(bases + trained, searched)
        found.append((max(r.started for r in group), Comparison(techniques, searches=searched)))
    newest = [comparison for _, comparison in sorted(found, key=lambda pair: pair[0], reverse=True)]
    told = distinctions([c.subject for c in newest], [c.spec for c in newest])
    for comparison, apart in zip(newest, told, strict=True):
        comparison.apart = apart
    return newest


def techniques_of(records: list[RunRecord], searched: list[Found] = ()) -> list[Technique]:
    """In the order of their first record; the same method with other values is another technique."""
    groups: dict[str, dict[int, list[RunRecord]]] = {}
    for record in records:
        key = digest([record.spec.method, record.spec.options, record.spec.changes])
        groups.setdefault(key, {}).setdefault(record.spec.seed, []).append(record)
    techniques = []
    for seeds in groups.values():
        runs = [run_and_repeats(seeds[seed]) for seed in sorted(seeds)]
        repeats = [repeat for _, rest in runs for repeat in rest]
        techniques.append(Technique("", [run for run, _ in runs], repeats=repeats))
    for found in searched:
        if (chosen := arm(techniques, found.spec)) and chosen is not arm(techniques, found.tuning.identical):
            chosen.tuned = True
    for technique in techniques:
        technique.label = label(technique, techniques)
    return techniques


def arm(techniques: list[Technique], spec: RunSpec | None) -> Technique | None:
    """The one whose runs differ from a spec in seed alone."""
    if spec is None:
        return None
    asked = (spec.method, spec.options, spec.changes)
    specs = ((t, t.spec) for t in techniques)
    return next((t for t, own in specs if (own.method, own.options, own.changes) == asked), None)


def run_and_repeats(records: list[RunRecord]) -> tuple[RunRecord, list[RunRecord]]:
    """Of one seed: the newest run that is done, and what was run again to see the noise."""
    first = min(record.spec.repeat for record in records)
    runs = [record for record in records if record.spec.repeat == first]
    run = next((record for record in reversed(runs) if record.ok), runs[-1])
    return run, [record for record in records if record.spec.repeat > first]


def label(technique: Technique, techniques: list[Technique]) -> str:
    """A method's title, with the options and hyperparameters in which its techniques of a track differ; of an
    ensemble, the labels of its members, which stand before it."""
    if technique.spec.members:
        found = [(arm(techniques, member), member.method) for member in technique.spec.members]
        names = " + ".join(member.label if member else name for member, name in found)
        return f"{names} ({technique.spec.options['average']} averaged)"
    track = [t for t in techniques if (t.spec.method, t.tuned) == (technique.spec.method, technique.tuned)]
    changed = {name for t in track for name in t.spec.changes}
    values = {id(t): t.spec.options | {n: getattr(t.spec.own_hp, n) for n in changed} for t in track}
    names = sorted({name for own in values.values() for name in own})
    differing = [n for n in names if len({repr(own.get(n)) for own in values.values()}) > 1]
    chosen = ", ".join(f"{n.replace('_', ' ')} {values[id(technique)].get(n)}" for n in differing)
    title = technique.card.get("title") or technique.spec.method
    others = [t for t in techniques if t.spec.method != technique.spec.method]
    if any(title == (t.card.get("title") or t.spec.method) for t in others):
        title = f"{title} ({technique.spec.method})"
    marks = ", ".join(filter(None, ("tuned" * technique.tuned, chosen)))
    return f"{title} ({marks})" if marks else title


def reason(record: RunRecord) -> str:
    """Why a run has no result, in a few words; the record's error has the rest."""
    error = record.error or ""
    if record.status == "diverged" and (step := re.search(r"step \d+", error)):
        return f"diverged at {step[0]}"
    if record.status == "unsupported" and error:
        return f"unsupported: {shorten(error.splitlines()[0], 80)}"
    return STATUS[record.status]


def score(record: RunRecord, metric: str) -> float | None:
    return record.scores.get(metric)


def seconds(record: RunRecord) -> float | None:
    """Training time: attach and optimizer steps, without evaluation and saving."""
    return record.train_seconds if record.spec.trains else None


def scale_of_time(comparison: Comparison) -> tuple[str, int]:
    """A unit in which its training times read well, and its seconds."""
    return scale(max((t for r in comparison.records if (t := seconds(r)) is not None), default=0))


def scale(longest: float) -> tuple[str, int]:
    return ("h", 3600) if longest >= 3600 else ("min", 60) if longest >= 120 else ("s", 1)


def step_seconds(record: RunRecord) -> float | None:
    """Median of the steady steps; of all where the run was shorter than its warm-up."""
    steps = record.step_seconds[record.warmup_steps :] or record.step_seconds
    return float(np.median(steps)) if steps else None


def tokens_per_second(record: RunRecord) -> float | None:
    tokens, time = record.tokens, seconds(record)
    return (tokens.trained + (tokens.attach or 0)) / time if tokens.trained and time else None


def watt_hours(record: RunRecord) -> float | None:
    joules = [record.phases[name].joules for name in TRAINING if name in record.phases]
    known = record.spec.trains and joules and None not in joules
    return sum(joules) / 3600 if known else None


def read_outputs(comparison: Comparison, store: Store) -> None:
    """Gives the techniques the numbers of their test rows; a warning for a run on other rows."""
    rows = None
    for technique in comparison.techniques:
        found = []
        for record in technique.done:
            tested = store.tested(record)
            if rows is None:
                rows, comparison.parts, comparison.reference_tokens = tested.rows, tested.parts, tested.tokens
            if tested.rows != rows:
                comparison.warnings.append(
                    f"{technique.label} (seed {record.spec.seed}) was tested on other rows than the others"
                )
                continue
            found.append(tested.sums)
            technique.outputs_of = technique.outputs_of or record
        if len(found) == len(technique.done):
            technique.sums = found
