"""What `plan` prints: a line for each arm, with what it will take of a card, and what does not fit; and what
a bench says of that before its first run."""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from io import StringIO
from typing import Any

from harness import forecast
from harness.bench import lock
from harness.cli import beforehand, listing
from harness.cli.advice import LEFT, MOST, largest, remedies, within
from harness.cli.arguments import OK, TOO_LARGE
from harness.cli.arms import GIB, Arm, about, arms_of, energy, known, state
from harness.cli.progress import describe
from harness.data import describe as sized
from harness.errors import BadRequest
from harness.forecast import CARDS, Card
from harness.plain import plain, space
from harness.spec import RunSpec

SOLD = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141)  # GB of cards that are sold
NUMBERS = ("Runs", "Peak", "On card", "Disk", "Time a run", "Energy a run", "Needs a card of")
WIDE = 110  # columns, at which a table has room for more than the verdict


def show(specs, store, options) -> int:
    card = card_of(options)
    arms, runs = arms_with(specs, store, options, card, options.probe)
    if options.json:
        print(json.dumps([as_json(spec, said, arms, card) for spec, said in runs], indent=1))
    else:
        print("\n".join(told(specs, arms, runs, card, options)))
    large = card and any(arm.due and arm.verdict(card) == "too large" for arm in arms)
    return TOO_LARGE if large else OK


def before_runs(specs, store, options) -> None:
    """Of a bench, before its first run: forecasts, which the report holds against what is measured; of a long
    one, or where it is asked for, probes too, and what they say."""
    card = None if options.on else forecast.card_at_hand()
    if not card and not options.probe:
        return
    with lock(options.results):
        arms, runs = arms_with(specs, store, options, card, options.probe)
        ahead = [arm for arm in arms if arm.due and not arm.forecast.error]
        if not (card and ahead):
            return
        long = sum(arm.seconds(card) * arm.due for arm in ahead) > beforehand.LONG
        if long and not options.probe:
            arms, runs = arms_with(specs, store, options, card, True)
    if long or options.probe or any(arm.verdict(card) != "fits" for arm in ahead):
        arms = [arm for arm in arms if arm.due]
        stream = sys.stderr if options.json else sys.stdout
        print("\n".join([summary(arms, runs, card), "", table(arms, card), ""]), file=stream, flush=True)


def card_of(options) -> Card | None:
    """The one that is asked for, or is here."""
    if not options.memory:
        return forecast.card_at_hand()
    return options.memory if isinstance(options.memory, Card) else forecast.card_of(options.memory[0])


def arms_with(specs, store, options, card: Card | None, probe: bool) -> tuple[list[Arm], list]:
    """The arms with their forecasts, and the runs with what a bench would do with each. `probe`: what was not
    probed on this card is now; raises BadRequest where that cannot be."""
    if probe and (not card or vars(options).get("memory")):
        raise BadRequest(NO_PROBE)
    runs = [(spec, state(spec, specs, store, options.force)) for spec in known(specs, store, options.force)]
    searched = [spec for t in specs.tunings for spec in (t.trial, t.identical)]
    found = beforehand.forecasts([*(spec for spec, _ in runs), *searched], card)
    if probe and card:
        due = {spec.digest for spec, said in runs if not said.startswith("cached")}
        found = beforehand.probed(specs, due, found, card)
    arms = list(arms_of(specs, runs, found))
    if card and not card.stands_in:
        for arm, watts in zip(arms, beforehand.watts(arms, store, card), strict=True):
            arm.watts = watts
    return arms, runs


NO_PROBE = (
    "--probe makes steps on the card at hand: leave it out where there is none, and with --memory and --on "
    "(--set hp.memory_cap=15 makes the card at hand smaller)"
)


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
        "probe": made.tried or None,
    }  # fmt: skip
    if card:
        seconds = [round(x, 1) for x in made.total_seconds(card)]
        told |= {"card": card.name, "stands_in": card.stands_in, "device_bytes": round(made.device(card)),
                 "verdict": arm.verdict(card), "seconds": seconds, "joules": arm.joules(card)}  # fmt: skip
    return found | {"forecast": told}


# What a person reads


def told(specs, arms: list[Arm], runs: list, card: Card | None, options) -> Iterator[str]:
    """The answer first; settings last."""
    yield subject(specs)
    if arms:
        yield from ("", summary(arms, runs, card), "", table(arms, card), "")
    yield from below(specs, arms, runs, card, options)
    yield from settings(specs)


def subject(specs) -> str:
    spec = specs.methods()[-1]
    parts = ", ".join(part["name"] for part in spec.dataset["parts"])
    rows = f"{sized(spec.dataset)} rows of each of {parts}"
    return listing.paragraph(f"model {spec.model}; dataset {spec.dataset['name']}: {rows}", 2)


def settings(specs) -> Iterator[str]:
    hp = vars(specs.methods()[-1].hp)
    texts = (f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in hp.items())
    yield listing.paragraph("hyperparameters: " + ", ".join(texts), 2)
    for part, columns in specs.unused.items():
        if columns:
            yield listing.paragraph(f"not used of {part}: {', '.join(columns)}", 2)


def summary(arms: list[Arm], runs: list, card: Card | None) -> str:
    """What fits, how long it takes, and what it leaves on the disk."""
    done, count = sum(said.startswith("cached") for _, said in runs), sum(arm.due for arm in arms)
    good = [arm for arm in arms if not arm.forecast.error]
    going = [arm for arm in good if not card or arm.goes(card)]
    disk = f"{space(sum(arm.forecast.saved_bytes * arm.due for arm in going))} on disk"
    todo = f"{count} runs to do, {done} cached"
    only = " for what fits" if len(going) < len(good) else " for what is forecast" * (len(good) < len(arms))
    if not good:
        return listing.paragraph(f"{todo}.", 0)
    if not card:
        return listing.paragraph(f"{todo}; {disk}{only}.", 0)
    of_each = [arm.forecast.total_seconds(card) for arm in going for _ in range(arm.due)]
    least, likely, most = (sum(times) for times in zip(*of_each, strict=True)) if of_each else (0, 0, 0)
    joules = [arm.joules(card) for arm in going for _ in range(arm.due)]
    spent = f", {energy(sum(filter(None, joules)))}" if joules and None not in joules else ""
    time = f": about {about(likely)}{only} ({about(least)} to {about(most)}){spent}, {disk}" * bool(of_each)
    verdicts = Counter(arm.verdict(card) for arm in arms)
    fit = f"{verdicts.pop('fits', 0)} of {len(arms)} fit"
    others = [f"{number} {verdict}" for verdict, number in verdicts.items()]
    return listing.paragraph(f"On {the(card)}: {', '.join([fit, *others])}. {todo}{time}.", 0)


def the(card: Card) -> str:
    if card.stands_in:
        return f"a card with {space(card.bytes)}, taken to be as fast as {card.name}"
    known = "" if card.known else ", whose speed is not known: as an A10"
    return f"{card.name} with {space(card.bytes)}{known}"


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
    if wide >= WIDE:
        heads[-1:-1] = ["Energy a run"] * any(arm.watts for arm in arms)
        heads += ["Most of it", "Steps"]
    made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in heads:
        right = name in NUMBERS
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
        blank = dict.fromkeys((*NUMBERS, "Most of it", "Steps"), "?")
        return blank | {"Method": arm.name, "Runs": runs, "Verdict": "unknown"}
    largest_parts = sorted(made.parts.items(), key=lambda item: -item[1])[:2]
    found = {
        "Method": arm.name, "Runs": runs, "Peak": space(made.peak), "Disk": space(made.saved_bytes),
        "Most of it": ", ".join(f"{name} {space(size)}" for name, size in largest_parts if size),
        "Steps": (made.rung + ", probed" * bool(made.tried)) * arm.runs[0].trains,
    }  # fmt: skip
    if made.tried not in ("", "ok"):
        found |= dict.fromkeys(("Peak", "On card", "Time a run", "Energy a run", "Most of it"), "–")
        found["Verdict"] = arm.verdict(card) if card else made.tried
    elif card:
        found |= {"On card": space(made.device(card)), "Time a run": about(arm.seconds(card)),
                  "Energy a run": energy(arm.joules(card)), "Verdict": arm.verdict(card)}  # fmt: skip
    else:
        found["Needs a card of"] = smallest(arm)
    return found


def smallest(arm: Arm) -> str:
    """Of the sizes that cards are sold in, the first that is enough."""
    for size in SOLD:
        if arm.forecast.verdict(forecast.card_of(size * 1e9).of(size * GIB * LEFT)) == "fits":
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
    if card and good:
        wrong = [arm for arm in good if arm.verdict(card) != "fits"]
        sizes = largest(good if options.memory else wrong, card)
        for line in remedies(wrong, card, sizes):
            yield listing.paragraph(line, 4)
        if options.memory and sizes:
            length = good[-1].runs[0].own_hp.max_length
            rows = "of these rows, which" if all(arm.forecast.own_rows for arm in good) else "were all rows"
            are = f"are cut at {length} tokens" if "these" in rows else f"{length} tokens long"
            more = {0: "none", MOST: f"{MOST} or more"}
            most = ", ".join(f"{name} {more.get(size, size)}" for name, size in sizes.items())
            yield listing.paragraph(f"Largest micro-batch that fits, {rows} {are}: {most}.", 0)
        if options.hours:
            going = [arm for arm in good if arm.goes(card)]
            yield listing.paragraph(within(going, card, options.hours), 0)
        yield from (listing.paragraph(line, 0) for line in of_the_card(card))
    elif good:
        said = "There is no GPU here: --memory 16GB says what fits a card of so much, and how long it takes."
        needs = " --hours needs that, too: the time depends on the card."
        yield listing.paragraph(said + needs * bool(options.hours), 0)
    if any(not arm.forecast.own_rows for arm in good):
        yield listing.paragraph(
            "The rows are not here: all are taken to be as long as hp.max_length allows.", 0
        )
    if good:
        said = (
            "Peak: live tensors of the training; on card: with what torch's allocator and the process hold."
        )
        yield listing.paragraph(said, 0)
    if any(arm.runs[0].devices > 1 for arm in good):
        yield listing.paragraph("Of a run on several cards that is what each holds and computes; what they "
                                "tell one another takes time and buffers that are not in it.", 0)  # fmt: skip


def of_the_card(card: Card) -> Iterator[str]:
    """Whose speed stands in for its own, and which of its size are another matter."""
    if card.stands_in:
        slow = [name for name, one in CARDS.items() if not one.bf16 and abs(one.bytes / card.bytes - 1) < 0.1]
        other = f" {' and '.join(slow)} of that size lack bf16, take longer and hold more." if slow else ""
        yield f"--memory takes a card's name, too: {', '.join(CARDS)}.{other}"


# What a bench would do


def tuned(specs) -> str:
    """What the tuned track of a plan will do."""
    names = [tuning.trial.method for tuning in specs.tunings]
    which = f"each of {len(names)} methods" if len(names) > 1 else names[0]
    seeds = " ".join(map(str, specs.seeds))
    return f"tuned: {specs.trials} trials for {which}, then the best of each with seeds {seeds}"
