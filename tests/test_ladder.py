"""Which way a step is computed: the highest that agrees with the plain one, and what is said where none does.

The CPU stands in for a GPU: layers are traced and partitioned as they are for one, without making code, and
attention has a mask. What only a GPU can do, graphs, is held by benchmarks/train.py there.
"""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny
import torch
from test_shapes import flash_on_a_cpu, masked  # noqa: F401
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AttentionInterface, OPTConfig

from harness.training import attention, kernels
from methods.full import Full
from methods.galore_layerwise import GaLoreLayerwise
from methods.lora import LoRA

KINDS = ["sliding_attention", "full_attention", "sliding_attention"]
HP = tiny.hyperparams(max_steps=3, kernels="compiled", batch_size=6, micro_batch_size=6)
ROWS = tiny.rows(18, prompt=(12, 12), response=(6, 6))  # of one size, which is traced without symbols
UNEVEN = tiny.rows(18)


@pytest.fixture
def traced(monkeypatch, flash_on_a_cpu):  # noqa: F811
    compiling = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: compiling(f, **{**how, "backend": "aot_eager"}))
    monkeypatch.setattr(kernels, "RUNGS", {"compiled": ("compiling",)})
    refusal = kernels.Kernels.refusal
    monkeypatch.setattr(
        kernels.Kernels, "refusal", lambda self: refusal(self) if self.run.hp.kernels == "eager" else None
    )
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def trained(method, hp=HP, rows=ROWS):
    one = tiny.gemma(num_hidden_layers=1, layer_types=["full_attention"])
    model, _, record = tiny.fit(method, hp, rows, base=tiny.model(one))
    return tiny.losses(record), tiny.trained_weights(model), record


class Apart(LoRA):
    cannot = {"packing": "its rows are padded"}


@pytest.mark.parametrize(
    ("method", "rows", "micro"),
    [(LoRA, UNEVEN, 6), (Apart, ROWS, 6), (Full, ROWS, 6), (LoRA, ROWS, 2), (GaLoreLayerwise, ROWS, 6)],
    ids=["LoRA, several sizes", "Apart", "Full", "LoRA, steps in parts", "updates within backward"],
)  # fmt: skip
def test_compiled_steps_learn_what_plain_ones_do(method, rows, micro, traced):
    hp = replace(HP, micro_batch_size=micro)
    plain, weights, eager = trained(method(), replace(hp, kernels="eager"), rows)
    assert (eager.kernels.rung, eager.kernels.reason) == ("eager", "as hp.kernels asks")
    losses, found, record = trained(method(), hp, rows)
    assert record.kernels.rung == "compiled", record.kernels.reason
    assert record.kernels.packed == ("packing" not in method.cannot)
    torch.testing.assert_close(losses, plain, atol=1e-4, rtol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(
            found[name], weight, atol=2e-3, rtol=1e-3
        )  # Adam: tiny gradients, whole steps
    assert record.hashes["learned"] == eager.hashes["learned"]


def test_who_uses_gradients_within_backward_by_no_hook_of_weights_is_not_tried():
    one = SimpleNamespace(
        run=SimpleNamespace(
            hp=HP, device=SimpleNamespace(type="cuda"), sharded=False,
            accelerator=SimpleNamespace(mixed_precision="bf16"),
        ),
        within=True, causal=(model := tiny.model()), model=model, parameters=list(model.parameters()),
    )  # fmt: skip
    assert "by no hooks" in kernels.Kernels.refusal(one)
    one.parameters[0].register_post_accumulate_grad_hook(lambda p: None)
    assert kernels.Kernels.refusal(one) is None


def test_what_computes_something_else_falls_back_and_is_told(traced, monkeypatch):
    class Wrong(LoRA):
        def loss(self, model, batch, run):
            return super().loss(model, batch, run) * (1.5 if run.fused else 1.0)

    losses, _, record = trained(Wrong())
    assert record.kernels.rung == "eager" and record.kernels.packed is None
    assert record.kernels.reason.startswith("compiled: loss ")
    plain, _, _ = trained(LoRA(), replace(HP, kernels="eager"))
    torch.testing.assert_close(losses, plain, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_traced_falls_back_and_is_told(traced):
    class Breaking(LoRA):
        def attach(self, model, run):
            model = super().attach(model, run)
            layer = model.get_base_model().model.layers[0].mlp
            layer.register_forward_hook(lambda *_: torch._dynamo.graph_break())
            return model

    _, _, record = trained(Breaking())
    assert record.kernels.rung == "eager" and record.kernels.reason.startswith("compiled: Unsupported")


def test_attention_that_mixes_rows_is_not_used_for_packed_ones(traced):
    def mixing(*args, cu_seq_lens_q=None, **more):
        return masked(*args, cu_seq_lens_q=cu_seq_lens_q[[0, -1]], **more)

    AttentionInterface.register(attention.NAME, mixing)
    _, _, record = trained(LoRA())
    assert record.kernels.packed is not True and "mixes packed rows" in record.kernels.reason


def opt(**changes):
    """It reads packed rows as one: positions alone do not tell it where they begin."""
    size = {"vocab_size": tiny.VOCABULARY, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64}
    config = OPTConfig(**size, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=512,
                       **{"dropout": 0.0, **changes})  # fmt: skip
    return tiny.model(config)


def test_rows_that_plain_steps_would_mix_are_not_packed(traced):
    found = []
    for way in ("eager", "compiled"):
        _, _, record = tiny.fit(Full(), replace(HP, kernels=way), ROWS, base=opt())
        found.append(record)
    assert not found[1].kernels.packed and "mixes packed rows" in found[1].kernels.reason
    torch.testing.assert_close(*map(tiny.losses, found), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dropout, why", [(0.1, "compiled layers would draw another dropout"), (0.0, None)])
def test_no_other_dropout_is_drawn_wherever_a_model_draws_it(dropout, why):
    """OPT's is a function, no module."""
    model = opt(dropout=dropout)
    run = SimpleNamespace(hp=HP, device=torch.device("meta"), sharded=False,
                          accelerator=SimpleNamespace(mixed_precision="bf16"))  # fmt: skip
    one = SimpleNamespace(run=run, model=model, causal=model, within=False)
    assert kernels.Kernels.refusal(one) == why


def test_a_short_training_is_not_compiled(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels.Kernels, "refusal", lambda self: None)
    monkeypatch.setattr(kernels.Kernels, "packed", lambda self: None)
    monkeypatch.setattr(
        kernels.Kernels, "choose", lambda self, batch: seen.append(self.untried.pop(0)) or True
    )
    tiny.fit(LoRA(), replace(HP, kernels="auto"), ROWS)
    assert seen == ["eager + graph", "fused"]


def test_steps_leave_out_what_their_choice_took(monkeypatch):
    def slow(self, batch):
        self.untried.pop(0)
        time.sleep(3)
        return True

    monkeypatch.setattr(kernels, "RUNGS", {"eager + graph": ("graphs",)})
    monkeypatch.setattr(kernels.Kernels, "refusal", lambda self: None)
    monkeypatch.setattr(kernels.Kernels, "choose", slow)
    _, _, record = tiny.fit(LoRA(), HP, ROWS)
    assert max(record.step_seconds) < 3


def test_gradients_apart_by_more_than_rounding_differ():
    one, other = torch.ones(100), torch.ones(100)

    def difference(expected, found):
        return kernels.difference(expected, found, ["w"])

    assert difference((2.0, [one]), (2.01, [other])) is None
    assert "loss" in difference((2.0, [one]), (2.1, [other]))
    other[:2] = 0.0  # 14 % of their length
    assert "gradients 14.1% apart" in difference((2.0, [one]), (2.0, [other]))
    assert difference((2.0, [torch.zeros(3)]), (2.0, [None])) is None
    assert "apart" in difference((2.0, [torch.zeros(3)]), (2.0, [torch.ones(3)]))
    assert "loss" in difference((2.0, [one]), (float("nan"), [one]))
    assert kernels.farthest([one], [one * float("nan")], ["w"]) == (kernels.MOST, None)


def test_few_gradients_that_are_wrong_are_found_among_many():
    large, norm, kinds = torch.ones(10_000), torch.ones(9), ["w", "norm", "norm"]
    expected, noise = [large, norm, norm], [large * 1.04, norm * 1.3, norm * 0.8]
    assert kernels.difference((2.0, expected), (2.0, noise), kinds) is None
    unwritten = [large, torch.zeros(9), torch.zeros(9)]  # 4 % of all
    assert kernels.difference((2.0, expected), (2.0, unwritten), kinds) == "gradients of norm 100.0% apart"
    tiny_ones = [large, norm * 0.01, norm]  # which rounding alone may turn round
    assert kernels.difference((2.0, tiny_ones), (2.0, [large, -norm * 0.01, norm]), kinds) is None


def test_a_weight_without_values_is_compared_too(traced):
    """As of a layer of which a method has chosen nothing."""

    class Empty(LoRA):
        def attach(self, model, run):
            model = super().attach(model, run)
            model.nothing = torch.nn.Parameter(torch.empty(0))
            return model

        def loss(self, model, batch, run):
            return super().loss(model, batch, run) + model.nothing.sum()

    _, _, record = trained(Empty())
    assert record.kernels.rung == "compiled", record.kernels.reason


def test_gradients_of_norms_that_nobody_writes_are_found(traced):
    class Unwritten(Full):
        def loss(self, model, batch, run):
            if run.fused:
                for name, p in model.named_parameters():
                    p.requires_grad_("norm" not in name)
            try:
                return super().loss(model, batch, run)
            finally:
                for p in model.parameters():
                    p.requires_grad_(True)

    _, _, record = trained(Unwritten())
    assert record.kernels.rung in (None, "eager")
    assert "norm" in record.kernels.reason and "apart" in record.kernels.reason


def test_gradients_that_go_wrong_later_are_told(traced):
    class Later(LoRA):
        def loss(self, model, batch, run):
            return super().loss(model, batch, run) * (0.1 if run.fused and run.record.training else 1.0)

    _, _, record = trained(Later())
    assert record.kernels.rung == "compiled" and 0.89 < record.kernels.apart < 0.91
    _, _, sound = trained(LoRA())
    assert sound.kernels.apart < 1e-4 and not sound.kernels.reason


def test_a_comparison_that_breaks_costs_no_training(traced):
    class Breaks(LoRA):
        def loss(self, model, batch, run):
            if run.record.training and not run.fused:
                raise torch.cuda.OutOfMemoryError("no room")
            return super().loss(model, batch, run)

    losses, _, record = trained(Breaks())
    assert len(losses) == 3 and record.kernels.rung == "compiled" and record.kernels.apart is None
    assert record.kernels.reason == "not compared after the last step: OutOfMemoryError: no room"


def test_where_the_first_gradients_are_zero_a_later_step_chooses(traced):
    """As GRPO's are where all answers earn the same."""

    class Late(LoRA):
        def loss(self, model, batch, run):
            return super().loss(model, batch, run) * (0.0 if not self.steps else 1.0)

        def prepare(self, model, examples, run):
            self.steps = run.record.training and len(run.record.training)
            return super().prepare(model, examples, run)

    _, _, record = trained(Late(), replace(HP, max_steps=4))
    assert record.kernels.rung == "compiled", record.kernels.reason
    assert record.training[0]["grad_norm"] == 0
    _, _, record = trained(Late(), replace(HP, max_steps=1))
    assert record.kernels.rung == "eager"
    assert record.kernels.reason == "no step had gradients to compare with faster ones"


@pytest.mark.parametrize(
    "kinds, window, count",
    [(["full_attention"] * 3, 4, 1), (KINDS, HP.max_length, 1), (KINDS, HP.max_length - 1, 2)],
    ids=["alike", "window that no row fills", "window"],
)
def test_layers_are_one_program(kinds, window, count, traced, monkeypatch):
    """The first too, whose input nobody trains."""
    programs = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", lambda f, **_: torch._dynamo.optimize(programs, nopython=True)(f))
    rows = tiny.rows(18, prompt=(9, 9), response=(5, 5))
    base = tiny.model(tiny.gemma(num_hidden_layers=3, layer_types=kinds, sliding_window=window))
    _, _, record = tiny.fit(LoRA(), HP, rows, base=base)
    assert record.kernels.rung == "compiled", record.kernels.reason
    assert programs.frame_count == count
    layers = base.model.layers
    assert [layer.self_attn.sliding_window for layer in layers] == [
        window if kind == "sliding_attention" else None for kind in kinds
    ]
