"""The command lm-eval: tasks of lm-evaluation-harness on the models that runs have left."""

import json
import sys
from dataclasses import replace

from harness.cli.arguments import OK, program
from harness.cli.models import hush, opened, restorable
from harness.errors import BadRequest, Problem, Problems, absent
from harness.keeping import kept_run, kept_runs
from harness.packages import found as installed
from harness.plain import plain
from harness.record import RunRecord
from harness.report import TaskScore, task_scores
from harness.store import LM_EVAL, MODEL, Store, save

REMEDY = 'pip install "lm_eval>=0.4.13"'


def lm_eval(options) -> int:
    """Leaves the scores beside each run. What was asked before, in the same way, is not asked again."""
    from harness import method

    problems, store = Problems(), opened(options, writes=True)
    problems.add("lm-eval", None if installed("lm_eval") else "lm_eval is not installed", REMEDY)
    problems.add("--include-path", absent(options.include_path, "folder") if options.include_path else None)
    runs = [kept_run(store, text) for text in dict.fromkeys(options.runs)] or kept_runs(store)
    if not runs:
        problems.append(Problem(f"no finished run with a saved model in {store.folder}"))
    found = []
    for record in [*untouched(store, runs), *runs]:
        if record.spec.model.startswith("random:"):
            problems.add(record.folder, "its weights were drawn at random: no score says anything")
            continue
        cls, source, _ = restorable(record, options, problems)
        found.append((record, cls, source))
        with problems.caught():
            before(store, record)
    problems.refuse()
    hush()
    from harness.training import Asked, Tasks, ask

    names = tuple(dict.fromkeys(options.tasks))
    tasks = Tasks.found(names, options.include_path)
    files = []
    for record, cls, source in found:
        place = store.folder / record.folder
        asked = Asked(names, options.num_fewshot, options.limit)
        there = {} if options.force else answered(before(store, record), asked, tasks.content)
        for name, scores in there.items():
            tell(record, name, scores, options, "kept")
        asked = replace(asked, tasks=tuple(name for name in names if name not in there))
        spec, folder = replace(record.spec, locations={"model": source}), place / MODEL
        made = method.build(cls, spec.options)
        try:
            for name, new in ask(spec, record, made, folder if spec.trains else None, tasks, asked):
                others = [s for s in before(store, record) if not same(s, name, asked)]
                save(place / LM_EVAL, json.dumps([*others, *new], indent=1, ensure_ascii=False))
                tell(record, name, new, options, "new")
        except (ValueError, method.Unsupported) as error:
            raise BadRequest(Problem(str(error), record.folder)) from error
        files.append(str(place / LM_EVAL))
    print(json.dumps({"files": files}) if options.json else f"{program()} report shows them")
    return OK


def untouched(store: Store, runs: list[RunRecord]) -> list[RunRecord]:
    """The models that the runs are compared with, each once: those evaluated alike share them."""
    records = [record for record in store.load()[0] if record.ok and record.spec.untouched]
    wanted = {(run.spec.evaluation, name) for run in runs for name in ("base", run.card.get("baseline"))}
    return [record for record in records if (record.spec.evaluation, record.spec.method) in wanted]


def before(store: Store, record: RunRecord) -> list[TaskScore]:
    """What was asked of a run so far. Raises BadRequest where that cannot be read."""
    try:
        return task_scores(store, record)
    except (OSError, ValueError) as error:
        where = store.folder / record.folder / LM_EVAL
        raise BadRequest(Problem(f"cannot be read: {error}", str(where), remedy="move it away")) from error


def same(score: TaskScore, name: str, asked) -> bool:
    """Whether it was asked for in the same words."""
    words = (score["asked"], score["num_fewshot"], score["limit"])
    return words == (name, asked.fewshot, asked.limit)


def answered(scores: list[TaskScore], asked, content: dict[str, str]) -> dict[str, list[TaskScore]]:
    """By task, the scores of those that need not be asked again."""
    now = installed("lm_eval")
    current = [s for s in scores if s["lm_eval"] == now and s["content"] == content.get(s["asked"])]
    found = {name: [s for s in current if same(s, name, asked)] for name in asked.tasks}
    return {name: scores for name, scores in found.items() if scores}


def tell(record: RunRecord, name: str, scores: list, options, state: str) -> None:
    for score in scores:
        error = "" if score["stderr"] is None else f" (SE {score['stderr']:.4f})"
        kind = "" if score["filter"] == "none" else f", {score['filter']}"
        said = f"{record.folder}  {score['task']} {score['metric']}{kind} {score['value']:.4f}{error}"
        told = sys.stderr if options.json else sys.stdout
        print(plain(said + f"  {state}" * (state == "kept")), file=told, flush=True)
