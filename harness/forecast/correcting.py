"""A forecast after a probe: what that measured stands in place of what was forecast."""

from dataclasses import replace
from statistics import fmean

from harness.forecast.cards import Card
from harness.forecast.forecast import BESIDE, PARTS, Forecast, libraries, phase_of
from harness.record import TIMED, Phase, RunRecord

ONCE = ("load", "attach", "compile")  # phases that a probe goes through as the run does


def corrected(made: Forecast, record: RunRecord, card: Card) -> Forecast:
    """By the record of a probe on this card, also of one that failed: then how it ended is what is known."""
    if not record.ok:
        return replace(made, tried=record.status, error=None, facts=made.facts | {"said": record.error})
    if not record.step_seconds:  # nothing trains
        return made
    rung = record.kernels.rung or made.rung
    found = replace(made, rung=rung, reason=record.kernels.reason, tried="ok", error=None)
    # Without the plain steps with which compiled ones are compared: those without room are left out.
    measured = {name: phase for name, phase in record.phases.items() if name != "compile"}
    phases = {name: phase for name, phase in measured.items() if phase.peak_allocated is not None}
    untried = "graph" in rung and (record.kernels.shapes or 0) < made.facts.get("shapes", 1)
    moments = {
        name: with_more(moment, libraries(name, rung) - libraries(name, made.rung))
        for name, moment in made.moments.items()
        if (untried if name == BESIDE else phase_of(name) not in record.phases)
    }
    for name, phase in phases.items():
        moments[name] = moment_of(phase, made, record)
    seconds = {name: record.phases[name].seconds for name in ONCE if name in record.phases}
    step = fmean(record.step_seconds[-TIMED:])
    alike = timed_steps(found, card) or len(record.hashes["batches"])
    start = 0.0 if made.facts.get("rolls_out") else record.phases.get("rollout", Phase()).seconds
    seconds |= {"train": step * alike, "rollout": start}  # a step's is in its seconds
    facts = made.facts | {"seconds": seconds, "context": context(record.phases["train"])}
    return replace(found, moments=moments, facts=facts)


def timed_steps(made: Forecast, card: Card) -> float | None:
    """How many steps as those that were timed take as long as the training."""
    facts = made.facts
    if "timed" not in facts or facts.get("rolls_out"):  # rollouts are as long for all rows
        return None
    whole = made.training(card, facts["micro_batches"], facts["micro_tokens"], facts["steps"])
    batches, tokens = facts["timed"]  # of one
    return whole / made.training(card, batches, tokens, 1)


def with_more(moment: dict, size: int) -> dict:
    return moment | {gauge: moment[gauge] + size for gauge in ("allocated", "reserved")}


def moment_of(phase: Phase, made: Forecast, record: RunRecord) -> dict:
    """Of its parts, those are measured that the run itself can count; activations are what is left."""
    allocated = phase.peak_allocated or 0
    reserved = max(allocated, phase.peak_reserved or 0)
    sizes, parts = record.sizes, dict.fromkeys(PARTS, 0) | made.highest.get("parts", {})
    own = (sizes.trainable_bytes or 0) if parts["adapters"] else 0
    parts |= {"weights": (sizes.weight_bytes or 0) - own, "adapters": own}
    parts["optimizer"] = sizes.optimizer_bytes or 0
    parts["activations"] = max(0, allocated - sum(parts.values()) + parts["activations"])
    return {"allocated": allocated, "reserved": reserved, "parts": parts, "measured": True}


def context(phase: Phase) -> int | None:
    """What the process takes of the card beside torch's memory; null where the driver does not say."""
    if phase.peak_device is None or phase.peak_reserved is None:
        return None
    return phase.peak_device - phase.peak_reserved
