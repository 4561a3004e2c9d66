"""One run, in this process: what it takes to be ok, what of it is scored, counted and charged, and what its
record says of it."""

import json
import math
import re
import threading
import time
from dataclasses import replace
from itertools import count

import pytest
import tiny
import torch
from test_batches import MODELS
from test_cli import BITFIT
from transformers import AutoModelForCausalLM

from harness import machine
from harness.child import chosen_method, diagnose
from harness.data import load_spec
from harness.measuring import meter
from harness.measuring.meter import Card
from harness.method import FOLDER, build, resolve
from harness.metrics import scores
from harness.plan import Request, plan
from harness.plan.methods import beyond
from harness.record import Phase, RunRecord, answers_hash
from harness.report.comparison import comparisons, tokens_per_second
from harness.report.tables import quality
from harness.spec import RunSpec
from harness.store import EVENTS, OUTPUTS, RECORD, append, score
from harness.training import evaluation, execute, stages
from harness.training.head import arithmetic
from harness.training.loop import validation_points
from harness.training.reading import tokens_read
from harness.training.weights import (
    Diverged,
    check,
    fingerprints,
    loaded_types,
    master_weights,
    one_arithmetic,
)
from methods.base import Base
from methods.eva import EVA
from methods.full import Full

WORDS = ["the", "cat", "dog", "red", "house", "mat", "user", "model", "sat", "ran", "on", "to"]
SETTINGS = (
    "data.train=32", "data.validation=4", "data.test=8", "hp.batch_size=8", "hp.micro_batch_size=4",
    "hp.max_steps=2", "hp.max_new_tokens=4", "hp.validations=1", "hp.learning_rate=1e-2", "hp.precision=fp32",
)  # fmt: skip
HARDLY = "hp.learning_rate=1e-7"  # moves some last bits


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model with its tokenizer, rows, and preference pairs, in a folder."""
    folder = tmp_path_factory.mktemp("files")
    tiny.model(tiny.gemma(tie_word_embeddings=False), seed=3).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    asked = [f"{a} {b} {c}" for a in WORDS for b in WORDS[:6] for c in WORDS[:3]]
    rows = [{"prompt": text, "completion": text.split()[0] + " " + text.split()[2]} for text in asked]
    pairs = [{"prompt": text, "chosen": "the cat", "rejected": "house model house"} for text in asked]
    for name, values in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    return folder


@pytest.fixture
def run(files, tmp_path):
    """As the child runs it, to its status: `run(method, *settings, code=a plugin's)` -> record, folder.
    `arm`: of the spec."""
    numbers = count()

    def one(name, *settings, code="", rows="rows", status="ok", before=None, **arm):
        plugin = tmp_path / f"{name}.py"
        if code:
            plugin.write_text(code)
        request = Request(
            [name], model=str(files / "model"), dataset=str(files / f"{rows}.jsonl"), seeds=[0],
            settings=tiny.settings(SETTINGS, settings), plugins=[str(plugin)] if code else [],
        )  # fmt: skip
        (spec,) = [spec for spec in plan(request) if spec.method == name]
        spec.locations["before"] = before and str(before)
        spec = replace(spec, **arm)
        folder, record = tmp_path / f"{next(numbers)} {name}", RunRecord(spec, "failed")
        folder.mkdir()
        try:
            execute(spec, chosen_method(spec, record), record, folder)
            record.status = "ok"
        except Exception as error:
            record.status, record.error = diagnose(error)
        assert record.status == status, record.error
        (folder / RECORD).write_text(record.to_json())
        if record.ok and not record.judged_by_loss:
            score(record, lines(folder / OUTPUTS))
        return record, folder

    with tiny.computing("no"):
        yield one


def spec_of(method: str) -> RunSpec:
    return plan(Request([method], "demo", seeds=[0]))[-1]


def lines(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def entered(folder) -> list[str]:
    """The phases in the order of their beginning."""
    return [event["phase"] for event in lines(folder / EVENTS) if "phase" in event]


# What is not finite


def test_a_model_that_training_broke_has_diverged_and_keeps_its_curve(run):
    """The loss of its only step was that of the untouched model."""
    record, folder = run("full", "hp.max_steps=1", "hp.learning_rate=1e38", status="diverged")
    assert "hp.learning_rate" in record.error
    assert [math.isfinite(step["loss"]) for step in record.training] == [True]
    assert record.scores == {} and not (folder / OUTPUTS).exists()


def test_finite_weights_that_give_no_finite_likelihood_have_diverged(run):
    huge = "lambda *_: [p.data.fill_(3e38) for p in model.parameters() if p.requires_grad]"
    code = f"{BITFIT}\n    def optimizer(self, model, run):\n        made = super().optimizer(model, run)\n"
    code += f"        made.register_step_post_hook({huge})\n        return made\n"
    record, _ = run("huge", "hp.max_steps=1", "hp.validations=0", code=code, status="diverged")
    assert "the loss on the test rows is nan" in record.error


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1000.0])
def test_a_loss_without_a_perplexity_is_no_score(nll):
    """e^1000 is no number, as NaN is none."""
    fine = {"tokens": 1, "nll": 700.0, "correct": 0}
    evaluation.check_finite([fine], tiny.run(method=Full()))
    with pytest.raises(Diverged, match=re.escape(f"is {nll:.3g} nats")):
        evaluation.check_finite([{**fine, "nll": nll}], tiny.run(method=Full()))
    with pytest.raises(ValueError, match="without any training"):
        evaluation.check_finite([{**fine, "nll": nll}], tiny.run(method=Base()))


# What trained nothing


@pytest.mark.parametrize("name", ["reft", "grpo", "orpo", "qlora_orpo"])
def test_what_needs_a_prompt_is_refused_for_plain_text(name):
    chosen = build(resolve(name, FOLDER / f"{name}.py"), {})
    text, asked = load_spec("wikitext", {}), load_spec("mixture", {})
    [reason] = map(str, beyond(chosen, tiny.hyperparams(), text))
    assert f"method {name} cannot do plain text: " in reason and "rows with prompts" in reason
    mixed = {**asked, "parts": [*asked["parts"], *text["parts"]]}
    assert list(map(str, beyond(chosen, tiny.hyperparams(), mixed))) == [reason]
    assert not list(beyond(chosen, tiny.hyperparams(), asked))


@pytest.mark.parametrize("norm", [0, 1])
def test_a_run_without_gradients_is_not_ok(norm, run):
    """Weight decay moves weights without any."""
    nothing = BITFIT + "\n    def loss(self, model, batch, run):\n"
    nothing += "        return super().loss(model, batch, run) * 0\n"
    settings = "hp.max_steps=3", "hp.weight_decay=0.1", f"hp.max_grad_norm={norm}"
    record, _ = run("nothing", *settings, code=nothing, status="failed")
    assert "nothing was trained: the gradient was zero in all 3 steps" in record.error
    assert len(record.training) == 3


def test_a_run_whose_weights_stood_still_is_not_ok(run):
    record, _ = run("lora", "hp.learning_rate=1e-60", "hp.max_grad_norm=0", status="failed")
    assert "nothing was trained: no weight moved in 2 steps" in record.error


def test_a_change_that_is_rounded_away_when_it_is_kept_is_none():
    weight = torch.nn.Parameter(torch.ones(4))
    before = {kept: fingerprints({weight: kept}) for kept in (torch.float32, torch.bfloat16)}
    weight.data += 1e-4
    check(before[torch.float32], fingerprints({weight: torch.float32}), [{"grad_norm": 1.0}])
    with pytest.raises(ValueError, match="no weight moved"):
        check(before[torch.bfloat16], fingerprints({weight: torch.bfloat16}), [{"grad_norm": 1.0}])


# Where a method starts


@pytest.mark.parametrize("method", ["loftq", "dora_loftq", "reft", "peft.vblora"])
def test_a_start_that_no_other_row_has_is_scored_and_a_training_that_hardly_moves_ends_there(method, run):
    still, _ = run(method, HARDLY)
    start = {name: value for name, value in scores(still.start).items() if value is not None}
    assert {name: still.scores[name] for name in start} == pytest.approx(start, rel=1e-3)
    moved, folder = run(method)
    assert moved.start == still.start
    assert moved.scores["perplexity"] != pytest.approx(scores(moved.start)["perplexity"], rel=1e-2)
    phases = entered(folder)
    between = phases[phases.index("attach") : phases.index("train")]
    assert {"evaluate", "generate"} <= {*between}  # apart from the training, and before it
    assert RunRecord.from_json(moved.to_json()).start == moved.start


def test_what_starts_at_a_base_row_is_not_scored_twice(run):
    record, folder = run("qlora")
    assert record.start == {}
    assert "evaluate" not in entered(folder)[: entered(folder).index("train")]


def test_loftqs_start_is_its_own_base_and_not_the_four_bit_model(run):
    found = {name: run(name)[0] for name in ("base", "base_nf4", "qlora", "loftq")}
    (comparison,) = comparisons(list(found.values()))
    techniques = {t.spec.method: t for t in comparison.techniques}
    nf4 = found["base_nf4"].scores["bleu4"]
    assert comparison.own_scores(techniques["qlora"], "bleu4") == [nf4]
    assert comparison.own_scores(techniques["loftq"], "bleu4") == [scores(found["loftq"].start)["bleu4"]]
    assert comparison.own_base(techniques["qlora"]) is techniques["base_nf4"]
    assert comparison.own_base(techniques["loftq"]) is None
    assert comparison.own_scores(techniques["base"], "bleu4") == []
    assert "BLEU-4 (own base)" in quality(comparison).columns


# Time and memory


def test_reading_a_model_is_no_part_of_the_training(run, tmp_path, monkeypatch):
    """LoftQ's second model neither, though it is there as the training begins."""
    load = AutoModelForCausalLM.from_pretrained

    def told(*args, **more):
        append(tmp_path / "0 loftq" / EVENTS, {"phase": "a model is read"})
        return load(*args, **more)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", told)
    _, folder = run("loftq")
    first, *then = entered(folder)[:6]
    assert first == "load" and then == ["a model is read", "attach", "load", "a model is read", "attach"]


def test_time_and_memory_of_attaching_are_the_methods_own(run):
    """And what it took its rejected answers from is known."""
    slow = BITFIT.replace(
        "        model.requires_grad_(False)\n",
        "        import time, torch\n        time.sleep(1)\n        torch.ones(2**27)\n"
        "        model.requires_grad_(False)\n",
    )
    base, before = run("base")
    assert base.hashes["before"] == answers_hash(lines(before / OUTPUTS))
    record, folder = run("slow", "hp.max_steps=1", code=slow, before=before)
    assert record.train_seconds >= 1
    assert record.train_seconds < sum(phase.seconds for phase in record.phases.values())
    grown = record.peak("peak_host") - record.phases["train"].peak_host
    assert record.phases["train"].peak_host is None or grown > 2**28  # of the half GiB that lived in it
    assert record.hashes["before"] == base.hashes["before"]
    judged = {line["id"] for line in lines(folder / OUTPUTS) if "margin" in line}
    assert judged <= {line["id"] for line in lines(before / OUTPUTS)}
    assert record.arithmetic == {
        phase: {"residual stream": "float32", "products": "float32"} for phase in ("training", "scoring")
    }


def test_training_time_and_peak_are_of_attaching_training_and_rollout():
    seconds = {"load": 1, "attach": 2, "train": 4, "rollout": 8, "validate": 16, "evaluate": 32, "save": 64}
    phases = {name: Phase(float(s), peak_allocated=s) for name, s in seconds.items()}
    assert RunRecord(spec_of("grpo"), "ok", phases=phases).train_seconds == 2 + 4 + 8
    for name in seconds:
        phases = {other: Phase(peak_allocated=9 if other == name else 1) for other in seconds}
        peak = RunRecord(spec_of("grpo"), "ok", phases=phases).peak("peak_allocated")
        assert peak == (9 if name in ("attach", "train", "rollout") else 1)


def test_answers_drawn_while_training_are_a_phase_that_is_charged():
    class Slow:
        training = True
        train = staticmethod(lambda mode: None)

    made = tiny.run()
    made.decoder.continuations = lambda *_: (time.sleep(0.2), [[[tiny.EOS]]])[1]
    with made.meter.phase("train"):
        made.sample(Slow(), tiny.rows(1), 4)
    phases = made.meter.phases
    assert phases["train"].seconds < 0.2 <= phases["rollout"].seconds
    assert RunRecord(spec_of("grpo"), "ok", phases=phases).train_seconds >= 0.2


def test_a_run_whose_tensors_could_not_be_counted_says_so(run, monkeypatch):
    counted, _ = run("lora", "hp.max_steps=1")
    assert counted.memory.peak == counted.phases["train"].peak_allocated and not counted.warnings
    monkeypatch.setattr(stages, "rehearsed", lambda *_: None)
    record, _ = run("lora", "hp.max_steps=1")
    assert record.phases["train"].peak_allocated is None
    assert ["peak memory is unknown" in warning for warning in record.warnings] == [True]


def test_a_neighbour_that_leaves_the_card_makes_its_gauge_unknown_and_not_wrong(monkeypatch):
    """Bytes of the card: 9 in use before the run, 4 when the neighbour has gone and the run holds 3."""
    card = Card.__new__(Card)
    card.before = 9
    for used, peak in ((12, 3), (14, 5), (4, None), (11, None)):
        card.highest = None
        monkeypatch.setattr(machine, "card_bytes_used", lambda used=used: used)
        assert card.peak(reserved=3) == peak


def test_what_was_read_before_a_phase_is_not_its_own(monkeypatch):
    """The gauge is asked beside the run: 100 bytes are read while a phase ends, 10 are left in the next."""
    asked, told = threading.Event(), threading.Event()

    def used():
        if threading.current_thread() is threading.main_thread():
            return 0 if not asked.is_set() else 10
        asked.set()
        told.wait(0.2)
        return 100

    monkeypatch.setattr(machine, "card_bytes_used", used)
    monkeypatch.setattr(meter, "SAMPLE_SECONDS", 0.9)
    card = Card(lambda: None)
    assert asked.wait(5)
    card.reset()
    told.set()
    time.sleep(0.3)  # it would be kept by now
    assert card.peak(reserved=0) == 10


# Tokens


def test_the_tokens_of_a_warm_up_are_counted_as_its_seconds_are(run):
    """SMT's warm-up of two steps reads what a training of two steps does."""
    warmed, _ = run("smt", "smt.warmup=2", "smt.share=0.1", "hp.max_steps=3")
    plain, _ = run("lora")
    assert warmed.tokens.attach == plain.tokens.trained
    assert plain.tokens.attach == 0
    warmed.phases = {"attach": Phase(2.0), "train": Phase(3.0)}
    assert tokens_per_second(warmed) == (warmed.tokens.attach + warmed.tokens.trained) / 5


def test_every_pass_of_eva_counts_and_answers_drawn_in_attach_do_not(run):
    made, base = tiny.run(tiny.rows(22, seed=1)), tiny.model()
    with made.meter.phase("attach"), tokens_read(base, made.meter) as counted:
        EVA(rank=4).attach(base, made)
    assert sum(counted) == sum(made.batches.tokens)  # few rows: EVA reads all that the training will

    drawn, _ = run("orpo", "orpo.answer_tokens=5")
    assert drawn.tokens.attach == 0 < drawn.tokens.sampled


# Preference


@pytest.mark.parametrize("rows", ["pairs", "rows"])
def test_a_model_that_learned_the_references_prefers_them(rows, run):
    """To the pair's worse answer; without pairs, to what the untouched model says."""
    base, before = run("base", rows=rows)
    after, folder = run("full", "hp.max_steps=40", "hp.epochs=10", rows=rows, before=before)
    margins = [output["margin"] for output in lines(folder / OUTPUTS) if "margin" in output]
    assert len(margins) == 8 and min(margins) > 1
    assert after.scores["preference_accuracy"] == 1.0
    assert after.scores["perplexity"] < base.scores["perplexity"] / 2


@pytest.mark.fault(48)
def test_answers_of_a_base_that_died_are_no_ones_rejected_answers(tmp_path):
    """Its folder may hold some of them."""
    (tmp_path / OUTPUTS).write_text('{"id": "a", "output": "b", "stopped": true}\n')
    for status, expected in (("failed", 0), ("ok", 1)):
        (tmp_path / RECORD).write_text(RunRecord(spec_of("base"), status).to_json())
        assert len(evaluation.outputs_before(str(tmp_path))) == expected
    assert evaluation.outputs_before(None) == evaluation.outputs_before(str(tmp_path / "nowhere")) == []
    assert answers_hash([]) is None


def test_a_prompt_that_was_learned_and_scored_is_in_the_record(run, monkeypatch):
    found, _ = run("full")
    assert found.data.answered == {"test": 0, "validation": 0}
    assert found.data.rows == {"train": 32, "validation": 4, "test": 8}
    token_rows = stages.token_rows

    def leaking(*asked):
        read = token_rows(*asked)
        read.rows["train"][:3] = read.rows["test"][:3]
        return read

    monkeypatch.setattr(stages, "token_rows", leaking)
    found, _ = run("full")
    assert found.data.answered == {"test": 3, "validation": 0}


# The types that it computes in


def test_what_is_trained_is_held_in_fp32_however_large_it_is():
    with torch.device("meta"):
        model = torch.nn.ModuleDict({
            "embedding": torch.nn.Embedding(262_144, 1152), "frozen": torch.nn.Linear(6912, 1152),
            "norm": torch.nn.LayerNorm(1152),
        }).to(torch.bfloat16)  # fmt: skip
    model["frozen"].requires_grad_(False)
    said = master_weights(model, "bf16")
    assert {p.dtype for p in model["embedding"].parameters()} == {torch.float32}
    assert {p.dtype for p in model["norm"].parameters()} == {torch.float32}
    assert {p.dtype for p in model["frozen"].parameters()} == {torch.bfloat16}
    assert said == "trained parameters in float32, frozen in bfloat16, computed in bf16"


@pytest.mark.parametrize("name", MODELS)
def test_in_bf16_a_model_held_in_fp32_computes_as_the_untouched_one_to_the_bit(name):
    """Before the first step full fine-tuning is the base, with the same residual stream. Gemma multiplies its
    embeddings by a root that bf16 rounds: of 72, as 64 has an exact one."""
    config = tiny.gemma(hidden_size=72) if name == "gemma3" else MODELS[name]()
    with tiny.computing("bf16"):
        model = tiny.model(config)
        for parameter in model.parameters():  # as it is loaded: buffers stay as they are
            parameter.data = parameter.data.to(torch.bfloat16)
        found = []
        for held in (False, True):
            if held:
                types = loaded_types(model)
                master_weights(model, "bf16")
                one_arithmetic(model, types)
            with arithmetic(model) as types:
                found.append(tiny.likelihoods(model, tiny.rows(6)))
            assert types == {"residual stream": "bfloat16", "products": "bfloat16"}
    assert found[0] == found[1]
    assert all(p.dtype == torch.float32 for p in model.parameters())


# What a method leaves


SECRET = "hf_" + "Ab1" * 11


def test_what_a_method_notes_can_always_be_recorded():
    """After hours of training it would cost the whole run."""
    deep, endless = [], []
    for _ in range(40):
        deep = [deep]
    endless.append(endless)
    noted = {"number": torch.tensor(2.5), "tensor": torch.ones(3), "set": {1}, "deep": deep,
             "tuples": ((1, 2),), "endless": endless, "digits": 10**5000, "unknown": math.nan,
             3: {1: torch.float32}, SECRET: [{"a": SECRET}]}  # fmt: skip
    made = tiny.run()
    for what, value in noted.items():
        made.note(what, value)
    record = RunRecord(spec_of("full"), "ok", notes=made.record.notes)
    found = RunRecord.from_json(record.to_json()).notes
    assert (found["number"], found["tuples"], found["unknown"]) == (2.5, [[1, 2]], None)
    assert found["tensor"] == "tensor([1., 1., 1.])" and found["set"] == "{1}"
    assert "torch.float32" in found["3"] and found["hf_[hidden]"] == [{"a": "hf_[hidden]"}]
    assert found["deep"].startswith("[[[") and found["digits"] == "int"


def test_more_validations_than_steps_are_one_at_each():
    assert validation_points(3, 10**12) == {1, 2, 3} and validation_points(3, 0) == set()


# Arms and trials


@pytest.fixture
def answered(monkeypatch):
    """The ids of all examples whose likelihood was taken, and of those that the run could test on."""
    seen, take = set(), evaluation.likelihoods

    def noticing(model, examples, run):
        seen.update(example.id for example in [*examples, *run.splits["test"]])
        return take(model, examples, run)

    monkeypatch.setattr(evaluation, "likelihoods", noticing)
    return seen


def test_a_trial_is_judged_by_its_validation_loss_alone(run, answered):
    whole, folder = run("lora")
    tested = {output["id"] for output in lines(folder / OUTPUTS)}
    assert tested < answered
    answered.clear()
    trial, kept = run("lora", search={})
    assert answered and not answered & tested
    assert {file.name for file in kept.iterdir()} == {EVENTS, RECORD}, "no answers, and no model"
    assert not {"evaluate", "generate", "save"} & set(trial.phases)
    assert trial.training == whole.training and trial.validation == whole.validation
    assert trial.loss_of_trial == trial.validation[-1]["loss"] and trial.validation[-1]["step"] == 2


@pytest.mark.parametrize("name", ["orpo", "grpo"])
def test_a_trial_of_another_objective_is_judged_by_what_it_aims_at(name, run, answered):
    base, before = run("base", search={})
    trial, kept = run(name, f"{name}.answer_tokens=4", search={}, before=before)
    outputs = lines(kept / OUTPUTS)
    assert len(outputs) == trial.data.rows["validation"] == 4 == len(answered)
    assert [o["id"] for o in outputs] == [o["id"] for o in lines(before / OUTPUTS)]
    aim = trial.card["aim"]
    assert trial.loss_of_trial == -trial.scores[aim] and trial.scores[aim] is not None
    assert trial.hashes["before"] == base.hashes["before"] and not (kept / "model").exists()


def test_an_arm_trains_with_its_own_hyperparameters_and_says_why(run):
    arm = {"changes": {"learning_rate": 1e-3, "weight_decay": 0.1}, "reason": "swept"}
    own, _ = run("lora", **arm)
    set_for_all, _ = run("lora", "hp.learning_rate=1e-3", "hp.weight_decay=0.1")
    assert own.training == set_for_all.training
    assert own.overrides == {"learning_rate": (1e-3, "swept"), "weight_decay": (0.1, "swept")}
    assert own.spec.comparison != set_for_all.spec.comparison
    assert RunRecord.from_json(own.to_json()).spec.changes == arm["changes"]
