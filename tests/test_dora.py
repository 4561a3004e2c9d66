"""DoRA's lengths in closed form against PEFT's, which forms the whole rows."""

import bitsandbytes
import peft
import pytest
import tiny
import torch
from tiny import fit, hyperparams, losses, trained_weights
from torch import nn
from transformers import Qwen2Config

from methods.dora import DoRA, closed_form
from methods.lora import LoRA, dense

ROWS = tiny.rows(16, seed=1)
QWEN = Qwen2Config(
    vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2, pad_token_id=tiny.PAD, bos_token_id=tiny.BOS,
    eos_token_id=tiny.EOS, initializer_range=0.1,
)  # fmt: skip


def logits(model):
    batch = tiny.batch(ROWS[:8])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


class PeftsDoRA(LoRA):
    """The oracle: PEFT's own forward, which forms W + s B A and takes its norms."""

    def config(self, **more):
        return super().config(use_dora=True, **more)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.2}, {"rank": 1, "alpha": 64.0}], ids=str)
@pytest.mark.parametrize("config", [None, QWEN], ids=["gemma", "qwen, with biases"])
def test_dora_trains_as_pefts_does(options, config, tmp_path):
    """Step by step in fp32; what is saved PEFT loads to the same outputs, and merges to them."""
    hp = hyperparams(max_steps=6, epochs=6.0, learning_rate=5e-3)
    ours, _, measured = fit(DoRA(**options), hp, ROWS, base=tiny.model(config))
    theirs, _, expected = fit(PeftsDoRA(**options), hp, ROWS, base=tiny.model(config))
    assert losses(measured) == pytest.approx(losses(expected), rel=1e-5)
    for n, value in trained_weights(theirs).items():
        torch.testing.assert_close(trained_weights(ours)[n], value, atol=2e-4, rtol=1e-3)
    before = logits(ours)
    DoRA().save(ours, tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.model(config), tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), before, atol=1e-4, rtol=0)
    restored = DoRA().restore(lambda: tiny.model(config), tmp_path)
    assert torch.equal(logits(restored), before)
    torch.testing.assert_close(logits(DoRA().merge(restored)), before, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float64, "4 bits"])
def test_doras_lengths_are_those_of_the_whole_rows(kind):
    """Within 1e-4 where W is in bf16, as W A^T is; of W + s B A in bf16 they miss by five times more."""
    torch.manual_seed(0)
    if kind == "4 bits":
        base = bitsandbytes.nn.Linear4bit(128, 64, compute_dtype=torch.bfloat16, quant_type="nf4")
        base, kind = base.to(torch.bfloat16).to("cpu"), torch.bfloat16
    else:
        base = nn.Linear(96, 64, dtype=kind)
    adapted = peft.get_peft_model(nn.Sequential(base), peft.LoraConfig(target_modules=["0"], use_dora=True))
    layer = next(iter(closed_form(adapted).base_model.model.children()))
    a, b, s = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    nn.init.normal_(b, std=0.05)
    found = layer.lora_magnitude_vector["default"].lengths(layer.base_layer, b, a, s)
    whole = (dense(layer.base_layer).double() + s * b.double() @ a.double()).norm(dim=1)
    assert found.dtype == a.dtype and not found.requires_grad
    error = ((found - whole) / whole).abs().max().item()
    assert error < (1e-4 if kind == torch.bfloat16 else 1e-6)
    if kind == torch.bfloat16:
        formed = (dense(layer.base_layer) + (s * b @ a).to(kind)).norm(dim=1)
        assert ((formed - whole) / whole).abs().max().item() > 5 * error
