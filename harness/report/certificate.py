"""The fairness certificate: what was the same for all rows, and what was not, by name."""

from dataclasses import asdict

from harness.record import EAGER, RunRecord
from harness.report.comparison import Comparison
from harness.report.text import listed
from harness.spec import digest

UNKNOWN = "not recorded"
ROUNDING = 0.5  # of the gradients' length, at most: beyond, they are not those of the same loss
DECISIVE = ("precision", "attention", "device", "code")  # of the provenance: a check each


def certificate(comparison: Comparison) -> list[tuple[str, bool | None, str]]:
    """(what should be the same, whether it is or null where nobody noted it, details) a check."""
    names = {
        f"{technique.label} (seed {r.spec.seed})" if not technique.spec.untouched else technique.label: r
        for technique in comparison.techniques
        for r in technique.done
    }
    trained = {name: r for name, r in names.items() if r.spec.trains}
    checks = [
        same("Rows planned for each step", planned(trained)),
        steps("Tokens the model was given in each step", "given", trained),
        steps("Tokens that carried loss in each step", "learned", trained),
        same("Tokens read before the first step", {"tokens": read_before(trained)}, shown=True),
    ]
    for split, runs in (("train", trained), ("validation", trained), ("test", names)):
        values = {name: r.hashes.get(split) for name, r in runs.items()}
        checks.append(same(f"Rows to {'validate' if split == 'validation' else split} on", {split: values}))
    checks.append(unanswered(names))
    if any("before" in r.hashes for r in names.values()):
        checks.append(same("Rejected answers", {"taken from": rejected(names)}, shown=True))
    for phase, runs in (("training", trained), ("scoring", names)):
        types = {name: arithmetic(r.arithmetic.get(phase) or {}) for name, r in runs.items()}
        checks.append(same(f"Arithmetic of the {phase}, as measured", {"types": types}, shown=True))
    checks.append(kernels(trained))
    made = {name: facts(r) for name, r in names.items()}
    for key in DECISIVE:
        values = {name: e.get(key) for name, e in made.items()}
        what = "Tuneoff's own code" if key == "code" else key.capitalize()
        checks.append(same(what, {key: values}, shown=True))
    others = sorted({key for e in made.values() for key in e} - set(DECISIVE))
    rest = {key: {name: e.get(key) for name, e in made.items()} for key in others}
    checks.append(same("Package versions and machine", rest, shown=True))
    signatures = {
        metric: {name: r.signatures.get(metric) for name, r in names.items()}
        for metric in sorted({metric for r in names.values() for metric in r.signatures})
    }
    checks.append(same("Way of measuring each score", signatures, shown=True))
    checks.append(code(comparison))
    checks.append(undisturbed(trained))
    if any(r.beside for r in trained.values()):
        checks.append(apart(trained))
    return checks


def same(what: str, properties: dict[str, dict], shown: bool = False) -> tuple[str, bool | None, str]:
    """One check over properties: name -> run -> value. `shown`: values say something to a reader."""
    differing, missing, agreed, known = [], [], [], 0
    for name, values in properties.items():
        groups: dict[str, list[str]] = {}
        for run, value in values.items():
            if value is not None and value != "":
                groups.setdefault(str(value), []).append(run)
        known += len(groups)
        if len(groups) > 1:
            sides = (f"{value} for {listed(runs, 4)}" if shown else listed(runs, 4)
                     for value, runs in groups.items())  # fmt: skip
            differing.append(f"{name}: {' against '.join(sides)}")
        elif groups:
            agreed += groups
            if unknown := [run for run, value in values.items() if value in (None, "")]:
                missing.append(f"{name} not recorded for {listed(unknown, 4)}")
    if not known:
        return what, None, UNKNOWN
    value = agreed if shown and len(properties) == 1 else []
    return what, not differing, "; ".join(value + differing + missing)


def unanswered(runs: dict[str, RunRecord]) -> tuple[str, bool | None, str]:
    """Whether a prompt that is scored was also learned with its answer, token by token."""
    what = "No test prompt was answered in training"
    known = {name: found for name, r in runs.items() if (found := r.data.answered)}
    if not known:
        return what, None, UNKNOWN
    leaks = [f"{found[split]} {split} prompts were, in {name}"
             for name, found in known.items() for split in found if found[split]]  # fmt: skip
    rows = {count for name in known if (count := runs[name].data.rows.get("test"))}
    missing = [f"not recorded for {listed(others, 4)}"] if (others := sorted(set(runs) - set(known))) else []
    none = [f"0 of {listed(sorted(map(str, rows)))}"] if rows and not leaks else []
    return what, not leaks, "; ".join(none + leaks + missing)


def planned(runs: dict[str, RunRecord]) -> dict[str, dict]:
    found: dict[str, dict] = {}
    for name, record in runs.items():
        hashes = record.hashes.get("batches")
        found.setdefault(f"seed {record.spec.seed}", {})[name] = digest(hashes) if hashes else None
    return found


def steps(what: str, kind: str, runs: dict[str, RunRecord]) -> tuple[str, bool | None, str]:
    """Of what was `given` or `learned` in training: who differs from the first of a seed, by how much."""
    seeds: dict[int, dict[tuple, list[str]]] = {}
    for name, record in runs.items():
        groups = seeds.setdefault(record.spec.seed, {})
        groups.setdefault(tuple(record.hashes.get(kind) or ()), []).append(name)
    unknown = [name for groups in seeds.values() for name in groups.pop((), [])]
    differing = []
    for seed, groups in seeds.items():
        first, *others = groups or [()]
        sides = [f"{amount(runs[groups[first][0]], kind)} for {listed(groups[first], 4)}"] if others else []
        for other in others:
            steps = max(len(first), len(other))
            same = sum(a == b for a, b in zip(first, other, strict=False))
            names = listed(groups[other], 4)
            sides.append(f"{amount(runs[groups[other][0]], kind)} for {names}, "
                         f"not the same in {steps - same} of {steps} steps")  # fmt: skip
        differing += [f"seed {seed}: {' against '.join(sides)}"] if others else []
    missing = [f"{UNKNOWN} for {listed(unknown, 4)}"] if unknown else []
    if not any(seeds.values()):
        return what, None, UNKNOWN
    same = not differing if differing or not missing else None
    return what, same, "; ".join(differing + missing)


def read_before(runs: dict[str, RunRecord]) -> dict[str, str | None]:
    """By a warm-up, or by a start that is made of the data."""
    counts = {name: r.tokens.attach for name, r in runs.items()}
    return {name: None if count is None else f"{count:,}" for name, count in counts.items()}


def amount(record: RunRecord, kind: str) -> str:
    tokens = record.tokens
    if kind == "learned":
        return f"{tokens.supervised or 0:,} tokens"
    return f"{tokens.trained or 0:,} tokens of {tokens.rows or 0:,} training rows"


def rejected(runs: dict[str, RunRecord]) -> dict[str, str | None]:
    """Where the data lack pairs they are the untouched model's answers, if it had any."""
    words = {name: r.hashes["before"] for name, r in runs.items() if "before" in r.hashes}
    words = {name: f"answers {found}" if found else "no answers" for name, found in words.items()}
    return {name: words.get(name) for name in runs}


def arithmetic(types: dict[str, str | None]) -> str:
    return ", ".join(f"{what} in {type_}" for what, type_ in types.items() if type_)


def kernels(runs: dict[str, RunRecord]) -> tuple[str, bool | None, str]:
    """Whether all steps were computed the same way: else some of a difference in time is not the method's."""
    ways = {name: way(r) for name, r in runs.items()}
    what, alike, details = same("Kernels of the steps", {"steps": ways}, shown=True)
    if alike is False:
        reasons = [f"{name}: {r.kernels.reason}" for name, r in runs.items() if r.kernels.reason]
        details += ". To compute all rows plainly: --set hp.kernels=eager"
        details += f" ({'; '.join(reasons)})" * bool(reasons)
    if wrong := [name for name, r in runs.items() if (r.kernels.apart or 0) > ROUNDING]:
        told = f"after its last step, gradients were no longer those of a plain one: {listed(wrong)}"
        return what, False, f"{told}; run again with --set hp.kernels=eager. {details}"
    return what, alike, details


def way(record: RunRecord) -> str:
    packed = {None: "", True: ", rows packed", False: ", a row a sequence"}[record.kernels.packed]
    return (record.kernels.rung or EAGER) + packed  # before there was a ladder, all were


def code(comparison: Comparison) -> tuple[str, bool | None, str]:
    """A row is stale when a run of it has other code than the newest run of that method."""
    what = "Source code of each method, over its runs"
    newest = {}
    for record in sorted(comparison.records, key=lambda r: r.started):
        if found := record.hashes.get("method_code"):
            newest[record.spec.method] = found
    stale = [
        technique.label
        for technique in comparison.techniques
        if {r.hashes.get("method_code") for r in technique.records}
        - {None, newest.get(technique.spec.method)}
    ]
    if stale:
        return what, False, f"{listed(stale)}: stale, as the method has changed since; run again"
    return (what, True, "") if newest else (what, None, UNKNOWN)


def facts(record: RunRecord) -> dict[str, str | int | None]:
    """With what a run was made, each fact by its name; `code`: see harness.record.Provenance."""
    found = asdict(record.provenance)
    packages = {f"packages.{name}": version for name, version in found.pop("packages").items()}
    hidden = ("commit", "dirty", "version")
    return (
        {name: value for name, value in found.items() if name not in hidden}
        | {"code": record.provenance.code}
        | packages
    )


def undisturbed(runs: dict[str, RunRecord]) -> tuple[str, bool | None, str]:
    """Whether a machine was the run's own while it trained; else its time is not ranked."""
    what = "A machine of its own"
    busy = [f"{name}: {', '.join(record.disturbed)}" for name, record in runs.items() if record.disturbed]
    unknown = [name for name, record in runs.items() if record.disturbed is None]
    if len(unknown) == len(runs):
        return what, None, UNKNOWN
    missing = [f"{UNKNOWN} for {listed(unknown, 4)}"] if unknown else []
    return what, not busy if busy or not missing else None, "; ".join(busy + missing)


def apart(runs: dict[str, RunRecord]) -> tuple[str, bool | None, str]:
    """Whether runs that were under way on one machine at the same time left each other alone. Of a run that
    was disturbed it is not known: who did it cannot be told, only who was there."""
    what = "Runs side by side left each other alone"
    beside = {name: r.beside for name, r in runs.items() if r.beside}
    folders = {r.folder: name for name, r in runs.items()}
    hit = [
        f"{name}, beside which ran {listed([folders.get(other, other) for other in others], 4)}"
        for name, others in beside.items()
        if runs[name].disturbed
    ]
    if hit:
        return what, None, f"disturbed, by them or by others: {'; '.join(hit)}"
    most = max(len(others) for others in beside.values())
    details = f"{len(beside)} of {len(runs)} trainings had others beside them, up to {most}"
    known = all(runs[name].disturbed is not None for name in beside)
    return what, True if known else None, details + ", and none was disturbed" * known
