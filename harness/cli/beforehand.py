"""What runs will take, known beforehand: forecasts, and the probes that correct them."""

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from statistics import fmean

from harness import forecast
from harness.bench import probes
from harness.forecast import Card, Forecast, corrected
from harness.spec import RunSpec

KEPT = ("ok", "oom_gpu", "unsupported")  # how a probe ended that would end so again
LONG = 3600  # seconds: a bench with more ahead of it is probed first


def forecasts(specs: Iterable[RunSpec], card: Card | None) -> dict[str, Forecast]:
    """By digest; none where torch is not installed."""
    wanted = list(specs)
    if os.environ.get("TUNEOFF_FORECASTS") == "0" or not wanted:  # as most tests want
        return {}
    bf16 = forecast.computes_bf16(wanted[0].hp, card)
    with shown("forecasting") as told:
        try:
            return forecast.foreseen(wanted, bf16, told, card=card)
        except ImportError:
            return {}


def probed(plan, due: set[str], found: dict[str, Forecast], card: Card) -> dict[str, Forecast]:
    """The same forecasts, those of trainings that are `due` corrected by a probe of one of their runs each.
    What a probe found is kept for this card, and not asked again."""
    firsts: dict[str, RunSpec] = {}
    for spec in plan.methods():
        made = found.get(spec.digest)
        asked = spec.digest in due or spec.trial
        if asked and spec.trains and spec.devices == 1 and made and not made.tried:
            firsts.setdefault(forecast.key_of(spec, made.bf16), spec)
    after: dict[str, Forecast] = {}
    twins = {tuning.trial.digest: tuning.identical for tuning in plan.tunings}  # they train alike
    with shown("probing") as told:
        told(0, len(firsts))
        for number, (spec, record) in enumerate(probes(plan, list(firsts.values()), Unseen()), 1):
            for alike in filter(None, (spec, twins.get(spec.digest))):
                if alike.digest not in found:
                    continue
                made = found[alike.digest]
                key = forecast.key_of(alike, made.bf16)
                after[key] = corrected(made, record, card)
                if record.status in KEPT:
                    forecast.keep(key, after[key], card)
            told(number, len(firsts))
    all_known = [spec for spec in (*plan.methods(), *twins.values()) if spec.digest in found]
    own = {spec.digest: forecast.key_of(spec, found[spec.digest].bf16) for spec in all_known}
    return found | {name: after[key] for name, key in own.items() if key in after}


def watts(arms: Sequence, store, card: Card) -> list[float | None]:
    """Of each arm what the card drew in runs of its method on the same model, by the records of such a card;
    none where there are none."""
    drawn: dict[tuple[str, str], list[float]] = {}
    for record in store.records():
        phases = [phase for phase in record.phases.values() if phase.joules and phase.seconds]
        device = record.provenance.device or ""
        if record.ok and phases and forecast.card_named(device).name == card.name:
            mean = sum(p.joules for p in phases) / sum(p.seconds for p in phases)
            drawn.setdefault((record.spec.model, record.spec.method), []).append(mean)
    known = (drawn.get((arm.runs[0].model, arm.runs[0].method)) for arm in arms)
    return [fmean(one) if one else None for one in known]


class Unseen:
    """The progress of a probe is shown to nobody."""

    def event(self, spec: RunSpec, values: dict) -> None:
        pass


@contextmanager
def shown(what: str):
    """A bar on a terminal's standard error, without a thread: copies of this process are made meanwhile.
    -> told(done, of)."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(
        console=console, transient=True, auto_refresh=False, disable=not sys.stderr.isatty()
    ) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of, refresh=True)
