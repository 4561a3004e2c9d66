"""What `plan` prints: a line for each arm, with what it will take of a card, and what does not fit."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import StringIO
from typing import Any

from harness import forecast
from harness.bench import cached, stale
from harness.cli import listing
from harness.cli.arguments import OK, RUNS_AGAIN, TOO_LARGE
from harness.cli.progress import describe
from harness.data import describe as sized
from harness.forecast import Card, Forecast
from harness.plain import plain
from harness.spec import RunSpec

SOLD = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # GB of cards that are sold
SMALLER, ROUNDS = 2, 3  # halvings of a micro-batch, and knobs of an arm in all, that are tried
GIB = 2**30
LEFT = 0.93  # of a sold card, to programs


@dataclass
class Arm:
    """The runs of a method with one set of options."""

    name: str
    runs: list[RunSpec]
    states: list[str]
    forecast: Forecast

    @property
    def due(self) -> int:
        return sum(not state.startswith("cached") for state in self.states)

    def verdict(self, card: Card) -> str:
        return self.forecast.verdict(self.share(card))

    def share(self, card: Card) -> Card:
        """As much of it as its runs may take."""
        cap = self.runs[0].own_hp.memory_cap * GIB
        return card.of(min(card.bytes, cap + card.context)) if cap else card


def show(specs, store, options) -> int:
    runs = [(spec, state(spec, specs, store, options.force)) for spec in known(specs, store, options.force)]
    card = card_of(options)
    arms = list(arms_of(specs, runs, forecasts(specs, runs, card)))
    if options.json:
        print(json.dumps([as_json(spec, said, arms, card) for spec, said in runs], indent=1))
    else:
        print(head(specs))
        if arms:
            print(table(arms, card))
        print("\n".join(below(specs, arms, runs, card, options)))
    large = card and any(arm.due and arm.verdict(card) == "too large" for arm in arms)
    return TOO_LARGE if large else OK


def card_of(options) -> Card | None:
    """The one that is asked for, or is here."""
    return forecast.card_of(options.memory[0]) if options.memory else forecast.card_at_hand()


def forecasts(specs, runs: list, card: Card | None) -> dict[str, Forecast]:
    """By digest; none where torch is not installed."""
    from rich.console import Console
    from rich.progress import Progress

    if os.environ.get("TUNEOFF_FORECASTS") == "0":  # as most tests want
        return {}
    wanted = [spec for spec, _ in runs] + [tuning.trial for tuning in specs.tunings]
    precision = wanted[0].hp.precision if wanted else "auto"
    bf16 = precision == "bf16" or (precision == "auto" and (card is None or card.bf16))
    with Progress(
        console=Console(stderr=True), transient=True, auto_refresh=False
    ) as bar:  # no thread: copies are made
        task = bar.add_task("forecasting", total=None)
        try:
            return forecast.foreseen(
                wanted, bf16, lambda n, of: bar.update(task, completed=n, total=of, refresh=True)
            )
        except ImportError:
            return {}


def arms_of(specs, runs: list, found: dict[str, Forecast]) -> Iterator[Arm]:
    varied = listing.differing([spec for spec, _ in runs])
    groups: dict[str, list[tuple[RunSpec, str]]] = {}
    for spec, said in runs:
        if not spec.members and not spec.trial:
            groups.setdefault(listing.named(spec, varied[spec.method]), []).append((spec, said))
    for tuning in specs.tunings:
        count = specs.trials + len(specs.seeds)
        several = [(tuning.trial, "will run")] * count
        groups.setdefault(f"{tuning.trial.method}, tuned", []).extend(several)
    for name, members in groups.items():
        own = [spec for spec, _ in members]
        missing = Forecast(error="not asked for, or torch is not installed")
        yield Arm(name, own, [said for _, said in members], found.get(own[0].digest, missing))


def as_json(spec: RunSpec, said: str, arms: list[Arm], card: Card | None) -> dict[str, Any]:
    found = {"run": spec.folder, "method": spec.method, "seed": spec.seed, "state": said}
    arm = next((arm for arm in arms if spec in arm.runs), None)
    if spec.members:
        return found | {"ensemble": describe(spec)}
    if arm is None or arm.forecast.error:
        return found | {"forecast": {"error": arm.forecast.error} if arm else None}
    made = arm.forecast
    told: dict[str, Any] = {
        "peak_allocated": round(made.peak), "parts": {k: round(v) for k, v in made.parts.items()},
        "kernels": made.rung, "saved_bytes": round(made.saved_bytes), "own_rows": made.own_rows,
    }  # fmt: skip
    if card:
        least, likely, most = made.total_seconds(card)
        told |= {"card": card.name, "device_bytes": round(made.device(card)), "verdict": arm.verdict(card),
                 "seconds": [round(x, 1) for x in (least, likely, most)]}  # fmt: skip
    return found | {"forecast": told}


# What a person reads


def head(specs) -> str:
    spec = specs.methods()[-1]
    parts = ", ".join(part["name"] for part in spec.dataset["parts"])
    rows = f"{sized(spec.dataset)} rows of each of {parts}"
    hp = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in vars(spec.hp).items())
    lines = [listing.paragraph(f"model {spec.model}; dataset {spec.dataset['name']}: {rows}", 2),
             listing.paragraph("hyperparameters: " + ", ".join(hp), 2)]  # fmt: skip
    for part, columns in specs.unused.items():
        if columns:
            lines.append(listing.paragraph(f"not used of {part}: {', '.join(columns)}", 2))
    return "\n".join([*lines, ""])


def table(arms: list[Arm], card: Card | None) -> str:
    """As many columns as there is room for."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    wide = listing.width()
    heads = ["Method", "Runs", "Peak", "On card", "Disk", "Time a run", "Verdict"]
    if not card:
        heads = ["Method", "Runs", "Peak", "Disk", "Needs a card of"]
    if wide >= 110:
        heads += ["Most of it", "Steps"]
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in heads:
        right = name in ("Runs", "Peak", "On card", "Disk", "Time a run", "Needs a card of")
        made.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=right)
    for arm in arms:
        cells = row(arm, card)
        made.add_row(*(Text(plain(cells[name])) for name in heads))
    console = Console(file=StringIO(), width=wide, color_system=None, legacy_windows=False)
    console.print(made)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def row(arm: Arm, card: Card | None) -> dict[str, str]:
    made, done = arm.forecast, len(arm.runs) - arm.due
    runs = f"{arm.due}" + f" +{done} cached" * bool(done)
    if made.error:
        blank = dict.fromkeys(("Peak", "On card", "Disk", "Time a run", "Needs a card of", "Steps"), "?")
        return {"Method": arm.name, "Runs": runs, **blank, "Verdict": "unknown", "Most of it": "?"}
    largest = sorted(made.parts.items(), key=lambda item: -item[1])[:2]
    found = {
        "Method": arm.name, "Runs": runs, "Peak": space(made.peak), "Disk": space(made.saved_bytes),
        "Most of it": ", ".join(f"{name} {space(size)}" for name, size in largest if size),
        "Steps": made.rung if arm.runs[0].trains else "",
    }  # fmt: skip
    if card:
        on_card, verdict = made.device(card), arm.verdict(card)
        found |= {"On card": space(on_card), "Verdict": verdict,
                  "Time a run": about(made.total_seconds(card)[1])}  # fmt: skip
    else:
        found["Needs a card of"] = smallest(made)
    return found


def smallest(made: Forecast) -> str:
    """Of the sizes that cards are sold in, the first that is enough."""
    for size in SOLD:
        card = forecast.card_of(size * 1e9)
        if made.verdict(card.of(size * GIB * LEFT)) == "fits":
            return f"{size} GB"
    return f"over {SOLD[-1]} GB"


def below(specs, arms: list[Arm], runs: list, card: Card | None, options) -> Iterator[str]:
    if specs.tunings:
        yield listing.paragraph(tuned(specs), 2)
    for spec, said in runs:
        if spec.members:
            yield plain(f"  {said:12} {describe(spec)}")
        if "(" in said and not spec.members:
            yield plain(f"  {describe(spec)}: {said}")
    if options.verbose:
        yield from (plain(f"  {said:12} {spec.folder}") for spec, said in runs)
    reasons: dict[str | None, list[str]] = {}
    for arm in arms:
        reasons.setdefault(arm.forecast.error, []).append(arm.name)
    for error, names in reasons.items():
        if error:
            yield listing.paragraph(f"  no forecast of {', '.join(names)}: {error}", 4)
    good = [arm for arm in arms if not arm.forecast.error]
    yield ""
    done = sum(said.startswith("cached") for _, said in runs)
    disk = space(sum(arm.forecast.saved_bytes * arm.due for arm in good))
    count = sum(arm.due for arm in arms)
    if card and good:
        least, likely, most = (
            sum(arm.forecast.total_seconds(card)[i] * arm.due for arm in good) for i in range(3)
        )
        yield listing.paragraph(f"On {the(card)}: {count} runs to do, {done} cached; about "
                                f"{about(likely)}, between {about(least)} and {about(most)}, and {disk} on "
                                "disk.", 0)  # fmt: skip
        yield from within(arms, likely, options)
        for line in remedies([arm for arm in good if arm.verdict(card) != "fits"], card):
            yield listing.paragraph(line, 4)
    else:
        yield f"{count} runs to do, {done} cached; {disk} on disk."
        yield listing.paragraph("There is no GPU here. --memory 16GB says what fits a card of so much, and "
                                "how long it takes" + ", for --hours too" * bool(options.hours) + "."
                                if good else "", 0)  # fmt: skip
    if any(not arm.forecast.own_rows for arm in good):
        yield listing.paragraph(
            "The rows are not here: all are taken to be as long as hp.max_length allows.", 0
        )
    yield listing.paragraph(
        "Peak: live tensors of the training; on the card: with what torch's allocator and the process hold.",
        0,
    )
    if any(arm.runs[0].devices > 1 for arm in good):
        yield listing.paragraph("Of a run on several cards that is what each holds and computes; what they "
                                "tell one another takes time and buffers that are not in it.", 0)  # fmt: skip


def the(card: Card) -> str:
    known = "" if card.known else ", whose speed is not known: as an A10"
    return f"{card.name} with {space(card.bytes)}{known}"


def within(arms: list[Arm], likely: float, options) -> Iterator[str]:
    """What of a plan the hours allow."""
    if not options.hours:
        return
    if likely <= options.hours:
        yield f"That is within {about(options.hours)}."
        return
    share = options.hours / likely
    seeds = max(len(arm.runs) for arm in arms)
    fewer = int(seeds * share)
    what = (
        f"{fewer} of {seeds} seeds"
        if fewer
        else f"{share:.0%} of the rows (data.train) and one seed"
        if share * seeds < 1 and seeds > 1
        else f"{share:.0%} of the rows (data.train)"
    )
    yield listing.paragraph(f"Within {about(options.hours)} fit {what}.", 0)


def remedies(arms: list[Arm], card: Card) -> Iterator[str]:
    """Of each arm that does not fit, the one knob that changes least and lets it fit, by forecasts of its
    own: the likeliest first, of all arms at once."""
    left = {arm.name: (arm, list(likely_knobs(arm, arm.share(card)))) for arm in arms}
    found: dict[str, str] = {}
    for _ in range(ROUNDS):
        tried = {name: knobs.pop(0) for name, (_, knobs) in left.items() if knobs and name not in found}
        specs = {name: changed(left[name][0].runs[0], changes) for name, (_, changes) in tried.items()}
        made = forecast.foreseen(specs.values(), card.bf16) if specs else {}
        for name, spec in specs.items():
            one = made.get(spec.digest)
            if one and not one.error and one.verdict(left[name][0].share(card)) == "fits":
                found[name] = f"fits with --set {tried[name][0]}"
    for name, (arm, _) in left.items():
        need, most = arm.forecast.device_at_least(card), arm.forecast.device(card)
        takes = space(most) if most < 1.05 * need else f"{space(need)} to {space(most)}"
        remedy = found.get(
            name, "no smaller micro-batch and no checkpointing lets it fit: a larger card would"
        )
        yield f"  {name}: {arm.verdict(card)}, takes {takes}; {remedy}"


def changed(spec: RunSpec, changes: dict[str, Any]) -> RunSpec:
    return replace(spec, hp=replace(spec.hp, **changes))


def likely_knobs(arm: Arm, card: Card) -> Iterator[tuple[str, dict[str, Any]]]:
    """Smaller micro-batches, which leave the steps as they are, from where a straight line says that they
    fit; then with layers computed again in backward."""
    spec, made = arm.runs[0], arm.forecast
    hp, parts, cannot = spec.own_hp, made.parts, made.facts.get("cannot", [])
    if not spec.trains:
        size = max(1, hp.eval_batch_size // 4)
        yield f"hp.eval_batch_size={size}", {"eval_batch_size": size}
        return
    moving = parts["activations"] + parts["head"]
    fixed = made.device_at_least(card) - moving
    sizes = [hp.micro_batch_size]
    while sizes[-1] > 1 and "accumulation" not in cannot:
        sizes.append(sizes[-1] // 2)
    fitting = [n for n in sizes[1:] if fixed + moving * n / sizes[0] < LEFT * card.bytes]
    for size in fitting[:SMALLER]:
        yield f"hp.micro_batch_size={size} (the same steps)", {"micro_batch_size": size}
    if "gradient checkpointing" not in cannot and not hp.gradient_checkpointing:
        for size in dict.fromkeys((sizes[0], sizes[-1])):
            texts = ["hp.gradient_checkpointing=true"] + [f"hp.micro_batch_size={size}"] * (size != sizes[0])
            yield " ".join(texts), {"gradient_checkpointing": True, "micro_batch_size": size}


def space(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:.0f} MiB"


def about(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# What a bench would do


def tuned(specs) -> str:
    """What the tuned track of a plan will do."""
    names = [tuning.trial.method for tuning in specs.tunings]
    which = f"each of {len(names)} methods" if len(names) > 1 else names[0]
    seeds = " ".join(map(str, specs.seeds))
    return f"tuned: {specs.trials} trials for {which}, then the best of each with seeds {seeds}"


def known(specs, store, force: bool) -> list[RunSpec]:
    """The runs that can be named: as far as those trials lead that are cached, and all that wait for none."""
    found: list = []
    done: dict = {}
    while stage := specs.upcoming(done):
        found += stage
        done |= {spec.digest: None if force else cached(spec, specs, store) for spec in stage}
        if any(spec.trial and done[spec.digest] is None for spec in stage):
            break
    return found + [spec for spec in specs if spec not in found]


def state(spec: RunSpec, specs, store, force: bool) -> str:
    """What a bench would do with a run."""
    earlier = store.find(spec)
    if earlier is None or force:
        return "will run"
    if cached(spec, specs, store):
        return "cached" + f" ({RUNS_AGAIN})" * stale(replace(earlier, spec=spec))
    if not earlier.ok:
        return f"will run again ({earlier.status})"
    if spec.members:
        return "will run again (a member has other answers now)"
    return "will run again (the untouched model has answers now)"
