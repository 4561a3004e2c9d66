"""Tasks of lm-evaluation-harness, asked of the model that a run has kept, or of an untouched one."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from harness.errors import Problem, Problems, unknown
from harness.method import Method
from harness.record import RunRecord
from harness.spec import RunSpec
from harness.training.model import load_base, load_tokenizer, model_source

NONE = "none"  # the filter of a task that has none, as lm_eval calls it
PLACES = ("dataset_path", "dataset_kwargs", "metadata")  # of a configuration: where its rows lie


@dataclass(frozen=True)
class Asked:
    """What is asked of each model. `fewshot`, null: as each task has it; `limit`, null: all of its rows."""

    tasks: tuple[str, ...]
    fewshot: int | None = None
    limit: int | None = None


@dataclass(frozen=True)
class Tasks:
    """Those that are asked for, found before any model is loaded."""

    manager: Any  # lm_eval's TaskManager
    content: dict[str, str]  # of each a hash of what it asks: its configuration and its rows

    @classmethod
    def found(cls, names: tuple[str, ...], include: Path | None = None) -> "Tasks":
        """`include`: a folder of further tasks. Raises BadRequest with all that are unknown or cannot be
        loaded."""
        import datasets

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        manager, problems, content = manager_of(names, include), Problems(), {}
        for name in names:
            if name not in manager.task_index:
                near = unknown("task", name, manager.all_tasks).nearest
                where = "lm-eval ls tasks lists those of lm_eval, --include-path DIR adds your own"
                problems.append(Problem(f"unknown task {name!r}", nearest=near, remedy=where))
                continue
            try:
                content[name] = hashed(manager.load([name])["tasks"])
            except Exception as error:  # a hub that is not there, a task's own code, a package that it needs
                problems.append(Problem(f"cannot be loaded, {type(error).__name__}: {error}", f"task {name}"))
        problems.refuse()
        return cls(manager, content)


def manager_of(names: tuple[str, ...], include: Path | None):
    """Of one's own folder alone where that has them all: to list lm_eval's 14,000 takes ten seconds."""
    from lm_eval.tasks import TaskManager

    if include:
        own = TaskManager(include_path=str(include), include_defaults=False)
        with suppress(Exception):  # such as a group of lm_eval's own
            own.load(list(names))
            return own
    return TaskManager(include_path=str(include) if include else None)


def hashed(tasks: dict) -> str:
    """Equal where the same rows are asked in the same way, wherever they lie."""
    total = hashlib.sha256()
    for name, task in sorted(tasks.items()):
        told = {key: value for key, value in task.dump_config().items() if key not in PLACES}
        for value in ([name, told], *task.eval_docs):
            total.update(json.dumps(value, sort_keys=True, default=str).encode())
    return total.hexdigest()[:12]


def ask(
    spec: RunSpec, record: RunRecord, method: Method, folder: Path | None, tasks: Tasks, asked: Asked
) -> Iterator[tuple[str, list[dict]]]:
    """Loads what the run saved in `folder`, or what an untouched one loads, and asks it each task.

    -> each task's name and its scores, see harness.report.TaskScore, as soon as they are there. Raises
    ValueError where lm_eval ends with an error.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    bf16 = record.provenance.precision == "bf16"
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="bf16" if bf16 else "no")
    source, revision = model_source(spec), record.provenance.model_revision
    same = {"revision": revision} if revision and source == spec.model else {}  # as the run had it of the hub
    load = partial(load_base, spec, torch.bfloat16 if bf16 else torch.float32, accelerator.device, **same)
    model = method.restore(load, folder) if folder else method.load(load)
    lm = HFLM(
        pretrained=model.to(accelerator.device).eval(), tokenizer=load_tokenizer(spec),
        batch_size=spec.hp.eval_batch_size,
    )  # fmt: skip
    for name in asked.tasks:
        try:
            with accelerator.autocast():  # as the run computed
                found = simple_evaluate(
                    lm, tasks=[name], num_fewshot=asked.fewshot, limit=asked.limit,
                    task_manager=tasks.manager, log_samples=False,
                )  # fmt: skip
        except Exception as error:  # of a task's own code, of a card that is too small
            raise ValueError(f"{name}: {type(error).__name__}: {error}") from error
        yield name, scores(found, name, asked, tasks.content[name])


def scores(found: dict, name: str, asked: Asked, content: str) -> list[dict]:
    """Of a group that has a score of its own that one, else those of all its tasks."""
    from lm_eval import __version__ as version

    def measured(task: str) -> list[tuple[str, str, float]]:
        keys = (key.partition(",") for key in found["results"][task])
        named = [(metric, name) for metric, comma, name in keys if comma and "_stderr" not in metric]
        values = [(*key, found["results"][task][",".join(key)]) for key in named]
        return [(*key, float(v)) for *key, v in values if isinstance(v, int | float) and isfinite(v)]

    tasks = [name] if name in found["results"] and measured(name) else list(found["results"])
    return [
        {
            "asked": name, "num_fewshot": asked.fewshot, "limit": asked.limit, "content": content,
            "lm_eval": version, "task": task, "metric": metric, "filter": kind, "value": value,
            "stderr": positive(found["results"][task].get(f"{metric}_stderr,{kind}")),
            "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
            "samples": counted(found, task), "shots": shots(found, task),
            "version": str(found["versions"].get(task, "")),
        }
        for task in tasks for metric, kind, value in measured(task)
    ]  # fmt: skip


def leaves(found: dict, task: str) -> list[str]:
    """The tasks of a group, through groups of groups; a task is its own."""
    inner = [
        leaf for sub in found["group_subtasks"].get(task, []) if sub != task for leaf in leaves(found, sub)
    ]
    return inner or [task]


def counted(found: dict, task: str) -> int:
    rows = found["n-samples"]
    return sum(rows[leaf]["effective"] for leaf in leaves(found, task) if leaf in rows)


def shots(found: dict, task: str) -> int | None:
    """Null where a group's tasks do not agree."""
    kinds = {found["n-shot"].get(leaf) for leaf in leaves(found, task)}
    return kinds.pop() if len(kinds) == 1 else None


def positive(value) -> float | None:
    """lm_eval writes N/A where it has no standard error."""
    return float(value) if isinstance(value, int | float) and isfinite(value) and value >= 0 else None
