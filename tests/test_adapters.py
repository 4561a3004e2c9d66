"""LoRA's products as one with the frozen ones: PEFT's own forward and backward are the oracle."""

from copy import deepcopy
from functools import partial

import pytest
import test_contract
import tiny
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from harness.method import build, find, known_methods, resolve
from harness.training.adapters import Adapters, alike, triton

QWEN = Qwen2Config(  # queries, keys and values have biases
    vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
)  # fmt: skip
IDS = torch.randint(5, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
LINEAR = 7  # of a decoder layer


def adapted(name="lora", base=None, dtype=torch.float32, **options):
    cls = resolve(name, find(name, known_methods()))
    model, _ = tiny.attached(build(cls, options), base, tiny.rows(8))
    for part, parameter in model.named_parameters():
        if "lora_B" in part:
            torch.nn.init.normal_(parameter, std=0.1)
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)
    return model.train()


def gradients(model):
    """-> the loss, and the gradients by name."""
    model.zero_grad()
    loss = model(IDS, use_cache=False).logits.float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def faster(model):
    adapters = Adapters(alike(model))
    with adapters.installed():
        adapters.write()
        found = gradients(model)
    return adapters, found


@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("lora", {"rank": 3}, LINEAR),
        ("lora", {"rank": 8, "alpha": 4.0, "targets": "q_proj,v_proj,down_proj"}, 3),
        ("rslora", {"rank": 5}, LINEAR),
        ("pissa", {"rank": 2}, LINEAR),
    ],
)
@pytest.mark.parametrize("config", [None, QWEN], ids=["gemma3", "qwen2"])
def test_what_is_computed_and_learned_is_what_pefts_layers_do(name, options, layers, config):
    model = adapted(name, tiny.model(config) if config else None, **options)
    before, strides = tiny.copy_of(model), [p.stride() for p in model.parameters()]
    expected = gradients(model)
    adapters, found = faster(model)
    assert sum(len(group.layers) for group in adapters.groups) == 2 * layers
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(gradients(model), expected, atol=1e-6, rtol=1e-4)  # by views of shared memory
    adapters.close()
    assert [p.stride() for p in model.parameters()] == strides
    torch.testing.assert_close(tiny.copy_of(model), before, atol=0, rtol=0)


def test_what_was_computed_before_a_step_is_not_given_after_it():
    """Of the very same tensor."""
    model, x = adapted(), torch.randn(3, 64)
    adapters = Adapters(alike(model))
    for group in adapters.groups:
        own = x if x.shape[1] == group.a.shape[1] else torch.randn(3, group.a.shape[1])
        for _ in range(2):
            for factor in group.factors:
                factor.data += 0.1 * torch.randn_like(factor)
            expected = [layer(own) for layer in group.layers]
            with adapters.installed():
                adapters.write()
                torch.testing.assert_close([layer(own) for layer in group.layers], expected)


def test_layers_of_another_type_than_most_are_left_to_themselves():
    """One memory, and one launch that writes all of it, has one type."""
    model = adapted(dtype=torch.bfloat16)
    kept = [layer for name, layer in model.named_modules() if name.endswith("k_proj")]
    for layer in kept:
        layer.base_layer.float()
    before = tiny.copy_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients(model)
        adapters, found = faster(model)
    assert {place.dtype for place in adapters.places} == {torch.bfloat16}
    assert sum(len(group.layers) for group in adapters.groups) == 2 * LINEAR - len(kept)
    torch.testing.assert_close(tiny.copy_of(model), before, atol=0, rtol=0)
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=2e-2)


def test_without_its_adapters_it_is_the_base():
    model = adapted()
    with model.disable_adapter():
        expected = model(IDS, use_cache=False).logits
    adapters = Adapters(alike(model))
    with adapters.installed(), model.disable_adapter():
        torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, atol=1e-6, rtol=1e-5)


def test_in_bf16_it_is_no_farther_from_the_truth():
    model = adapted(dtype=torch.bfloat16)
    exact = deepcopy(model).float()
    _, truth = gradients(exact)

    def apart(found):
        return sum((found[name].float() - value).square().sum() for name, value in truth.items()) ** 0.5

    with torch.autocast("cpu", torch.bfloat16):
        _, peft = gradients(model)
        _, (_, own) = faster(model)
    assert 0 < apart(own) < 1.1 * apart(peft)


@pytest.mark.parametrize(
    ("name", "options"),
    [("dora", {}), ("qlora", {}), ("peft.adalora", test_contract.PERIODS["peft.adalora"]), ("reft", {})],
)
def test_other_layers_are_left_to_themselves(name, options, tmp_path):
    cls = resolve(name, find(name, known_methods()))
    tiny.model().save_pretrained(tmp_path)
    base = cls.load(build(cls, options), partial(AutoModelForCausalLM.from_pretrained, tmp_path))
    model, _ = tiny.attached(build(cls, options), base, tiny.rows(8))
    assert not Adapters(alike(model)).groups


@pytest.mark.skipif(not (triton and torch.cuda.is_available()), reason="a kernel of a GPU")
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float32])
def test_one_launch_writes_what_a_copy_a_matrix_does(other):
    model = adapted(rank=3, alpha=7.0)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(
            "cuda", torch.float32 if parameter.requires_grad else torch.bfloat16
        )
    alike(model)[0][0].get_base_layer().to(other)
    turned = alike(model)[0][0].lora_B["default"].weight  # as a decomposition may leave it
    turned.data = turned.data.T.contiguous().T
    adapters = Adapters(alike(model))
    assert adapters.table is not None
    adapters.write()
    triples = zip(adapters.places, adapters.factors, adapters.scales, strict=True)
    for place, factor, scale in triples:
        torch.testing.assert_close(place, (factor * scale).to(place.dtype), atol=0, rtol=0)
