"""Forecasts: against what torch itself holds live, and what an H200 held."""

import copy
import json
from dataclasses import asdict, replace
from functools import partial
from math import inf
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, Qwen2Config

from harness import cli, forecast, method, work
from harness.cli import advice, planning
from harness.cli.arms import Arm
from harness.forecast.cards import card_named
from harness.forecast.forecast import BESIDE, LIBRARY_BYTES, Forecast, drawn_out
from harness.measuring import LiveTensors
from harness.record import TIMED, Phase, RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.training import Loop, dry, loaded_types, master_weights, one_arithmetic
from harness.training.devices import Devices
from harness.training.dry import allocator, fused, ledger, programs
from harness.training.dry import run as dry_run
from harness.training.dry import world as dry_world
from harness.training.head import causal_lm
from harness.work import FLOPS, LONG_PRODUCTS, PRODUCTS, Work, seconds_of
from methods.lora import LoRA, dense

CONFIG = tiny.gemma(
    num_hidden_layers=6, layer_types=["full_attention"] * 6, hidden_size=256, intermediate_size=512
)
ROWS = tiny.rows(16, prompt=(20, 40), response=(10, 30))
GIB = 2**30


def made(name: str, options=()):
    return method.build(method.resolve(name, method.find(name, method.known_methods())), dict(options))


def spec(name: str, hp, options=()) -> RunSpec:
    return RunSpec(name, 0, "tiny", {"language": "en", "reward": "rouge_l", "parts": []}, hp, dict(options))


def splits(rows) -> dict:
    return {"train": list(rows), "validation": [], "test": []}


LLAMA = LlamaConfig(
    vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=4, tie_word_embeddings=False, pad_token_id=0,
)  # fmt: skip
QWEN = Qwen2Config(
    vocab_size=300, hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True, pad_token_id=0,
)  # fmt: skip
NEO = GPTNeoConfig(
    vocab_size=300, hidden_size=128, intermediate_size=256, num_layers=2, num_heads=4, window_size=16,
    attention_types=[[["global", "local"], 1]], pad_token_id=0,
)  # fmt: skip


def live(name: str, config, hp, options=(), rows=ROWS):
    """What a second step on the widest rows holds, as torch's own tensors say; the loop as in a run."""
    bf16 = hp.precision == "bf16"
    with tiny.computing("bf16" if bf16 else "no"):
        base, devices = tiny.model(config).to(PRECISIONS[bf16]), Devices(0, hp.devices)
        model, run = tiny.attached(made(name, options), base, rows, hp, devices=devices)
        types = loaded_types(model)
        master_weights(model, hp.precision)
        one_arithmetic(model, types)
        run.decoder.reasons[causal_lm(model)] = None  # that its logits are right was tried before
        loop, widest = Loop(model, run), max(run.batches, key=lambda step: dry.width(step, run))
        with run.devices.silent():
            loop.step(widest)
            with LiveTensors(model, loop.optimizer) as seen:
                loop.step(widest)
    return seen.memory()


def traced(name: str, config, hp, options=()):
    depth = config.get_text_config().num_hidden_layers
    bf16 = hp.precision == "bf16"
    return dry.trace(spec(name, hp, options), made(name, options), config, splits(ROWS), bf16, depth)


def highest(found, *phases: str):
    return max((m for n, m in found.moments.items() if n.split()[0] in phases), key=lambda m: m.allocated)


PRECISIONS = torch.float32, torch.bfloat16


@pytest.fixture
def exact(monkeypatch):
    """A tiny model's tensors are smaller than the allocator's grain."""
    monkeypatch.setattr(allocator, "ROUND", 1)


@pytest.mark.parametrize(
    "name, options, config, changes",
    [
        ("full", {}, CONFIG, {}),
        ("full", {}, LLAMA, {"micro_batch_size": 3}),  # gradients beside activations
        ("lora", {}, LLAMA, {"packing": True, "max_length": 128}),
        ("galore", {"rank": 8}, CONFIG, {}),
        ("reft", {"rank": 4}, CONFIG, {}),
        ("lisa", {}, CONFIG, {}),
        ("grpo", {"group": 2, "answer_tokens": 4}, LLAMA, {"micro_batch_size": 4}),
        ("smt", {}, LLAMA, {}),
        ("full", {}, LLAMA, {"gradient_checkpointing": True}),
        ("peft.adalora", {}, LLAMA, {}),
        ("dora", {}, QWEN, {"precision": "bf16"}),
        ("galore_layerwise", {"rank": 8}, QWEN, {"precision": "bf16", "max_grad_norm": 0.0}),
        ("lora", {}, NEO, {}),
        ("lora", {}, CONFIG, {"devices": 2}),
    ],
)
def test_a_dry_run_holds_what_a_real_training_holds(name, options, config, changes, exact):
    """Each part at the highest moment: none can be forgotten, nor another make up for it."""
    hp = tiny.hyperparams(kernels="eager", **changes)
    found = highest(traced(name, config, hp, options), "train", "rollout")
    true, parts = live(name, config, hp, options), found.parts
    assert found.allocated == pytest.approx(true.peak, rel=0.02)
    waiting = parts["gradients"] - true.gradients  # for another of the same weight: for torch no gradient yet
    several = name in ("peft.adalora", "galore_layerwise")
    assert waiting == pytest.approx(0.0, abs=0.02 * true.gradients + (0.12 if several else 0.005) * true.peak)
    assert parts["optimizer"] == pytest.approx(true.moments, rel=0.02, abs=4096)
    # What an optimizer keeps beside its state, as AdaLoRA its means, was there before the second step.
    there = parts["weights"] + parts["adapters"] + parts["workspace"]
    assert there == pytest.approx(true.weights, abs=0.03 * true.peak)
    held = parts["activations"] + parts["head"] + waiting
    assert held == pytest.approx(true.activations, abs=0.03 * true.peak)


def test_answers_of_the_model_itself_hold_what_they_hold_in_a_run(exact):
    """ORPO's own rejected answers, before its training: keys and values of all texts, and reading them."""
    hp, options = tiny.hyperparams(kernels="eager"), {"answer_tokens": 40}
    found = traced("orpo", LLAMA, hp, options)
    model, run = tiny.model(LLAMA), tiny.run(ROWS, hp, method=made("orpo", options))
    run.decoder.reasons[model] = None
    optimizer = torch.optim.SGD(model.parameters())
    with LiveTensors(model, optimizer) as seen:
        run.sample(model, ROWS, 40)
    assert highest(found, "rollout").allocated == pytest.approx(seen.memory().peak, rel=0.02)
    assert found.facts["rollout_tokens"] == 40 and found.facts["micro_tokens"] >= 2 * sum(run.batches.tokens)


def test_answers_of_a_start_of_its_own_take_as_long_again():
    """A method that does not begin at the untouched model is evaluated before its training, too."""

    class Moved(LoRA):
        starts_at_base = False

    def seconds(built):
        hp, rows = tiny.hyperparams(kernels="eager", max_new_tokens=7), splits(ROWS) | {"validation": ROWS}
        found = dry.trace(spec("lora", hp), built, LLAMA, rows, False, 3)
        work = {name: asdict(done) for name, done in found.work.items()}
        return Forecast(work=work, facts=found.facts).seconds(forecast.CARDS["H200"])

    once, twice = seconds(LoRA()), seconds(Moved())
    assert once["generate"] > 0 and twice["generate"] == pytest.approx(2 * once["generate"])
    assert once["evaluate"] > 0 and twice["evaluate"] < 2 * once["evaluate"]  # validations are of the same


def test_a_second_model_beside_the_first_is_counted_whole():
    """LoftQ's start has the model in 16 bits beside that in 4, though it reads a part of it at a time."""

    class Beside(LoRA):
        def attach(self, model, run):
            original = run.load_base()
            model = super().attach(model, run)
            return model if original is not None else None

    hp = tiny.hyperparams(kernels="eager")
    own, both = (
        dry.trace(spec("lora", hp), built, LLAMA, splits(ROWS), False, 3).moments["attach"].allocated
        for built in (LoRA(), Beside())
    )
    weights = 4 * sum(p.numel() for p in tiny.model(LLAMA).parameters())
    assert both - own == pytest.approx(weights, rel=0.05)


def test_a_rollout_is_counted_as_often_as_it_is_made(monkeypatch):
    """Two steps are traced, each with a rollout; the training makes three."""

    def decoded(model, run, *_):
        run.ledger.work["rollout token"] += Work(launches=1)
        return 1, 5

    monkeypatch.setattr(dry_run, "decoded", decoded)
    hp = tiny.hyperparams(kernels="eager", max_steps=3)
    found = traced("grpo", LLAMA, hp, {"group": 2, "answer_tokens": 4})
    assert found.work["rollout token"].launches == 1 and found.facts["rollout_tokens"] == 3 * 5


def test_what_a_probe_has_not_seen_holds_the_workspaces_of_its_steps():
    """Compiled and captured by the forecast, plain on the card: two of cuBLAS's in place of four."""
    there = {"allocated": 10**9, "reserved": 10**9, "parts": {"workspace": 0}}
    made = Forecast("compiled + graph", moments={"evaluate": there, "train": there})
    record = RunRecord(spec("lora", tiny.hyperparams()), "ok", step_seconds=[1.0] * 9)
    record.phases, record.kernels.rung = {"train": Phase(1.0, 5, 5)}, "eager"
    record.hashes["batches"] = []
    less = 10**9 - 2 * LIBRARY_BYTES
    assert forecast.corrected(made, record, forecast.CARDS["H200"]).moments["evaluate"]["allocated"] == less


@pytest.fixture
def small(monkeypatch):
    """All products of a tiny model wait for memory. Nothing but their FLOP counts."""
    for name, value in {
        "INTENSITY": 0, "LONG_INTENSITY": 0, "SEARCHED": 0, "MASKED": (1, 1), "FLASH": (1, 1)
    }.items():  # fmt: skip
        monkeypatch.setattr(work, name, value)


def test_what_a_start_repeats_is_counted_as_often(small):
    """SMT's warm-up: two of its steps are computed, as many as it asks for take their time."""
    hp = tiny.hyperparams(kernels="eager", max_steps=12)
    few, many = (traced("smt", LLAMA, hp, {"warmup": steps}).work["attach"] for steps in (3, 12))
    assert few.long_products and many.long_products == pytest.approx(4 * few.long_products, rel=0.1)


@pytest.mark.parametrize(
    "name, options, steps",
    [
        ("galore", {"rank": 8, "gap": 2}, 12), ("galore_layerwise", {"rank": 8, "gap": 2}, 12),
        ("full", {}, 5), ("lora", {}, 5),
    ],
)  # fmt: skip
def test_a_whole_training_computes_what_was_forecast(name, options, steps, small):
    """Products of every step, by torch's own counter: a method's subspaces are found more than once."""
    hp = tiny.hyperparams(kernels="eager", max_steps=steps, validations=0)
    found, built = traced(name, CONFIG, hp, options), made(name, options)
    model, run = tiny.attached(built, built.load(lambda **more: tiny.model(CONFIG)), ROWS, hp)
    loop, run.decoder.reasons[causal_lm(model)] = Loop(model, run), None
    with FlopCounterMode(display=False) as counter:
        for step in run.batches:
            loop.step(step)
    work = {name: asdict(done) for name, done in found.work.items()}
    seconds = Forecast(work=work, facts=found.facts).seconds(SLOW)
    told = seconds["train"] + seconds["first step"] + seconds["renewals"]
    assert told == pytest.approx(counter.get_total_flops(), rel=0.03)


# A second for each product: how many there are. Nothing else takes any time.
SLOW = forecast.Card("slow", 0, 1 / PRODUCTS, 1 / LONG_PRODUCTS, inf, 0)


@pytest.mark.parametrize("name, options", [("lisa", {"layers": 1}), ("galore_layerwise", {"gap": 20})])
def test_what_is_drawn_anew_is_captured_anew(name, options):
    """24 times in 500 steps, each time the graphs of all shapes."""
    hp = tiny.hyperparams(**COMPILED, max_steps=500)
    found = traced(name, LLAMA, hp, options)
    work = {name: asdict(done) for name, done in found.work.items()}
    told = Forecast("compiled + graph", work=work, facts=found.facts).seconds(forecast.CARDS["H200"])
    one = seconds_of(found.work["micro-batch"], forecast.CARDS["H200"])
    assert told["renewals"] >= 24 * 2 * one > 0
    assert "captured_again" not in traced("full", LLAMA, hp).facts


def test_updates_within_backward_are_replayed_with_it_but_the_first_ones(monkeypatch):
    """And no more than some weights of a step have gradients at a time."""
    captured, own = [], ledger.Ledger.captured

    def counted(self, largest):
        captured.append(largest)
        return own(self, largest)

    monkeypatch.setattr(ledger.Ledger, "captured", counted)
    found = traced("galore_layerwise", LLAMA, tiny.hyperparams(**COMPILED, max_steps=500))
    assert found.rung == "compiled + graph" and captured == [True]
    held = max(m.parts["gradients"] for n, m in found.moments.items() if n.startswith("train"))
    assert held < found.saved_bytes / 3


def test_two_depths_tell_the_third(exact, monkeypatch):
    from harness.forecast import forecast as own

    hp, built = tiny.hyperparams(kernels="eager"), made("lora")
    monkeypatch.setattr(own, "SHALLOW", 2)
    monkeypatch.setattr(own, "DEPTHS", (2, 4))
    told = drawn_out(spec("lora", hp), built, CONFIG, splits(ROWS), True, False)
    whole = dry.trace(spec("lora", hp), built, CONFIG, splits(ROWS), False, 6)
    true = max(m.allocated for name, m in whole.moments.items() if name.startswith("train"))
    assert told.highest["allocated"] - own.libraries("train", "eager") == pytest.approx(true, rel=0.01)


def test_a_compiled_layer_keeps_what_an_h200_kept(monkeypatch):
    """LoRA of rank 8 on all linear layers of Gemma 3 1B, 8 x 512 tokens, all learned, compiled and captured,
    what is cheap computed again in backward: 7.25 GiB at the highest moment (torch 2.11)."""
    cheap = ("used_far_apart", "long_fusible_chains", "materialized_backward")
    monkeypatch.setattr(programs, "GRADED", {f"ban_recompute_{what}": False for what in cheap})
    monkeypatch.setattr(programs.Programs, "known", {})
    hp = Hyperparams(batch_size=8, micro_batch_size=8, max_steps=4, kernels="compiled", validations=0)
    [row] = tiny.rows(1, prompt=(0, 0), response=(511, 511))
    asked = RunSpec("lora", 0, "g", {"language": "en", "reward": "rouge_l", "parts": []}, hp)
    config = copy.deepcopy(tiny.GEMMA_3_1B)
    found = drawn_out(asked, made("lora"), config, splits([row] * 32), True, True)
    assert found.rung == "compiled + graph"
    assert found.peak / GIB == pytest.approx(7.25, rel=0.05)


def test_what_is_drawn_lies_on_the_card_before_it_is_quantised():
    """In 16 bits, with a head that is not tied yet; what is read from files comes matrix by matrix."""
    hp, rows = tiny.hyperparams(precision="bf16"), splits(ROWS)
    for config, untied in ((LLAMA, 0), (QWEN, 1)):
        model = AutoModelForCausalLM.from_config(config)
        weights = sum(p.numel() for p in model.parameters()) + untied * model.lm_head.weight.numel()
        own, read = (
            dry.trace(replace(spec("qlora", hp), model=name), made("qlora"), config, rows, True, 3)
            for name in ("random:tiny", "tiny")
        )
        assert own.moments["load"].allocated == pytest.approx(2 * weights, rel=0.01)
        assert read.moments["load"].allocated < 0.7 * own.moments["load"].allocated
        assert own.moments["train"] == read.moments["train"]


def test_a_compiled_layer_makes_once_what_inductor_makes_once():
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    def made(x):
        return [x.view(-1, 4).cos(), torch.ops.aten.alias(x).cos(), x.view(8, 4).view(-1, 4).cos(), x.T.cos()]

    def left(graph):
        return [(str(n.target), tuple(map(str, n.args))) for n in graph.nodes if n.op == "call_function"]

    ours, theirs = (make_fx(made, tracing_mode="fake")(torch.ones(8, 4)) for _ in range(2))
    programs.without_copies(ours.graph)
    assert left(ours.graph) == left(joint_graph_passes(theirs).graph)
    assert [args for _, args in left(ours.graph)] == [("x_1",)] * 3 + [("x_1", "[1, 0]"), ("permute",)]


def test_dora_on_4_bits_keeps_no_dequantised_weights(monkeypatch):
    """Compiled, its layers hold for their backward no more than those on 16 bits."""

    def held(name: str) -> float:
        monkeypatch.setattr(programs.Programs, "known", {})
        moments = traced(name, LLAMA, tiny.hyperparams(**COMPILED)).moments
        return max(moments[m].parts["activations"] for m in moments if m.startswith("train"))

    own = held("dora_loftq")
    assert own <= held("dora")
    monkeypatch.setattr("methods.dora.product_with", lambda layer, a: dense(layer).to(a.dtype) @ a.T)
    weights = 2 * 3 * (4 * 128 * 128 + 3 * 128 * 256)  # as an H200 kept them when these were multiplied so
    assert held("dora_loftq") - own == pytest.approx(weights, rel=0.15)


COMPILED = {"kernels": "compiled", "precision": "bf16", "batch_size": 4, "micro_batch_size": 4}


def test_programs_of_one_method_serve_another_only_where_layers_are_the_same(monkeypatch):
    """What hooks change is no layer of the method without them, whichever comes first."""
    hp, names = tiny.hyperparams(**COMPILED), ("lora", "lora_ggpo", "rslora", "dora")
    apart = {}
    for name in names:
        monkeypatch.setattr(programs.Programs, "known", {})
        apart[name] = traced(name, LLAMA, hp).moments
        assert len(programs.Programs.known) > 0
    for order in (names, names[::-1]):
        monkeypatch.setattr(programs.Programs, "known", {})
        assert {name: traced(name, LLAMA, hp).moments for name in order} == apart


def test_what_a_graph_holds_is_given_to_nothing_else():
    """What a captured step has freed is no room for what lies outside of the graph, while that is there."""
    own, size = ledger.Ledger(), 2**25
    made = partial(torch.empty, size, dtype=torch.uint8, device="meta")
    with own:
        with own.captured(True):
            made()
        made()
        assert own.reserved == 2 * size
        with own.captured(True):  # a replay
            made()
        own.empty_cache()
        assert own.reserved == size
        own.replayed = False
        own.empty_cache()
    assert own.reserved == 0


def test_what_an_emptied_cache_gave_back_is_no_part_of_what_follows():
    own, size = ledger.Ledger(), 2**25
    with own:
        with own.entered("attach"):
            torch.empty(size, dtype=torch.uint8, device="meta")
            own.empty_cache()
        with own.entered("train"):
            torch.empty(size // 2, dtype=torch.uint8, device="meta")
    assert [own.moments()[name].reserved for name in ("attach", "train")] == [size, size // 2]


def test_a_step_is_tried_beside_the_graph_of_the_largest():
    """Of half its size: so much more, for that moment alone. Without that room no plan says that it fits."""
    own, size = ledger.Ledger(), 2**25
    made = partial(torch.empty, dtype=torch.uint8, device="meta")
    with own, own.entered("train"):
        with own.captured(True):
            made(size)
        own.beside_graphs(0.5)
        own.mark("optimizer")
        kept = made(size)
    found = own.moments()
    told = [found[name].reserved for name in (BESIDE, "train", "train optimizer")]
    assert told == [1.5 * size, size, 2 * size] and kept.numel() == size
    moments = {name: {"allocated": 4 * GIB, "reserved": 4 * GIB, "parts": {}} for name in ("train", BESIDE)}
    card, said = forecast.CARDS["H200"], Forecast(moments=moments)
    enough, device = card.of(said.needs(card)), said.device(card)
    assert said.verdict(enough) == "fits"
    moments[BESIDE] |= {"reserved": 6 * GIB}
    assert said.verdict(enough) == "tight" and said.device(card) == device
    parts = {"parts": {"activations": 3 * GIB}}
    found = replace(said, moments={"train": moments["train"] | parts, BESIDE: moments[BESIDE]}).scaled(0.5)
    assert found.moments[BESIDE]["reserved"] == 2.5 * GIB + 0.5 * 2 * GIB  # half as large, too


def test_of_uneven_rows_the_second_shape_is_tried_beside_the_graph_of_the_first(monkeypatch):
    told, own = [], dry_run.DryKernels.close

    def close(self):
        sizes = sorted(size.tokens * size.sequences for size in self.shapes.sizes)
        told.append((sizes, self.run.ledger.graphs.reserved))
        own(self)

    monkeypatch.setattr(dry_run.DryKernels, "close", close)
    hp = tiny.hyperparams(kernels="auto", precision="bf16", batch_size=4, micro_batch_size=1)
    for rows in (ROWS, [replace(ROWS[0], id=f"r:{n}") for n in range(16)]):
        traced = dry.trace(spec("lora", hp), made("lora"), LLAMA, splits(rows), True, 3)
        found = traced.moments
        trained = max(moment.reserved for name, moment in found.items() if name.startswith("train"))
        (sizes, graph), more = told.pop(), found[BESIDE].reserved - trained
        held = max(m.parts.get("activations", 0) for n, m in found.items() if n.startswith("train"))
        assert graph >= held > 0 and (len(sizes) > 1 or rows is not ROWS)  # of the widest, no other's
        assert traced.facts["shapes"] == len(sizes)
        assert more == (int(graph * sizes[-2] / sizes[-1]) if len(sizes) > 1 else 0)


@pytest.mark.parametrize("uneven", [False, True])
def test_rows_without_padding_need_no_mask(uneven, monkeypatch):
    """What a card is asked for: a mask keeps flash attention away, and repeats keys."""
    masked = []
    name = "aten._scaled_dot_product_efficient_attention"
    own = FLOPS[name]
    monkeypatch.setitem(FLOPS, name, lambda *args, **more: masked.append(args) or own(*args, **more))
    hp = tiny.hyperparams(kernels="eager", precision="bf16", batch_size=4, micro_batch_size=4)
    rows = ROWS if uneven else tiny.rows(16, prompt=(20, 20), response=(10, 10))
    found = dry.trace(spec("lora", hp), made("lora"), LLAMA, splits(rows), True, 3)
    assert bool(masked) is uneven and found.work["micro-batch"].launches


def test_the_allocator_asks_for_segments_as_torch_does():
    mib, own = 2**20, allocator.Allocator()
    small = [own.take(1) for _ in range(3)]
    assert own.reserved == 2 * mib and {block.size for block in small} == {512}
    large = own.take(3 * mib)
    assert own.reserved == 22 * mib  # of 20 MiB, what is left of it is taken next
    again = own.take(16 * mib)
    assert own.reserved == 22 * mib
    huge = own.take(30 * mib + 1)
    assert own.reserved == 54 * mib  # to the next 2 MiB
    for block in (large, again, huge, *small):
        own.free(block)
    assert own.reserved == 54 * mib
    own.take(20 * mib)  # of what was put together again
    assert own.reserved == 54 * mib
    own.empty_cache()
    assert own.reserved == 20 * mib


def test_cards_are_told_by_the_names_of_their_driver():
    assert card_named("NVIDIA H200").short == 989e12
    assert card_named("NVIDIA A100-SXM4-80GB").name == "A100-80GB"
    assert not card_named("Tesla T4").bf16
    assert card_named("NVIDIA L40S").name != "L4"
    unknown = card_named("Fantasia 1", 10 * GIB)
    assert not unknown.known and unknown.bytes == 10 * GIB


def test_a_verdict_leaves_room_on_both_sides():
    moments = {"train backward": {"allocated": 10 * GIB, "reserved": 11 * GIB, "parts": {}}}
    made, card = Forecast(moments=moments), forecast.CARDS["H200"]
    verdicts = [made.verdict(card.of(size * GIB)) for size in (24, 11.5, 9)]
    assert verdicts == ["fits", "tight", "too large"]


def test_what_was_measured_makes_what_was_not_no_surer():
    """A training that a probe has measured, and an evaluation beside it that reserves more."""
    train = {"allocated": 10 * GIB, "reserved": 10 * GIB, "parts": {}, "measured": True}
    moments = {"train": train, "evaluate": {"allocated": 9 * GIB, "reserved": 11 * GIB, "parts": {}}}
    made, card = Forecast(moments=moments, tried="ok"), forecast.CARDS["H200"]
    most = made.device(card)
    assert made.verdict(card.of(most + 0.02 * most)) == "tight"
    assert made.verdict(card.of(most + 0.06 * most)) == "fits"


@pytest.fixture
def line(monkeypatch):
    """Forecasts by a formula: so much, and so much more for each row of a micro-batch. -> specs that were
    asked for."""
    asked = []

    def foreseen(specs, *_):
        found = {}
        for one in specs:
            asked.append(one.own_hp)
            found[one.digest] = straight(one.own_hp)
        return found

    monkeypatch.setattr(forecast, "foreseen", foreseen)
    return asked


def straight(hp, cannot=(), curve=1.0) -> Forecast:
    """A curve below 1 is no straight line: small micro-batches hold more than their share."""
    rows = GIB / 2 * hp.micro_batch_size**curve * (0.25 if hp.gradient_checkpointing else 1.0)
    rows *= hp.max_length / 512
    parts = {"weights": 4 * GIB, "activations": rows}
    size = 4 * GIB + rows
    last = {"allocated": 4 * GIB, "reserved": size, "parts": {"weights": 4 * GIB}}
    moments = {"train": {"allocated": size, "reserved": size, "parts": parts}, "train optimizer": last}
    return Forecast(moments=moments, facts={"cannot": list(cannot)})


def arm_of(name: str, **changes) -> Arm:
    hp = Hyperparams(**{"batch_size": 16, "micro_batch_size": 16} | changes)
    return Arm(name, [spec(name, hp)], ["will run"], straight(hp))


def test_the_largest_micro_batch_is_forecast_itself_and_found_in_few(line):
    card, arms = forecast.CARDS["H200"], [arm_of("lora"), arm_of("base", micro_batch_size=1)]
    for size in (5.8, 8, 12, 20, 40, 200):
        line.clear()
        found = advice.largest(arms, card.of(size * GIB))
        true = [
            n for n in advice.POWERS if straight(Hyperparams(micro_batch_size=n)).needs(card) <= size * GIB
        ]
        assert found["lora"] == found["base"] == max(true, default=0)
        tried = [hp.micro_batch_size for hp in line]
        assert len(tried) <= 2 * len(arms)
        assert all(hp.batch_size == max(16, hp.micro_batch_size) for hp in line)


def test_where_no_straight_line_is_right_the_answer_still_is_one_that_fits(line, monkeypatch):
    own = straight
    monkeypatch.setitem(globals(), "straight", lambda hp: own(hp, curve=0.7))
    card = forecast.CARDS["H200"]
    for size in (5.9, 6.5, 8, 10):
        found = advice.largest([arm_of("lora")], card.of(size * GIB))["lora"]
        true = [
            n for n in advice.POWERS if straight(Hyperparams(micro_batch_size=n)).needs(card) <= size * GIB
        ]
        assert found == max(true, default=0)


def test_the_knob_that_changes_least_is_one_whose_forecast_fits(line):
    card, arm = forecast.CARDS["H200"], arm_of("lora")

    def said(size: float, arm: Arm = arm) -> str:
        [text] = advice.remedies([arm], card.of(size * GIB), advice.largest([arm], card.of(size * GIB)))
        return text

    assert "fits with --set hp.micro_batch_size=4 (the same steps)" in said(8)
    assert "hp.gradient_checkpointing=true hp.micro_batch_size=1" in said(5.3)
    line.clear()
    assert "a larger card would" in said(4.5)  # weights alone are too large: no knob of the rows is tried
    assert not any(hp.gradient_checkpointing or hp.max_length < 512 for hp in line)
    whole = arm_of("lora")
    whole.forecast.facts["cannot"] = ["accumulation", "gradient checkpointing"]
    assert "hp.micro_batch_size=4 hp.batch_size=4 (smaller steps)" in said(8, whole)
    whole.forecast.facts["cannot"] = ["accumulation"]
    checkpointed = "hp.gradient_checkpointing=true hp.micro_batch_size=1 hp.batch_size=1 (smaller steps)"
    assert checkpointed in said(5.3, whole)
    assert "hp.micro_batch_size=4" in said(8)
    swept = arm_of("lora")
    swept.runs = [
        replace(swept.runs[0], changes={"micro_batch_size": 16})
    ]  # by --sweep: a knob reaches it, too
    assert "hp.micro_batch_size=4" in said(8, swept)


def test_a_plan_says_what_cannot_fit_and_ends_with_3(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("TUNEOFF_FORECASTS")
    monkeypatch.setenv("TUNEOFF_CACHE", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "80")
    asked = ["plan", "--methods", "lora", "--seeds", "0", "--results", str(tmp_path / "r")]
    assert cli.main([*asked, "--memory", "24GB"]) == 0
    told = capsys.readouterr().out
    assert "fits" in told and "too large" not in told and max(map(len, told.splitlines())) <= 80
    monkeypatch.setattr("harness.forecast.forecast.traced", lambda *_: pytest.fail("it was known"))
    assert cli.main([*asked, "--memory", "0.5GB", "--json"]) == 3
    runs = json.loads(capsys.readouterr().out)
    assert {run["forecast"]["verdict"] for run in runs} == {"too large"}


def test_a_method_in_fewer_bits_is_the_same_but_for_its_base_or_its_optimizer():
    found = {name: [one.method for _, one in advice.lighter(spec(name, Hyperparams()))]
             for name in ("full", "lora", "orpo", "galore", "rslora", "reft", "gone")}  # fmt: skip
    assert found == {"full": ["full_8bit"], "lora": ["qlora"], "orpo": ["qlora_orpo"],
                     "galore": ["galore_layerwise"], "rslora": [], "reft": [], "gone": []}  # fmt: skip
    cut = Hyperparams(batch_size=8, micro_batch_size=4)  # which the layerwise one cannot
    assert not list(advice.lighter(spec("galore", cut)))


def test_what_has_no_forecast_is_in_no_sum():
    hp = Hyperparams(devices=2, sharding="full")
    [unknown] = forecast.foreseen([spec("full", hp)], True).values()
    assert "FSDP" in unknown.error and unknown.verdict(forecast.CARDS["H200"]) == "unknown"
    known, other = arm_of("lora"), Arm("full", [spec("full", hp)], ["will run"], unknown)
    for card in (forecast.CARDS["H200"], None):
        said = planning.summary([known, other], [("", "will run")] * 2, card)
        assert "for what is forecast" in " ".join(said.split())
        assert "for what" not in planning.summary([known], [("", "will run")], card)
        assert "on disk" not in planning.summary([other], [("", "will run")], card)


def test_a_cap_makes_a_smaller_card(monkeypatch):
    from harness.training import stages

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", taken.append)
    card = SimpleNamespace(total_memory=40 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    stages.capped(10.0)
    stages.capped(80.0)
    stages.capped(0.0)
    assert taken == [0.25, 1.0]
    assert spec("lora", Hyperparams()).digest == spec("lora", Hyperparams(memory_cap=0.0)).digest
    assert spec("lora", Hyperparams()).digest != spec("lora", Hyperparams(memory_cap=8.0)).digest


def test_gradients_of_one_weight_are_added_up_where_the_first_lies():
    """As autograd's engine does it where nothing looks on: two of its size are held, and never three."""
    side = 512  # so that a weight has a MiB
    with dry_world.world(), ledger.Ledger() as found:
        weight = torch.zeros(side, side, device=dry_world.CARD, requires_grad=True)
        row = torch.zeros(1, side, device=dry_world.CARD)
        with found.entered("train"):
            (row @ weight @ weight.T).sum().backward()
            both = weight + weight  # somebody's own sum is another
    assert found.moments()["train"].allocated == pytest.approx(3 * 2**20, abs=2**15)
    with dry_world.world(), ledger.Ledger() as found:
        weight = torch.zeros(side, side, device=dry_world.CARD, requires_grad=True)
        weight.register_hook(lambda gradient: gradient + gradient)  # somebody's own, within a backward
        with found.entered("train"):
            (row @ weight).sum().backward()
    assert found.moments()["train"].allocated == pytest.approx(3 * 2**20, abs=2**15)
    with dry_world.world(), ledger.Ledger() as found:
        weight = torch.zeros(side, side, device=dry_world.CARD, requires_grad=True)
        with found.entered("train"):
            ((row @ weight).sum() + weight.sum()).backward()  # the first is one number, expanded
    assert found.moments()["train"].allocated == pytest.approx(3 * 2**20, abs=2**15)
    assert both.untyped_storage()._cdata != weight.untyped_storage()._cdata


def test_a_product_of_low_rank_waits_for_memory():
    """What it reads and writes, not what it computes; another library's product is one, too."""
    bf16 = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    rows, wide, thin = bf16(4096, 2048), bf16(2048, 2048), bf16(2048, 16)
    one, other = Work(), Work()
    for count, matrix in ((one, wide), (other, thin)):
        count.add(torch.ops.aten.mm.default, (rows, matrix), {}, rows @ matrix)
    assert (one.products, one.moved) == (2 * 4096 * 2048 * 2048, 0)
    assert (other.products, other.moved) == (0, 2 * (4096 * 2048 + 2048 * 16 + 4096 * 16))
    few, full = Work(), torch.empty(1152, 1152, device="meta")
    few.add(torch.ops.aten.mm.default, (full[:128], full), {}, full[:128] @ full)
    assert few.long_products == 2 * 128 * 1152 * 1152  # of which a card does fewer for each byte


def test_values_that_lie_apart_are_looked_for():
    """Of views of wider rows, and of what is repeated; a copy into another order is one, too."""
    wide, rows = torch.empty(64, 48, device="meta"), torch.empty(64, 32, device="meta")
    aten = torch.ops.aten
    for func, args, scattered in (
        (aten.mul.Tensor, (rows, rows), 0),
        (aten.mul.Tensor, (wide[:, :32], rows), 64 * 32),
        (aten.mul.Tensor, (rows, rows[:, :1]), 64 * 32),
        (aten.mul.Tensor, (rows, torch.tensor(2.0)), 0),
        (aten.clone.default, (rows.T,), 0),
        (aten.copy_.default, (torch.empty(32, 64, device="meta"), rows.T), 64 * 32),
        (aten.sum.dim_IntList, (wide[:, :32], [1]), 0),
    ):
        found = Work()
        found.add(func, args, {}, func(*args))
        assert found.scattered == scattered, (func, args)
    slow = replace(SLOW, bandwidth=1.0)
    assert seconds_of(Work(moved=1, scattered=1), slow) > seconds_of(Work(moved=1), slow)


@pytest.mark.parametrize("length, window", [(512, None), (2048, None), (2048, 512), (1024, 256)])
def test_flash_attention_reads_blocks_of_the_keys_that_a_query_sees(length, window):
    """As its loop over blocks has it: of each block of queries, those with a key that one of them sees."""
    blocks = 0
    for first in range(0, length, work.BLOCK):
        last = first + work.BLOCK - 1
        least = 0 if window is None else max(0, first - window + 1)
        blocks += last // work.BLOCK - least // work.BLOCK + 1
    read = blocks * work.BLOCK**2 / length
    assert work.seen(length, True, window or 0) == pytest.approx(read, rel=0.12)
    query = torch.empty(2 * length, 4, 64, device="meta")
    rows = torch.empty(1 + 2 + 2, device="meta")  # borders of two rows, and of two that may fill up
    given = [query, None, None, rows, None, length]
    own = {"window_size_left": -1 if window is None else window - 1}
    flop = FLOPS["aten._flash_attention_forward"](*given, **own)
    assert flop == pytest.approx(work.FLASH[0] * 2 * 2 * query.numel() * read, rel=0.12)
    given[3].count = 3  # known, where rows that only fill up lie among them
    assert FLOPS["aten._flash_attention_forward"](*given, **own) < flop


def test_uneven_micro_batches_have_a_part_that_does_not_grow():
    """Two widths tell it: of 3 micro-batches of 1,000 tokens in all, 3 times what each has to do."""
    flop = {"micro-batch": 700.0, "narrow micro-batch": 300.0}  # 100 and one a token
    facts = {"traced_tokens": 600, "narrow_tokens": 200}
    told = Forecast(work={name: {"products": value} for name, value in flop.items()}, facts=facts)
    assert told.training(SLOW, 3, 1000, 2) == pytest.approx(3 * 100 + 1000)


def test_what_rows_of_two_widths_share_is_found_in_a_trace(small):
    """LoRA-GGPO draws noise as large as its weights for each micro-batch."""
    hp = tiny.hyperparams(kernels="eager", batch_size=4, micro_batch_size=4)
    found = traced("lora_ggpo", LLAMA, hp)
    wide, narrow = (found.work[f"{name}micro-batch"] for name in ("", "narrow "))
    more = found.facts["traced_tokens"] / found.facts["narrow_tokens"] - 1
    assert 0 < wide.moved / narrow.moved - 1 < 0.6 * more
    assert wide.long_products / narrow.long_products - 1 == pytest.approx(more, rel=0.1)
    batches, tokens = found.facts["timed"]
    assert batches == 1 and found.facts["narrow_tokens"] <= tokens < found.facts["traced_tokens"]


def test_rows_that_a_method_makes_are_counted_as_long_as_it_makes_them():
    """ORPO's pairs: of four steps, the rejected answers are the longer ones of three."""
    longer = [replace(row, rejected_ids=tiny.array([7] * (1 + n % 4 * 9))) for n, row in enumerate(ROWS[:16])]
    hp = tiny.hyperparams(kernels="eager", batch_size=4, micro_batch_size=4, max_steps=4)
    found = dry.trace(spec("orpo", hp), made("orpo"), LLAMA, splits(longer), False, 3)
    steps = tiny.run(longer, hp).batches
    widths = [max(len(e.prompt_ids) + max(map(len, (e.response_ids, e.rejected_ids))) for e in step)
              for step in steps]  # fmt: skip
    assert len(steps) == TIMED and len(set(widths)) > 2
    assert (found.facts["micro_batches"], found.facts["micro_tokens"]) == (4, 2 * 4 * sum(widths))
    assert found.facts["timed"] == [1, 2 * sum(widths)] and not found.facts["rolls_out"]


def test_a_method_that_plans_each_step_has_a_forecast_of_few(small):
    class Planned(LoRA):
        name = "planned"

        def attach(self, model, run):
            self.left = list(range(run.steps))
            return super().attach(model, run)

        def prepare(self, model, examples, run):
            self.left.pop()
            return super().prepare(model, examples, run)

    hp = tiny.hyperparams(kernels="eager", max_steps=2)
    found, plain = (
        dry.trace(spec("lora", hp), own, LLAMA, splits(ROWS), False, 3) for own in (Planned(), LoRA())
    )
    assert found.facts["micro_tokens"] == plain.facts["micro_tokens"] > 0


def test_what_is_prepared_to_be_counted_is_no_work_of_a_step():
    class Slow(LoRA):
        name = "slow"

        def prepare(self, model, examples, run):
            torch.ones(4096, 4096, device=run.device).mm(torch.ones(4096, 4096, device=run.device))
            return super().prepare(model, examples, run)

    hp = tiny.hyperparams(kernels="eager", max_steps=4)
    found, plain = (
        dry.trace(spec("lora", hp), own, LLAMA, splits(ROWS), False, 3) for own in (Slow(), LoRA())
    )
    more = found.work["step"].products + found.work["step"].long_products
    assert more - plain.work["step"].products - plain.work["step"].long_products == 2 * 4096**3
    assert found.work["train"] == plain.work["train"]


@pytest.mark.parametrize("width", [128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_that_reads_a_mask_is_slower_than_products_and_slowest_backward_in_wide_heads(width, dtype):
    """Measured on an H200: 10 times a product as long, 35 backward above 128; in 32 bits as fast as one."""
    query = torch.empty(2, 3, 64, width, dtype=dtype, device="meta")
    name = "aten._scaled_dot_product_efficient_attention"
    once = 2 * query.numel() * 64
    forward = FLOPS[name](query, query, query, None, True) / (2 * once)
    backward = FLOPS[f"{name}_backward"](query, query, query, query) / (5 * once)
    if dtype == torch.float32:
        assert forward == backward == 1
    else:
        assert 5 <= forward <= 10 and (30 < backward < 40 if width > 128 else 5 <= backward <= 10)


def test_operations_are_known_by_their_names():
    pytest.importorskip("bitsandbytes")
    own = torch.ops.tuneoff.add_product
    for name in FLOPS:
        library, _, operation = name.partition(".")
        assert str(getattr(getattr(torch.ops, library), operation)) == name
    bf16 = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    given = bf16(4096, 2048), bf16(4096, 2048), bf16(2048, 2048)
    node = SimpleNamespace(target=own.default, args=given, kwargs={}, meta={"val": None})
    assert fused.work_of(node, set()).products == 2 * 4096 * 2048 * 2048  # of a compiled layer, too
