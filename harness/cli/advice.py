"""What would let a plan fit: the knob of an arm that changes least, the rows that the hours allow."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from harness import forecast
from harness.cli.arms import Arm, about
from harness.forecast import Card
from harness.plain import space
from harness.spec import RunSpec

SMALLER, ROUNDS = 2, 5  # halvings of a micro-batch, and knobs of an arm in all, that are tried
LEFT = 0.93  # of a sold card, to programs
MOST = 128  # rows of a micro-batch: more of them make no step faster
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
    """Of each arm that trains, the largest micro-batch that fits, a power of two up to MOST; 0: none.
    From where a straight line says so, by a forecast of its own."""
    sizes: dict[str, int] = {}
    for arm in arms:
        spec, made = arm.runs[0], arm.forecast
        if spec.trains:
            moving = (made.parts["activations"] + made.parts["head"]) / spec.own_hp.micro_batch_size
            room = LEFT * arm.share(card).bytes - made.device_at_least(card)
            most = max(1, spec.own_hp.micro_batch_size + int(room / max(moving, 1)))
            sizes[arm.name] = min(MOST, 1 << (most.bit_length() - 1))
    found: dict[str, int] = {}
    left = {arm.name: arm for arm in arms if arm.name in sizes}
    for _ in range(SMALLER + 1):
        asked = {name: changed(arm.runs[0], batch_of(sizes[name])) for name, arm in left.items()}
        made_of = forecast.foreseen(asked.values(), forecast.computes_bf16(arms[0].runs[0].hp, card))
        for name, spec in asked.items():
            one = made_of.get(spec.digest)
            if one and one.verdict(left[name].share(card)) == "fits":
                found[name] = sizes[name]
            sizes[name] //= 2
        left = {name: arm for name, arm in left.items() if name not in found and sizes[name]}
    return found | dict.fromkeys(sizes.keys() - found.keys(), 0)


def batch_of(size: int) -> dict[str, Any]:
    return {"batch_size": size, "micro_batch_size": size}


def remedies(arms: list[Arm], card: Card) -> Iterator[str]:
    """Of each arm that does not fit, the one knob that changes least and lets it fit, by forecasts of its
    own: the likeliest first, of all arms at once. Of one whose probe failed otherwise, why."""
    broken = [arm for arm in arms if arm.verdict(card) not in ("tight", "too large")]
    for arm in broken:
        yield f"  {arm.name}: {arm.verdict(card)}, as its probe found: {arm.forecast.facts.get('said')}"
    left = {arm.name: (arm, list(likely_knobs(arm, arm.share(card)))) for arm in arms if arm not in broken}
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
        takes = "had no room in its probe" if arm.forecast.tried.startswith("oom") else f"takes {takes}"
        remedy = found.get(
            name, "no smaller micro-batch, checkpointing or shorter rows let it fit: a larger card would"
        )
        yield f"  {name}: {arm.verdict(card)}, {takes}; {remedy}"


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
    if half := hp.max_length // 2:
        text = f"hp.max_length={half} hp.micro_batch_size={sizes[-1]} (longer rows are cut)"
        yield text, {"max_length": half, "micro_batch_size": sizes[-1]}
