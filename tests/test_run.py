"""One run, in this process: what it takes to be ok, and what its record says of it."""

import gc
import json
import math
import re
import time

import pytest
import tiny
import torch
from test_batches import MODELS
from test_cli import BITFIT

from harness import plan
from harness.data import load_spec
from harness.method import FOLDER, build, resolve
from harness.plan.methods import beyond
from harness.record import Phase, RunRecord, answers_hash
from harness.run import (
    check_finite,
    diagnose,
    execute,
    loaded_types,
    master_weights,
    one_arithmetic,
    untouched,
)
from harness.store import OUTPUTS, RECORD
from harness.training.generate import likelihoods
from harness.training.head import arithmetic
from harness.training.loop import Diverged, check, fingerprints, validation_points

SMALL = ["data.train=16", "data.test=4", "data.validation=2", "hp.max_new_tokens=4", "hp.validations=0",
         "hp.precision=fp32"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """As the child runs the demo: `run(method, *settings, code=a plugin's)` -> record, folder."""

    def one(name, *settings, code="", **locations):
        if code:
            (tmp_path / f"{name}.py").write_text(code)
        plugins = [str(tmp_path / f"{name}.py")] if code else []
        asked = tiny.settings(SMALL, settings)
        request = plan.Request([name], "demo", seeds=[0], settings=asked, plugins=plugins)
        spec = next(spec for spec in plan.plan(request) if spec.method == name)
        spec.locations.update(locations)
        folder, record = tmp_path / f"run of {name}", RunRecord(spec, "failed")
        folder.mkdir()
        try:
            execute(spec, record, folder)
            record.status = "ok"
        except Exception as error:
            record.status, record.error = diagnose(error)
        (folder / RECORD).write_text(record.to_json())
        return record, folder

    gc.freeze()  # a run collects garbage at each phase: not all of pytest's
    with tiny.computing("no"):
        yield one
    gc.unfreeze()


# What is not finite


def test_a_model_that_training_broke_has_diverged_and_keeps_its_curve(run):
    """The loss of its only step was that of the untouched model."""
    record, folder = run("full", "hp.max_steps=1", "hp.learning_rate=1e38")
    assert record.status == "diverged" and "hp.learning_rate" in record.error
    assert [math.isfinite(step["loss"]) for step in record.training] == [True]
    assert record.scores == {} and not (folder / OUTPUTS).exists()


def test_finite_weights_that_give_no_finite_likelihood_have_diverged(run):
    huge = "lambda *_: [p.data.fill_(3e38) for p in model.parameters() if p.requires_grad]"
    code = f"{BITFIT}\n    def optimizer(self, model, hp):\n        made = super().optimizer(model, hp)\n"
    code += f"        made.register_step_post_hook({huge})\n        return made\n"
    record, _ = run("huge", "hp.max_steps=1", code=code)
    assert record.status == "diverged" and "the loss on the test rows is nan" in record.error


@pytest.mark.parametrize("nll", [math.nan, math.inf, 1000.0])
def test_a_loss_without_a_perplexity_is_no_score(nll):
    """e^1000 is no number, as NaN is none."""
    spec = plan.plan(plan.Request(["full"], "demo", seeds=[0]))[-1]
    fine = {"tokens": 1, "nll": 700.0, "correct": 0}
    check_finite([fine], spec)
    with pytest.raises(Diverged, match=re.escape(f"is {nll:.3g} nats")):
        check_finite([{**fine, "nll": nll}], spec)
    with pytest.raises(ValueError, match="without any training"):
        check_finite([{**fine, "nll": nll}], plan.plan(plan.Request(["base"], "demo"))[0])


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
    nothing = BITFIT + "\n    def loss(self, model, batch):\n        return super().loss(model, batch) * 0\n"
    settings = "hp.max_steps=3", "hp.weight_decay=0.1", f"hp.max_grad_norm={norm}"
    record, _ = run("nothing", *settings, code=nothing)
    assert record.status == "failed"
    assert "nothing was trained: the gradient was zero in all 3 steps" in record.error
    assert len(record.training) == 3


def test_a_run_whose_weights_stood_still_is_not_ok(run):
    record, _ = run("lora", "hp.max_steps=2", "hp.learning_rate=1e-60", "hp.max_grad_norm=0")
    assert record.status == "failed"
    assert "nothing was trained: no weight moved in 2 steps" in record.error


def test_a_change_that_is_rounded_away_when_it_is_kept_is_none():
    weight = torch.nn.Parameter(torch.ones(4))
    before = {kept: fingerprints({weight: kept}) for kept in (torch.float32, torch.bfloat16)}
    weight.data += 1e-4
    check(before[torch.float32], fingerprints({weight: torch.float32}), [{"grad_norm": 1.0}])
    with pytest.raises(ValueError, match="no weight moved"):
        check(before[torch.bfloat16], fingerprints({weight: torch.bfloat16}), [{"grad_norm": 1.0}])


# What a record says


def test_time_and_memory_of_attaching_are_the_methods_own(run):
    """And what it took its rejected answers from is known."""
    slow = BITFIT.replace(
        "        model.requires_grad_(False)\n",
        "        import time, torch\n        time.sleep(1)\n        torch.ones(2**27)\n"
        "        model.requires_grad_(False)\n",
    )
    base, before = run("base")
    assert base.hashes["before"] == answers_hash(lines(before))
    record, folder = run("slow", "hp.max_steps=1", code=slow, before=str(before))
    assert record.status == "ok", record.error
    assert record.train_seconds >= 1
    assert record.train_seconds < sum(phase.seconds for phase in record.phases.values())
    grown = record.peak("peak_host") - record.phases["train"].peak_host
    assert record.phases["train"].peak_host is None or grown > 2**28  # of the half GiB that lived in it
    assert record.hashes["before"] == base.hashes["before"]
    assert {line["id"] for line in lines(folder) if "margin" in line} <= {row["id"] for row in lines(before)}
    assert record.arithmetic == {
        phase: {"residual stream": "float32", "products": "float32"} for phase in ("training", "scoring")
    }


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / OUTPUTS).read_text().splitlines()]


def test_answers_of_a_base_that_died_are_no_ones_rejected_answers(tmp_path):
    """Its folder may hold some of them."""
    spec = plan.plan(plan.Request(["base"], "demo"))[0]
    (tmp_path / OUTPUTS).write_text('{"id": "a", "output": "b", "stopped": true}\n')
    for status, expected in (("failed", 0), ("ok", 1)):
        (tmp_path / RECORD).write_text(RunRecord(spec, status).to_json())
        assert len(untouched(str(tmp_path))) == expected
    assert untouched(None) == untouched(str(tmp_path / "nowhere")) == []
    assert answers_hash([]) is None


def test_training_time_and_peak_are_of_attaching_training_and_rollout():
    seconds = {"load": 1, "attach": 2, "train": 4, "rollout": 8, "validate": 16, "evaluate": 32, "save": 64}
    spec = plan.plan(plan.Request(["grpo"], "demo", seeds=[0]))[-1]
    phases = {name: Phase(float(s), peak_allocated=s) for name, s in seconds.items()}
    assert RunRecord(spec, "ok", phases=phases).train_seconds == 2 + 4 + 8
    for own in ("attach", "train", "rollout"):
        phases = {name: Phase(peak_allocated=9 if name == own else 1) for name in seconds}
        assert RunRecord(spec, "ok", phases=phases).peak("peak_allocated") == 9
    for other in seconds.keys() - {"attach", "train", "rollout"}:
        phases = {name: Phase(peak_allocated=9 if name == other else 1) for name in seconds}
        assert RunRecord(spec, "ok", phases=phases).peak("peak_allocated") == 1


def test_answers_drawn_while_training_are_a_phase_that_is_charged():
    from harness.measuring.meter import Meter

    class Slow:
        training = True
        train = staticmethod(lambda mode: None)

    meter, hp = Meter(torch.device("cpu")), tiny.hyperparams()
    decoder = tiny.decoder(hp)
    decoder.meter, decoder.continuations = meter, lambda *_: (time.sleep(0.2), [[[tiny.EOS]]])[1]
    with meter.phase("train"):
        decoder.sample(Slow(), tiny.rows(1), 4)
    spec = plan.plan(plan.Request(["grpo"], "demo", seeds=[0]))[-1]
    assert meter.phases["train"].seconds < 0.2 <= meter.phases["rollout"].seconds
    assert RunRecord(spec, "ok", phases=meter.phases).train_seconds >= 0.2


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
    rows, hp = tiny.rows(6), tiny.hyperparams()
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
                found.append(likelihoods(model, rows, tiny.PAD, hp, tiny.accelerator()))
            assert types == {"residual stream": "bfloat16", "products": "bfloat16"}
    assert found[0] == found[1]
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_neighbour_that_leaves_the_card_makes_its_gauge_unknown_and_not_wrong():
    """Bytes of the card: 9 in use before the run, 4 when the neighbour has gone and the run holds 3."""
    from harness.measuring.meter import Card

    card = Card.__new__(Card)
    card.handle, card.before, card.highest = "card", 9, None
    for used, peak in ((12, 3), (14, 5), (4, None), (11, None)):
        card.highest, card.used = None, lambda used=used: used
        assert card.peak(reserved=3) == peak


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
    chosen = resolve("full", FOLDER / "full.py")()
    for what, value in noted.items():
        chosen.note(what, value)
    record = RunRecord(plan.plan(plan.Request(["full"], "demo", seeds=[0]))[-1], "ok", notes=chosen.notes)
    found = RunRecord.from_json(record.to_json()).notes
    assert (found["number"], found["tuples"], found["unknown"]) == (2.5, [[1, 2]], None)
    assert found["tensor"] == "tensor([1., 1., 1.])" and found["set"] == "{1}"
    assert "torch.float32" in found["3"] and found["hf_[hidden]"] == [{"a": "hf_[hidden]"}]
    assert found["deep"].startswith("[[[") and found["digits"] == "int"


def test_more_validations_than_steps_are_one_at_each():
    assert validation_points(3, 10**12) == {1, 2, 3} and validation_points(3, 0) == set()
