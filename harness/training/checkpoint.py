"""A training that was stopped goes on: what it needs lies in a folder of its run, as safetensors and JSON.

A checkpoint is written to the side and renamed, with a digest of each of its files; the last two are kept.
"""

import json
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from harness.errors import brief
from harness.record import Resumption, RunRecord
from harness.store import EARLIER_EVENTS, MARK, digest_of, save

if TYPE_CHECKING:
    from harness.training.loop import Loop
    from harness.training.run import Run

LAST = 0.2  # of the time between two: so much of a training that is done is worth one before it is evaluated
BEFORE = "before it was stopped, "
KEPT = 2  # should the disk have lied about the last
STATE, TENSORS = "state.json", "tensors.safetensors"
PIECE = 2**22  # values of a tensor looked at together: 32 MiB as 64 bits
NEAR = 1e-3  # relative: of frozen weights that attach computes, as residuals, once more on a GPU
PROGRESS = (  # of a record: what a training has filled
    "hashes", "arithmetic", "memory", "tokens", "training", "validation", "start", "notes", "warnings",
    "resumed",
)  # fmt: skip


class Unfit(Exception):
    """Why a training does not go on from a checkpoint."""


class Checkpoints:
    """Those of one run, in a folder; `every` so many seconds, or, if that is 0, never."""

    def __init__(self, folder: Path, run: "Run", every: float):
        self.folder, self.run, self.every = folder, run, every
        self.last = time.monotonic()
        self.ending: list[int] = []  # signals that ask the training to end
        self.stepping = True  # they wait for the end of a step
        self.writer: threading.Thread | None = None
        self.failed = ""

    def due(self, step: int) -> bool:
        """Whether one is to be written after this step; also after the last, as an evaluation follows."""
        passed, last = time.monotonic() - self.last, step == self.run.steps
        return bool(self.ending) or (bool(self.every) and passed >= self.every * (LAST if last else 1))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within, signals that ask to end wait for the end of a step and its checkpoint; who cannot wait for
        that kills. Raises KeyboardInterrupt at its end where one came too late for the last step."""
        handlers: dict[int, Any] = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
        mine = self.every and threading.current_thread() is threading.main_thread()
        handlers = {number: handler for number, handler in handlers.items() if mine and callable(handler)}

        def ask(number, frame):
            self.ending.append(number)
            if not self.stepping:
                raise KeyboardInterrupt

        for number in handlers:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            if self.writer:
                with self.run.meter.phase("checkpoint"):
                    self.settle()
        if self.ending:
            raise KeyboardInterrupt

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Within, a signal that asks to end does not wait: a validation, which may take minutes, is left out,
        and made when the training goes on."""
        try:
            self.stepping = False
            yield
        except KeyboardInterrupt:
            if not self.ending:
                raise
        finally:
            self.stepping = True

    def write(self, loop: "Loop", steps: dict) -> None:
        """On a GPU what is kept is copied, and written while the training goes on. `steps`: what the loop
        knows of those that are done. Raises KeyboardInterrupt where the training was asked to end."""
        with self.run.meter.phase("checkpoint"):
            self.settle()
            tensors: dict[str, torch.Tensor] = {}
            try:
                self.run.record.disturbed = self.run.meter.contention.reasons([])
                kept = snapshot(loop) | {"steps": steps, "record": self.run.record.to_json()}
                state = {"made by": made_by(self.run), "kept": packed(kept, tensors)}
                self.writer = threading.Thread(target=self.put, args=(f"{loop.done:09}", state, tensors))
                self.writer.start()
            except Exception as error:  # of a method's state, or of memory: it costs the checkpoint alone
                self.failed = f"no checkpoint of step {loop.done}: {error}"
            if self.ending or self.run.device.type != "cuda":  # on a CPU it would slow the next steps
                self.settle()
        self.last = time.monotonic()
        if self.ending:
            raise KeyboardInterrupt

    def put(self, name: str, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        """A full disk costs the checkpoint, never the run."""
        part, target = self.folder / f".{name}.part", self.folder / name
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            save_file(tensors, part / TENSORS)
            save(part / STATE, json.dumps(state))
            save(part / MARK, json.dumps({file: digest_of(part / file) for file in (STATE, TENSORS)}))
            shutil.rmtree(target, ignore_errors=True)
            part.rename(target)
            for earlier in whole(self.folder)[KEPT:]:
                shutil.rmtree(earlier, ignore_errors=True)
        except Exception as error:  # also of safetensors, which has its own
            shutil.rmtree(part, ignore_errors=True)
            self.failed = f"no checkpoint of step {int(name)}: {error}"

    def settle(self) -> None:
        """Waits for what is being written."""
        if self.writer:
            self.writer.join()
        self.writer = None
        self.run.record.warnings += [self.failed] if self.failed else []
        self.failed = ""

    def newest(self, model) -> dict | None:
        """What the newest holds that is whole, this run's and of this model as it is attached; a warning for
        each that is not. What a killed writer has left is removed."""
        for part in self.folder.glob(".*.part"):
            shutil.rmtree(part, ignore_errors=True)
        for path in whole(self.folder):
            try:
                kept = read(path, self.run)
                fits(kept, model)
                return kept | {"path": path}
            except Exception as error:  # whatever stands there, a run begins
                self.run.record.warnings.append(
                    f"the checkpoint of step {path.name.lstrip('0')} is not used: {error}"
                )
        return None


def whole(folder: Path) -> list[Path]:
    """The newest first."""
    return sorted((path for path in folder.glob("[0-9]*") if (path / MARK).is_file()), reverse=True)


def read(path: Path, run: "Run") -> dict:
    """Raises OSError, ValueError or Unfit."""
    for name, expected in json.loads((path / MARK).read_text("utf-8")).items():
        if digest_of(path / name) != expected:
            raise Unfit(f"{name} was changed since it was written")
    state, now = json.loads((path / STATE).read_text("utf-8")), made_by(run)
    then = state["made by"]
    if other := [f"{name} {then.get(name)}, now {now[name]}" for name in now if then.get(name) != now[name]]:
        raise Unfit(f"it was made with {'; '.join(other)}")
    kept: Any = unpacked(state["kept"], load_file(path / TENSORS))
    kept["record"] = RunRecord.from_json(kept["record"])
    kept["lost"] = lost(path.parent / EARLIER_EVENTS, kept["done"])
    return kept


def made_by(run: "Run") -> dict[str, Any]:
    """What must be the same for a training to go on, and for its times to be of one machine."""
    record, here = run.record, run.record.provenance
    return {
        "spec": record.spec.digest, "method's code": record.hashes.get("method_code"), "code": here.code,
        "packages": here.packages, "torch": torch.__version__, "device": here.device or run.device.type,
        "precision": run.accelerator.mixed_precision, "model": here.model_revision,
        "rows": [record.hashes.get(split) for split in ("train", "validation")],
    }  # fmt: skip


def lost(events: Path, done: int) -> float | None:
    """Seconds of the stopped training after its step `done`, or its first after that; null where it told of
    neither."""
    times: dict[int, float] = {}
    try:
        for line in events.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # another event, the half of a line
                event = json.loads(line)
                times[event["step"]] = float(event["seconds"])
        return max(0.0, times[max(times)] - times[done if done in times else done + 1])
    except (OSError, KeyError, ValueError):
        return None


# What a training goes on from


def snapshot(loop: "Loop") -> dict:
    run, numpy = loop.run, cast(tuple, np.random.get_state())
    return {
        "done": loop.done,
        "trained": {name: p.detach() for name, p in trained(loop.model, loop.parameters)},
        "frozen": frozen(loop.model, loop.parameters),
        "optimizer": loop.optimizer.state_dict(),
        "scheduler": loop.scheduler.state_dict(),
        "method": run.method.state(),
        "random": {
            "python": random.getstate(), "numpy": numpy[1:], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if run.device.type == "cuda" else None,
            "method": run.rng.get_state(),
        },
    }  # fmt: skip


def resume(loop: "Loop", kept: dict) -> None:
    """In place, before the first step. What `kept` holds fits the model."""
    run, states = loop.run, kept["random"]
    with torch.no_grad():
        for name, parameter in trained(loop.model, loop.parameters):
            parameter.copy_(kept["trained"][name])
    loop.done = kept["done"]
    loop.optimizer.load_state_dict(kept["optimizer"])
    loop.scheduler.load_state_dict(kept["scheduler"])
    run.method.restore_state(to(kept["method"], run.device), loop.model, run)
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(("MT19937", *states["numpy"]))
    torch.set_rng_state(states["torch"])
    if run.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    run.rng.set_state(states["method"])


def take_record(run: "Run", kept: dict) -> None:
    """What was measured stands; what getting here once more has taken stands apart."""
    record, earlier = run.record, kept["record"]
    spent = sum(phase.seconds for phase in run.meter.phases.values())
    warnings = [warning for warning in record.warnings if warning not in earlier.warnings]
    for name in PROGRESS:
        setattr(record, name, getattr(earlier, name))
    record.warnings += warnings
    if kept["done"] == run.steps:  # no step will tell
        record.kernels = earlier.kernels
    record.resumed.append(Resumption(kept["done"], kept["lost"], spent))
    run.meter.contention.earlier = [
        reason if reason.startswith(BEFORE) else BEFORE + reason for reason in earlier.disturbed or []
    ]
    run.meter.phases |= earlier.phases


def fits(kept: dict, model) -> None:
    """Raises Unfit where attach did not make of the model what it made then."""
    own = [p for p in model.parameters() if p.requires_grad]
    shapes = {name: p.shape for name, p in trained(model, own)}
    if shapes != {name: value.shape for name, value in kept["trained"].items()}:
        raise Unfit("other weights are trained now")
    for name, (value, exact) in frozen(model, own).items():
        then, _ = kept["frozen"].get(name, (None, exact))
        if then is None or abs(value - then) > (0 if exact else NEAR * max(1.0, abs(then))):
            raise Unfit(f"{name}, which is not trained, is another now")


def trained(model, parameters) -> list[tuple[str, torch.nn.Parameter]]:
    own = set(map(id, parameters))
    return [(name, p) for name, p in model.named_parameters() if id(p) in own]


def frozen(model, parameters) -> dict[str, tuple[float, bool]]:
    """Of what is not trained, a sum that tells it from another, and whether that is exact."""
    own, found = set(map(id, parameters)), {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in own:
            exact = not tensor.is_floating_point()
            pieces = tensor.detach().flatten().split(PIECE)
            total = torch.stack([of_bits(p) if exact else p.double().abs().sum() for p in pieces]).sum()
            found[name] = (total.item(), exact)
    return found


def of_bits(piece: torch.Tensor) -> torch.Tensor:
    return (piece.long() * torch.arange(1, len(piece) + 1, device=piece.device)).sum()


# As JSON, with tensors beside it


def packed(value, tensors: dict[str, torch.Tensor], where: str = ""):
    """Of JSON's values and tensors in lists, and dicts whose keys are texts or whole numbers. Raises
    TypeError for anything else, with where it is."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06}"
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name, "stride": value.stride()}
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [packed(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        return {"dict": [[k, packed(item, tensors, f"{where}[{k!r}]")] for k, item in value.items()]}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{where} is {brief(value)}: a state is written without pickle")


def unpacked(value, tensors: dict[str, torch.Tensor]):
    if isinstance(value, list):
        return [unpacked(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        read = tensors[value["tensor"]]
        # In the order that it had in memory: in another one sums are rounded otherwise.
        return torch.empty_strided(read.shape, value["stride"], dtype=read.dtype).copy_(read)
    return {key: unpacked(item, tensors) for key, item in value["dict"]}


def to(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: to(item, device) for key, item in value.items()}
    return [to(item, device) for item in value] if isinstance(value, list) else value
