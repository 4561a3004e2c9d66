"""Arms: sweeps, and the tuned track from the plan to the records, on curves whose best is known."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from math import log10
from pathlib import Path

import fabricate
import pytest
import tiny

from harness.bench import attempt, places
from harness.bench import loop as bench
from harness.cli import main
from harness.errors import BadRequest
from harness.method import known_methods, resolve
from harness.plan import Request, plan
from harness.record import Phase, RunRecord, Sizes
from harness.report.comparison import comparisons
from harness.spec import Hyperparams, RunSpec
from harness.store import Store
from harness.trial import searched

ROOT = Path(__file__).resolve().parents[1]
BEST = {"full": 3e-5, "lora": 2e-2, "galore": 2e-3}  # the demo's shared rate is 2e-3
SMALL = ("data.train=8", "data.validation=4", "data.test=4")


def asked(*methods, seeds=(0, 1, 2), settings=SMALL, **more) -> Request:
    return Request(list(methods), seeds=list(seeds), settings=list(settings), **more)


def both(*methods, **more) -> Request:
    return asked(*methods, tracks=["identical", "tuned"], **more)


# Specs


def test_earlier_runs_are_the_same_runs():
    for file in (ROOT / "results" / "reference").glob("*/record.json"):
        spec = RunSpec.from_json(json.loads(file.read_text())["spec"])
        assert spec.folder == file.parent.name


def test_all_arms_of_a_method_stand_in_one_comparison_and_none_has_anothers_folder():
    spec = RunSpec("lora", 0, "m", {}, Hyperparams(), {"rank": 8})
    arms = [
        spec,
        replace(spec, changes={"learning_rate": 1e-3}),
        replace(spec, options={"rank": 64}, changes={"learning_rate": 1e-3}),
        replace(spec, changes={"learning_rate": 1e-3}, search={"rank": 8}),
        replace(spec, search={}),
    ]
    assert len({arm.comparison for arm in arms}) == 1
    assert len({arm.folder for arm in arms}) == len(arms)
    assert replace(spec, reason="swept").folder == spec.folder
    assert [RunSpec.from_json(arm.asked()) for arm in arms] == arms
    assert arms[1].own_hp == Hyperparams(learning_rate=1e-3)


# Sweeps


def test_a_sweep_is_every_combination_and_what_is_shared_is_no_change():
    specs = plan(asked("lora", "full", seeds=[0], sweeps=["lora.learning_rate=1e-4,2e-3", "lora.rank=8,16"]))
    arms = [(spec.changes, spec.options["rank"]) for spec in specs if spec.method == "lora"]
    own = {"learning_rate": 1e-4}
    assert arms == [(own, 8), (own, 16), ({}, 8), ({}, 16)]
    assert all(
        spec.reason == "swept: learning_rate 0.0001, 0.002; rank 8, 16" for spec in specs if spec.changes
    )
    alone = plan(asked("lora", "full", seeds=[0]))
    assert [spec for spec in alone if spec not in specs] == [], "rank 16 at the shared rate is the demo's own"
    assert len({spec.comparison for spec in specs if spec.trains}) == 1


def test_texts_and_truth_values_are_swept():
    specs = plan(asked("smt", seeds=[0], sweeps=['smt.targets="q_proj,v_proj","all-linear"']))
    assert [spec.options["targets"] for spec in specs if spec.trains] == ["q_proj,v_proj", "all-linear"]
    specs = plan(asked("reft", seeds=[0], sweeps=["reft.tied=true,false"]))
    assert [spec.options["tied"] for spec in specs if spec.trains] == [True, False]
    specs = plan(asked("smt", seeds=[0], sweeps=["smt.targets=q_proj,all-linear"]))
    assert [spec.options["targets"] for spec in specs if spec.trains] == ["q_proj", "all-linear"]


WRONG = {
    "lora.lerning_rate=1e-3": "did you mean learning_rate?",
    "lora.max_new_tokens=4,8": "--set hp.max_new_tokens",
    "lora.rank=0,8": "lora.rank: must be at least 1",
    "lora.learning_rate=0": "must be above 0",
    "lora.schedule=cosine,square": "must be one of",
    "galore_layerwise.max_grad_norm=0,1": "before the norm over all of them is known",
    "base.learning_rate=1e-3": "not trained",
    "dora.rank=8": "dora",
    "lora.epochs=1e9": "more steps than could ever run",
    "galore_layerwise.micro_batch_size=2": "cannot do accumulation",
    "lora.rank": "METHOD.NAME=VALUE,VALUE",
    "lora": "METHOD.NAME=VALUE,VALUE",
    "lora.rank=": "METHOD.NAME=VALUE,VALUE",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_cannot_be_swept_is_refused_with_the_remedy(text):
    with pytest.raises(BadRequest) as refused:
        plan(asked("lora", "galore_layerwise", "base", sweeps=[text]))
    assert WRONG[text] in str(refused.value)


def test_all_that_is_wrong_with_sweeps_is_told_at_once():
    with pytest.raises(BadRequest) as refused:
        plan(asked("lora", sweeps=["lora.rank=0", "lora.alpa=1", "lora.max_length=4", "lora"]))
    assert len(refused.value.problems) == 4


def test_a_name_that_is_both_an_option_and_a_hyperparameter_is_refused(tmp_path):
    (tmp_path / "both.py").write_text(
        "from dataclasses import dataclass\nfrom harness.method import Method\n\n\n"
        "@dataclass\nclass Both(Method):\n    beta1: float = 0.5\n"
    )
    with pytest.raises(BadRequest, match="both an option and a hyperparameter"):
        plan(asked("both", sweeps=["both.beta1=0.1"], plugins=[str(tmp_path / "both.py")]))


# The tuned track


def trial_record(spec: RunSpec, loss: float | None) -> RunRecord:
    card = {"name": spec.method, "objective": "sft", "aim": "bleu4"}
    if loss is None:
        return RunRecord(spec, "diverged", "the loss was nan at step 3 of 60", card=card)
    phases = {"train": Phase(9.0)}
    return RunRecord(spec, "ok", card=card, phases=phases, validation=[{"step": 60, "loss": loss}])


def curve(spec: RunSpec) -> float | None:
    """What a trial of BEST's valleys gives; what is above the shared rate breaks galore."""
    rate = spec.own_hp.learning_rate
    if spec.method == "galore" and rate > 5e-3:
        return None
    return 1 + log10(rate / BEST[spec.method]) ** 2


def finished(spec: RunSpec) -> RunRecord:
    if spec.trial and spec.trains:
        return trial_record(spec, curve(spec))
    return RunRecord(spec, "ok", card={"name": spec.method})


def simulated(found) -> list[list[RunSpec]]:
    """The stages of a plan."""
    done, stages = {}, []
    while stage := found.upcoming(done):
        stages.append(stage)
        done |= {spec.digest: finished(spec) for spec in stage}
    return stages


def test_every_method_has_as_many_trials_and_then_runs_its_best_beside_the_identical_ones():
    found = plan(both("full", "lora", "galore", trials=9))
    first, *rounds, last = simulated(found)
    assert [spec.method for spec in first] == ["base"]
    assert [[spec.method for spec in stage] for stage in rounds] == [["full", "lora", "galore"]] * 9
    trials = [spec for stage in rounds for spec in stage]
    assert all(spec.trial and spec.seed not in found.seeds for spec in trials)
    assert len({spec.seed for spec in trials}) == 1 and len({spec.digest for spec in trials}) == len(trials)
    assert [spec.seed for spec in last] == sorted(spec.seed for spec in last), "seed by seed"
    assert not any(spec.trial for spec in last)
    rates = {(spec.method, spec.own_hp.learning_rate) for spec in last if spec.changes}
    assert rates == {("full", 2.67e-5), ("lora", 2e-2)}
    runs = Counter(spec.method for spec in last)
    assert runs == {"full": 6, "lora": 6, "galore": 3}, "the best of galore is the identical run: once"
    assert len({spec.comparison for spec in [*trials, *last]}) == 1


def test_the_tuned_track_alone_runs_no_identical_row():
    *_, last = simulated(plan(asked("full", "lora", tracks=["tuned"], trials=6)))
    assert len(last) == 6 and all(spec.changes and "6 trials" in spec.reason for spec in last)


def test_a_search_begins_with_the_options_that_were_asked_for():
    found = plan(both("lora", settings=[*SMALL, "lora.rank=3", "lora.alpha=7"], trials=12))
    *rounds, last = simulated(found)
    ranks = {spec.options["rank"] for stage in rounds for spec in stage if spec.trial}
    assert ranks == {3, 4, 16, 64}
    assert {spec.options["alpha"] for spec in last} == {7.0}
    assert all(spec.search == last[0].options for stage in rounds for spec in stage if spec.trial)


def test_where_every_trial_breaks_the_identical_run_is_left(monkeypatch):
    monkeypatch.setitem(BEST, "galore", 1e9)
    monkeypatch.setattr(f"{__name__}.curve", lambda spec: None)
    *_, last = simulated(plan(both("full", "galore", trials=4)))
    assert [spec.changes for spec in last] == [{}] * 6


def test_preferences_of_trials_are_over_answers_of_an_untouched_trial():
    bases = [spec for spec in plan(both("orpo", "lora")) if not spec.trains]
    assert [(spec.method, spec.trial) for spec in bases] == [("base", False), ("base", True)]
    assert not any(spec.trial for spec in plan(both("lora")))


@pytest.mark.parametrize(
    ("setting", "remedy"), [("data.validation=0", "data.validation"), ("hp.validations=0", "hp.validations")]
)
def test_what_cannot_be_chosen_by_is_refused(setting, remedy):
    with pytest.raises(BadRequest, match=f"--track tuned: .*{remedy}"):
        plan(both("lora", settings=tiny.settings(SMALL, [setting])))
    assert plan(asked("lora", settings=tiny.settings(SMALL, [setting])))


def test_a_method_that_sets_its_own_rate_cannot_be_tuned(tmp_path):
    (tmp_path / "fixed.py").write_text(
        "from harness.method import Method\n\n\nclass Fixed(Method):\n"
        '    overrides = {"learning_rate": (1.0, "it adapts by itself")}\n'
    )
    with pytest.raises(BadRequest, match=r"--track tuned: fixed .* it adapts by itself"):
        plan(both("fixed", plugins=[str(tmp_path / "fixed.py")]))


@pytest.mark.parametrize("seeds", [[0, 1_000_000], [1_000_001, 1_000_000]])
def test_no_trial_has_a_seed_of_the_report(seeds):
    (tuning,) = plan(both("full", seeds=seeds)).tunings
    assert tuning.trial.seed not in seeds


class Silent:
    start = event = end = lambda *_: None


@pytest.fixture
def stubbed(monkeypatch):
    """A bench whose runs are curves. -> those that were run, in a list that also says when to be killed."""

    class Runs(list):
        most = 10**6

    runs = Runs()

    def run(spec, terms, *_):
        if len(runs) == runs.most:
            raise KeyboardInterrupt
        runs.append(spec)
        if spec.trial and spec.trains:
            terms.store.attempt(spec)
            record = trial_record(spec, curve(spec))
            terms.store.keep(spec, record)
            return record
        record = fabricate.record(spec.method, spec.seed)
        record.spec, record.sizes = spec, Sizes(saved_bytes=0)
        return fabricate.keep(terms.store.folder, record)

    monkeypatch.setattr(attempt, "run", run)
    monkeypatch.setattr(places, "Nursery", lambda *_: nullcontext())
    monkeypatch.setattr(places, "slots", lambda *_: [attempt.Slot()])
    return runs


@pytest.mark.parametrize("after", [1, 5, 14, 20])
def test_a_bench_that_was_killed_and_is_started_again_repeats_no_trial(after, stubbed, tmp_path):
    request, stubbed.most = both("full", "galore", trials=8), after
    with pytest.raises(KeyboardInterrupt):
        list(bench.bench(plan(request), Store(tmp_path), "", Silent()))
    stubbed.most = 10**6
    ended = list(bench.bench(plan(request), Store(tmp_path), "", Silent()))
    assert len({spec.folder for spec in stubbed}) == len(stubbed) == len(ended)
    assert {"diverged"} == {done.record.status for done in ended if not done.record.ok}, (
        "nor one that diverged"
    )
    assert sum(done.cached for done in ended) == after
    again = list(bench.bench(plan(request), Store(tmp_path), "", Silent()))
    assert all(done.cached for done in again) and len(again) == len(ended)


def test_more_trials_go_on_from_fewer(stubbed, tmp_path):
    list(bench.bench(plan(both("full", trials=4)), Store(tmp_path), "", Silent()))
    fewer = [spec for spec in stubbed if spec.trial]
    list(bench.bench(plan(both("full", trials=9)), Store(tmp_path), "", Silent()))
    trials = [spec for spec in stubbed if spec.trial]
    assert len(trials) == 9 and trials[:4] == fewer


# What a method declares


@pytest.mark.parametrize("name", [name for name in known_methods() if name != "peft"])
def test_where_the_search_of_a_method_begins_is_its_own_and_can_be_run(name):
    assert list(searched(resolve(name, known_methods()[name]))) == []


WRONG_CARDS = {
    "learning_rates": [1e-4, (1e-4,), (1e-3, 1e-4), (0, 1e-4), ("a", "b"), None],
    "tunes": ["rank", ("rank",), ("rang", (8,)), ("rank", (0,)), ("rank", ("x",)), (8, ("rank",))],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in WRONG_CARDS.items() for v in vs], ids=str)
def test_a_search_that_could_not_begin_is_refused_in_the_plan(name, value):
    lora = resolve("lora", known_methods()["lora"])
    assert searched(type("Wrong", (lora,), {name: value}))


def test_a_plan_counts_the_trials_and_follows_those_that_are_there(stubbed, tmp_path, capsys):
    where = ["--results", str(tmp_path), "--reports", str(tmp_path / "reports")]
    typed = [
        "plan",
        "-v",
        "--track",
        "identical",
        "tuned",
        "--trials",
        "5",
        "--methods",
        "full",
        "galore",
        "--seeds",
        "0",
        "1",
        "--set",
    ]
    request = both("full", "galore", seeds=[0, 1], trials=5)
    told = "tuned: 5 trials for each of 2 methods, then the best of each with seeds 0 1"

    def planned():
        assert main([*typed, *SMALL, *where]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert told in lines
        found = (re.fullmatch(r"  (will run|cached).* (\S+-s\d+-\w{12})", line) for line in lines)
        return [run.groups() for run in found if run]

    assert [state for state, _ in planned()] == ["will run"] * 7, "the base, a trial of each, the identical"
    stubbed.most = 6
    with pytest.raises(KeyboardInterrupt):
        list(bench.bench(plan(request), Store(tmp_path), "", Silent()))
    assert [state for state, _ in planned()] == ["cached"] * 6 + ["will run"] * 5
    stubbed.most = 10**6
    ended = list(bench.bench(plan(request), Store(tmp_path), "", Silent()))
    assert planned() == [("cached", done.record.spec.folder) for done in ended]


def test_the_first_run_again_is_a_run_of_its_own_after_all_others_and_no_seed(stubbed, tmp_path):
    request = asked("full", "galore", seeds=[3, 1], repeat=2)
    ended = [done.record for done in bench.bench(plan(request), Store(tmp_path), "", Silent())]
    names = [(r.spec.method, r.spec.seed, r.spec.repeat) for r in ended]
    assert names == [("base", 0, 0), ("full", 3, 0), ("galore", 3, 0), ("full", 1, 0), ("galore", 1, 0),
                     ("full", 3, 1), ("full", 3, 2)]  # fmt: skip
    assert len({r.spec.folder for r in ended}) == 7
    assert len({r.spec.comparison for r in ended if r.spec.trains}) == 1
    again = [done.cached for done in bench.bench(plan(request), Store(tmp_path), "", Silent())]
    assert all(again)
    [comparison] = comparisons(Store(tmp_path).load()[0])
    counts = {t.spec.method: (len(t.records), len(t.repeats)) for t in comparison.trained}
    assert counts == {"full": (2, 2), "galore": (2, 0)}


def test_the_untouched_model_ends_before_any_other_begins():
    """Side by side with it, the one in 4 bits would find no answers to prefer its references to. Nobody waits
    for that one: a place beside it would be idle."""
    found = plan(Request(["qlora", "lora"], seeds=[0, 1]))
    (base,) = found.upcoming({})
    assert base.method == "base"
    rounded, *trained = found.upcoming({base.digest: None})
    assert rounded.method == "base_nf4" and len(trained) == 4 and all(spec.trains for spec in trained)
    assert found.upcoming(dict.fromkeys((base.digest, rounded.digest))) == trained


def test_a_search_goes_on_beside_the_other_untouched_models(monkeypatch):
    monkeypatch.setitem(BEST, "qlora", 1e-3)
    found, done = plan(both("qlora", "lora", trials=2)), {}
    stages = []
    while stage := found.upcoming(done):
        stages.append([(spec.method, bool(spec.trial)) for spec in stage])
        ended = stage if len(stages) in (1, 4) else [spec for spec in stage if spec.trains]
        done |= {spec.digest: finished(spec) for spec in ended}
    rounded, trials = ("base_nf4", False), [("qlora", True), ("lora", True)]
    assert set(stages[0]) == {("base", False)} and stages[1] == stages[2] == [rounded, *trials]
    assert stages[3][0] == rounded and len(stages) == 4 and not any(trial for _, trial in stages[3])


def test_what_only_a_search_will_find_is_not_run_again():
    with pytest.raises(BadRequest, match=r"--repeat: .*: add --track identical"):
        plan(asked("full", tracks=["tuned"], repeat=1))
