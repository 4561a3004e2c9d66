"""What would let a plan fit: the knob of an arm that changes least, the rows that the hours allow."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from harness import forecast, method
from harness.cli.arms import Arm, about
from harness.forecast import Card, Forecast
from harness.method import LIMITS, Method
from harness.plain import space
from harness.record import EAGER
from harness.spec import RunSpec

ROUNDS = 4  # forecasts of an arm, at most, in search for its largest micro-batch
LEFT = 0.93  # of a sold card, to programs
MOST = 128  # rows of a micro-batch: more of them make no step faster
NEAR = 1.1  # of a card: by how much a straight line may be above a forecast
POWERS = [1 << power for power in range(MOST.bit_length())]
LEAST = 0.01  # of the rows: with less nothing is learned


def within(arms: list[Arm], card: Card, hours: float) -> str:
    """What of a plan so many seconds allow. Each run has fixed costs beside its training: loading, compiling,
    evaluating, saving."""
    whole = sum(arm.seconds(card) * arm.due for arm in arms)
    if whole <= hours:
        return f"That is within {about(hours)}."
    due = [arm for arm in arms if arm.due]
    seeds = max((arm.due for arm in due), default=0)
    training = {arm.name: share_of_rows(arm, card) for arm in due}
    once = sum(arm.seconds(card) for arm in due if not arm.runs[0].trains)
    seed = sum(arm.seconds(card) for arm in due if arm.runs[0].trains)
    if seed and 1 <= (fewer := int((hours - once) / seed)) < seeds:
        return f"Within {about(hours)}: {fewer} of {seeds} seeds."
    fixed, rows = once + seed - sum(training.values()), sum(training.values())
    one = ", one seed" * (seeds > 1)
    if rows and (share := (hours - fixed) / rows) >= LEAST:
        return f"Within {about(hours)}: {share:.0%} of the rows (data.train){one}."
    fitting, left = [], hours - once
    for arm in sorted((arm for arm in due if arm.runs[0].trains), key=lambda arm: arm.seconds(card)):
        if (left := left - arm.seconds(card)) >= 0:
            fitting.append(arm.name)
    alone = f"loading, compiling and evaluating alone take {about(fixed)} for one seed of all"
    some = f" There is time for {', '.join(fitting)} alone{one}." if fitting else ""
    return f"Not within {about(hours)}: {alone}.{some}"


def share_of_rows(arm: Arm, card: Card) -> float:
    """Seconds of a run that fewer training rows make fewer."""
    seconds = arm.forecast.seconds(card)
    return seconds.get("train", 0.0) + seconds.get("rollout", 0.0)


def largest(arms: list[Arm], card: Card) -> dict[str, int]:
    """Of each arm that trains, the largest micro-batch that fits, by a forecast of that very size: what it
    has, or a power of two up to MOST; 0: none. Which to forecast next, a straight line says."""
    searched = {arm.name: Sizes(arm, card) for arm in arms if arm.runs[0].trains}
    for _ in range(ROUNDS):
        asked = {name: size for name, sizes in searched.items() if (size := sizes.next())}
        specs = {name: searched[name].spec(size) for name, size in asked.items()}
        made = foreseen(specs, card)
        for name, size in asked.items():
            searched[name].known[size] = made[name]
    return {name: sizes.largest for name, sizes in searched.items()}


class Sizes:
    """What is known of an arm's micro-batches: by their rows, forecasts."""

    def __init__(self, arm: Arm, card: Card):
        self.run, self.card = arm.runs[0], arm.share(card)
        self.cut = "accumulation" not in arm.forecast.facts.get("cannot", [])  # of a step, or of all
        self.known = {self.run.own_hp.micro_batch_size: arm.forecast}

    @property
    def largest(self) -> int:
        return max((size for size, made in self.known.items() if fits(made, self.card)), default=0)

    def next(self) -> int:
        """Of what is between the sizes that are known to fit and not to, the largest that should fit, or the
        least that nearly should; 0: none."""
        misfits = [size for size, made in self.known.items() if not fits(made, self.card)]
        between = [size for size in POWERS if self.largest < size < min(misfits, default=2 * MOST)]
        fitting = [size for size in between if fits(self.like(size), self.card)]
        near = [size for size in between[:1] if self.like(size).needs(self.card) <= NEAR * self.card.bytes]
        return max(fitting or near, default=0)

    def like(self, size: int) -> Forecast:
        """By the nearest that is known, as if what differs grew with the rows."""
        near = min(self.known, key=lambda known: max(known, size) / min(known, size))
        return self.known[near].scaled(size / near)

    def spec(self, size: int) -> RunSpec:
        """The same steps, where they can be cut and are as large."""
        batch = max(size, self.run.own_hp.batch_size) if self.cut else size
        return changed(self.run, {"batch_size": batch, "micro_batch_size": size})


def fits(made: Forecast | None, card: Card) -> bool:
    return made is not None and made.verdict(card) == "fits"


def foreseen(specs: dict[str, RunSpec], card: Card) -> dict[str, Forecast]:
    """By the names of the arms."""
    if not specs:
        return {}
    bf16 = forecast.computes_bf16(next(iter(specs.values())).hp, card)
    made = forecast.foreseen(specs.values(), bf16)
    missing = Forecast(error="not forecast")
    return {name: made.get(spec.digest, missing) for name, spec in specs.items()}


def remedies(arms: list[Arm], card: Card, sizes: dict[str, int]) -> Iterator[str]:
    """Of each arm that does not fit, the one knob that changes least and lets it fit, by forecasts of its
    own: the likeliest first, of all arms at once; `sizes`: of its `largest`. Of one whose probe failed
    otherwise, why."""
    broken = [arm for arm in arms if arm.verdict(card) not in ("tight", "too large")]
    for arm in broken:
        yield f"  {arm.name}: {arm.verdict(card)}, as its probe found: {arm.forecast.facts.get('said')}"
    left = {arm.name: (arm, list(knobs(arm, card, sizes))) for arm in arms if arm not in broken}
    found: dict[str, str] = {}
    while tried := {name: own.pop(0) for name, (_, own) in left.items() if own and name not in found}:
        for name, made in foreseen({name: spec for name, (_, spec) in tried.items()}, card).items():
            if fits(made, left[name][0].share(card)):
                found[name] = f"fits {tried[name][0]}"
    for name, (arm, _) in left.items():
        need, most = arm.forecast.device_at_least(card), arm.forecast.device(card)
        takes = space(most) if most < 1.05 * need else f"{space(need)} to {space(most)}"
        takes = "had no room in its probe" if arm.forecast.tried.startswith("oom") else f"takes {takes}"
        none = (
            "no smaller micro-batch, checkpointing, packing or shorter rows let it fit: a larger card would"
        )
        yield f"  {name}: {arm.verdict(card)}, {takes}; {found.get(name, none)}"


def changed(spec: RunSpec, changes: dict[str, Any]) -> RunSpec:
    return replace(spec, changes=spec.changes | changes)


def knobs(arm: Arm, card: Card, sizes: dict[str, int]) -> Iterator[tuple[str, RunSpec]]:
    """In words and as a run, those that may let it fit, by a straight line, from what leaves a training as it
    is to what cuts its rows."""
    spec, made, share = arm.runs[0], arm.forecast, arm.share(card)
    hp, cannot, size = spec.own_hp, made.facts.get("cannot", []), sizes.get(arm.name, 0)

    def knob(changes: dict[str, Any], said: str = "") -> tuple[str, RunSpec]:
        other = [f"hp.{k}={str(v).lower()}" for k, v in changes.items() if getattr(hp, k) != v]
        return f"with --set {' '.join(other)}{said}" * bool(other), changed(spec, changes)

    for asked in reversed([size for size in POWERS if size < hp.eval_batch_size]):
        if fits(made.scaled(evaluated=asked / hp.eval_batch_size), share):
            yield knob({"eval_batch_size": asked})
            break
    if not spec.trains:
        return
    smaller, cut = 0 < size < hp.micro_batch_size, "accumulation" not in cannot
    least = {"micro_batch_size": 1 if cut else hp.micro_batch_size}
    possible = fits(made.scaled(0), share)  # else what has no rows is too large
    if smaller and cut:
        yield knob({"micro_batch_size": size}, " (the same steps)")
    checkpointed = possible and "gradient checkpointing" not in cannot and not hp.gradient_checkpointing
    if checkpointed:
        yield knob({"gradient_checkpointing": True} | least)
    if possible and made.rung == EAGER and made.own_rows and "packing" not in cannot and not hp.packing:
        yield knob({"packing": True} | least)
    said, fewer = knob(least)
    yield from ((f"{text} {said}".rstrip(), other) for text, other in lighter(fewer))
    if smaller and not cut:
        yield knob({"micro_batch_size": size, "batch_size": size}, " (smaller steps)")
    for rows in reversed([n for n in POWERS if checkpointed and not cut and n < hp.micro_batch_size]):
        small = {"gradient_checkpointing": True, "micro_batch_size": rows, "batch_size": rows}
        yield knob(small, " (smaller steps)")
    if possible and (half := hp.max_length // 2):
        yield knob({"max_length": half} | least, " (longer rows are cut)")


def lighter(spec: RunSpec) -> Iterator[tuple[str, RunSpec]]:
    """As methods that load another base, as one in 4 bits, or have another optimizer, as one of 8 bits, and
    are else the same, their options too."""
    known = method.known_methods()
    with suppress(Exception):  # a plugin
        own = method.resolve(spec.method, method.find(spec.method, known))
        others = [method.resolve(name, source) for name, source in known.items()]
        for hook in ("load", "optimizer"):
            for cls in others:
                alike = own.trains == cls.trains and options_of(own) == options_of(cls)
                hp, dataset = cls.own(spec.own_hp), dict(spec.dataset)
                refused = any(LIMITS[limit].asked(hp, dataset) for limit in cls.cannot)
                if alike and not refused and differing(own, cls) - {"merge"} == {hook}:
                    yield f"as {cls.name} ({method.card(cls)['summary']})", replace(spec, method=cls.name)


def options_of(cls: type[Method]) -> list[str]:
    return list(getattr(cls, "__dataclass_fields__", ()))


def differing(one: type[Method], other: type[Method]) -> set[str]:
    """The hooks in which two methods are not the same."""
    names = {name for cls in (one, other) for name in dir(cls) if not name.startswith("_")}
    found = {name: [getattr(cls, name, None) for cls in (one, other)] for name in names}
    apart = {name: [getattr(hook, "__func__", hook) for hook in both] for name, both in found.items()}
    return {name for name, both in apart.items() if any(map(callable, both)) and both[0] is not both[1]}
