"""LoRA-GGPO and LoRA-MGPO: LoRA where nothing is perturbed, the formulas where something is."""

from dataclasses import replace

import pytest
import scipy.stats
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from peft.tuners.lora import LoraLayer
from tiny import copy_of, fit, hyperparams, losses, trained_weights
from transformers import AutoModelForCausalLM

from harness import ROOT
from harness.errors import BadRequest
from harness.method import build, known_methods, resolve
from harness.training import head
from methods import lora_ggpo
from methods.lora import LoRA
from methods.lora_ggpo import LoRAGGPO, Noise
from methods.qlora import load_nf4

ROWS = tiny.rows(16, seed=2)
HP = hyperparams(learning_rate=5e-3, max_steps=4, epochs=4.0)
STRONG = {
    "ggpo": LoRAGGPO(sigma=0.3, beta=0.1, dropout=0.1),
    "mgpo": LoRAGGPO(variant="mgpo", rho=0.5, dropout=0.1),
}
NONE = {
    "ggpo": LoRAGGPO(sigma=0.0, beta=0.0, dropout=0.1),
    "mgpo": LoRAGGPO(variant="mgpo", rho=0.0, dropout=0.1),
}


def batch(number: int = 0):
    """As the method prepares it: with the number of its draw."""
    return {**tiny.batch(ROWS[:8]), "draw": torch.tensor(number, dtype=torch.int32)}


def adapted(model) -> list:
    return [m for m in model.modules() if isinstance(m, LoraLayer)]


def factors(layer):
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


def logits(model):
    tensors = batch()
    with torch.no_grad():
        return model.eval()(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits


# LoRA, where nothing is perturbed


@pytest.mark.parametrize("micro", [8, 4])
@pytest.mark.parametrize("variant", NONE)
def test_without_a_perturbation_it_is_lora_to_the_bit(variant, micro):
    """With dropout: the noise leaves the global random state alone."""
    hp = hyperparams(learning_rate=5e-3, max_steps=4, epochs=4.0, micro_batch_size=micro)
    plain, _, expected = fit(LoRA(dropout=0.1), hp, ROWS)
    found, _, measured = fit(NONE[variant], hp, ROWS)
    assert losses(measured) == losses(expected)
    for n, value in trained_weights(plain).items():
        assert torch.equal(trained_weights(found)[n], value), n


@pytest.mark.parametrize("variant", STRONG)
def test_the_first_step_is_loras_and_the_second_is_not(variant):
    one, two = hyperparams(max_steps=1), hyperparams(learning_rate=5e-3, max_steps=2, warmup_ratio=0.0)
    plain, found = (trained_weights(fit(m, one, ROWS)[0]) for m in (LoRA(dropout=0.1), STRONG[variant]))
    assert all(torch.equal(found[n], value) for n, value in plain.items())
    expected, measured = (losses(fit(m, two, ROWS)[2]) for m in (LoRA(dropout=0.1), STRONG[variant]))
    assert measured[0] == expected[0]
    assert measured[1] != expected[1]


@pytest.mark.parametrize("variant", STRONG)
def test_the_global_random_state_is_where_lora_leaves_it(variant):
    fit(LoRA(dropout=0.1), HP, ROWS)
    expected = torch.get_rng_state()
    fit(STRONG[variant], HP, ROWS)
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.parametrize("variant", STRONG)
def test_a_run_can_be_repeated_and_another_seed_differs(variant):
    first, again, other = (losses(fit(STRONG[variant], HP, ROWS, seed=s)[2]) for s in (0, 0, 1))
    assert first == again
    assert first != other


# What a perturbation may not touch


@pytest.mark.parametrize("variant", STRONG)
def test_the_base_stays_bit_identical(variant):
    base = tiny.model()
    frozen = {n: (p, p.detach().clone()) for n, p in base.named_parameters()}
    fit(STRONG[variant], HP, ROWS, base=base)
    for n, (p, value) in frozen.items():
        assert torch.equal(p, value), n


@pytest.mark.parametrize("variant", STRONG)
def test_evaluation_saving_and_merging_are_without_it(variant, tmp_path):
    method = STRONG[variant]
    trained, _, _ = fit(method, HP, ROWS)
    weights = {n: v for n, v in copy_of(trained).items() if "lora_" in n}
    plain, _ = tiny.attached(LoRA())
    plain.load_state_dict(weights, strict=False)
    expected = logits(plain)
    assert torch.equal(logits(trained), expected)
    method.save(trained, tmp_path)
    assert torch.equal(logits(method.restore(tiny.model, tmp_path)), expected)
    torch.testing.assert_close(logits(method.merge(trained)), expected, atol=2e-4, rtol=0)
    trained.train()  # nor does the merged model's training know of it
    tensors = batch()
    inputs = {"input_ids": tensors["input_ids"], "attention_mask": tensors["attention_mask"]}
    assert torch.equal(trained.base_model.model(**inputs).logits, trained.base_model.model(**inputs).logits)


# The formulas, from whole matrices


def by_hand(method, steps: int, size: float = 1.0, clip: float = 0.05, base=None, autocast=False, seed=0):
    """Trains without the loop, from a B that is not zero. -> the model, its optimizer, and per layer what it
    was before each step: W', and G before and after the clipping. `size` is a factor of the loss."""
    model, run = tiny.attached(method, base, hp=hyperparams(learning_rate=1e-2), seed=seed)
    model.train()
    for layer in adapted(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.2)
    optimizer = method.optimizer(model, run)
    seen = {layer: [] for layer in adapted(model)}

    def carried(layer):
        a, b, s = factors(layer)
        return (s * (b.grad @ a + b @ a.grad)).detach()

    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = size * method.loss(model, batch(step), run)
        loss.backward()
        whole = {layer: carried(layer) for layer in seen}
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for layer, steps_seen in seen.items():
            a, b, s = factors(layer)
            weight = layer.weight.detach().float()
            if hasattr(layer.weight, "quant_state"):
                weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
            steps_seen.append((weight + (s * b @ a).detach(), whole[layer], carried(layer)))
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, seen


def shift_of(layer, autocast=False):
    """E, read off the layer: what it adds to the identity matrix in training and not in evaluation."""
    eye = torch.eye(layer.in_features, dtype=layer.weight.dtype if layer.weight.is_floating_point() else None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return (layer.train()(eye).float() - layer.eval()(eye).float()).T


def drawn_over_formula(method, layer, seen, autocast=False):
    """Standard deviation of each row of E over many draws, by the formula's."""
    weight, _, gradient = seen[layer][-1]
    formula = method.sigma * weight.norm(dim=1) + method.beta * gradient.norm(dim=1) ** 2
    draws = []
    for number in range(300):
        method.keys.copy_(torch.full_like(method.keys, number))  # one is enough that they differ
        draws.append(shift_of(layer, autocast))
    draws = torch.stack(draws, 2).flatten(1)
    assert draws.mean(1).abs().max() < 0.05 * formula.max()
    return draws.std(1) / (formula / weight.shape[0] ** 0.5)


@pytest.mark.parametrize("name", ["q_proj", "k_proj", "down_proj"])  # 64 x 64, 32 x 64, 64 x 128
@pytest.mark.parametrize(("sigma", "beta"), [(0.03, 0.01), (0.0, 1.0), (0.3, 1e3)])
def test_ggpos_noise_has_the_size_of_its_formula(name, sigma, beta):
    method = LoRAGGPO(sigma=sigma, beta=beta)
    model, _, seen = by_hand(method, 3)
    (layer, *_) = [m for n, m in model.named_modules() if n.endswith(name)]
    ratio = drawn_over_formula(method, layer, seen)
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)
    assert ratio.min() > 0.97 and ratio.max() < 1.03


def test_at_the_defaults_gradients_guide_as_little_as_the_card_says(monkeypatch):
    """Their share of the noise, mean over rows, layers and steps, on the demo's model."""
    shares, measure = [], Noise.measure

    def watched(group):
        measure(group)
        for one in group:
            of_weights = one.size * len(one.size) ** 0.5
            gradient = one.s * (one.b.grad @ one.a + one.b @ one.a.grad)
            shares.append((one.method.beta * gradient.norm(dim=1) ** 2 / of_weights).mean().item())

    monkeypatch.setattr(Noise, "measure", staticmethod(watched))
    draw = torch.Generator().manual_seed(0)
    for clip, expected in ((1.0, 0.0005), (0.0, 0.01)):
        shares.clear()
        base = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model", dtype=torch.float32)
        texts = torch.randint(5, base.config.vocab_size, (32, 40), generator=draw).tolist()
        cut = [(tiny.array(ids[:10]), tiny.array(ids[10:])) for ids in texts]
        rows = [replace(ROWS[0], id=str(i), prompt_ids=p, response_ids=r) for i, (p, r) in enumerate(cut)]
        hp = hyperparams(learning_rate=2e-3, max_steps=6, epochs=9.0, max_grad_norm=clip)
        fit(LoRAGGPO(), hp, rows, base=base)
        assert expected / 3 < sum(shares) / len(shares) < 3 * expected


def test_the_clipping_acts_in_these_tests():
    """Else gradients before and after it could be mistaken for each other."""
    _, _, seen = by_hand(LoRAGGPO(), 3)
    for _, whole, clipped in (steps[-1] for steps in seen.values()):
        assert whole.norm() > 1.5 * clipped.norm()


@pytest.mark.parametrize("kind", ["4-bit", "bf16"])
def test_ggpos_noise_knows_the_weight_in_other_precisions(kind, tmp_path):
    method = LoRAGGPO(sigma=0.3, beta=0.1)
    if kind == "4-bit":
        tiny.model().save_pretrained(tmp_path)
        base = load_nf4(lambda **more: load(tmp_path, **more))
    else:
        base = tiny.model().bfloat16()
    _, _, seen = by_hand(method, 2, base=base, autocast=kind == "bf16")
    layer = next(iter(seen))
    ratio = drawn_over_formula(method, layer, seen, kind == "bf16")
    assert ratio.mean().item() == pytest.approx(1, abs=0.01)


def load(folder, **more):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": "cpu"}, **more)


@pytest.mark.parametrize(("size", "capped"), [(1.0, False), (1e-3, True)])
def test_mgpos_shift_is_its_formula(size, capped):
    """-rho V / ||V|| min(1 / g, 10), with g of the gradients before the clipping."""
    method = LoRAGGPO(variant="mgpo", rho=0.05, decay=0.7)
    _, optimizer, seen = by_hand(method, 4, size)
    for layer, steps in seen.items():
        mean = None
        for _, whole, _ in steps:
            mean = whole.norm() if mean is None else 0.7 * mean + 0.3 * whole.norm()
        assert (mean < 0.1) == capped
        a, b, s = factors(layer)
        moments = optimizer.state
        v = s * (moments[b]["exp_avg"] @ a + b @ moments[a]["exp_avg"])
        expected = -0.05 * v / v.norm() * min(1 / mean, 10)
        torch.testing.assert_close(shift_of(layer), expected.detach(), atol=2e-6, rtol=1e-3)
        assert shift_of(layer).norm().item() == pytest.approx(0.05 * min(1 / mean.item(), 10), rel=1e-3)


def test_mgpo_in_bf16_shifts_by_its_length():
    method = LoRAGGPO(variant="mgpo", rho=0.5)
    _, _, seen = by_hand(method, 2, size=1e-3, base=tiny.model().bfloat16(), autocast=True)
    for layer in seen:
        assert shift_of(layer, autocast=True).norm().item() == pytest.approx(5, rel=0.02)


# The gradient's path


def gradients(method, model, checkpointing=False):
    run = tiny.run(hp=hyperparams(gradient_checkpointing=checkpointing), method=method)
    model.zero_grad()
    run.accumulate(model, [batch()])
    assert head.causal_lm(model).is_gradient_checkpointing == checkpointing
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_mgpos_gradient_is_loras_on_the_shifted_weights():
    method = LoRAGGPO(variant="mgpo", rho=0.5)
    model, _, seen = by_hand(method, 2)
    shifts = {n: shift_of(m) for n, m in model.named_modules() if m in seen}
    found = gradients(method, model)
    dense, _ = tiny.attached(LoRA())
    dense.load_state_dict(model.state_dict())
    with torch.no_grad():
        for n, shift in shifts.items():
            dense.get_submodule(n).base_layer.weight += shift
    expected, unshifted = gradients(LoRA(), dense), gradients(LoRA(), tiny.attached(LoRA())[0])
    assert found.keys() == expected.keys() == unshifted.keys()
    for n, gradient in expected.items():
        torch.testing.assert_close(found[n], gradient, atol=1e-5, rtol=1e-3)
        assert not torch.allclose(found[n], unshifted[n], atol=1e-3, rtol=1e-2)


def test_ggpos_noise_is_a_constant_to_the_gradient():
    method = STRONG["ggpo"]
    _, _, seen = by_hand(LoRAGGPO(sigma=0.3), 2)
    assert method.sigma == 0.3
    layer = next(iter(seen))

    def of_input(layer):
        x = torch.ones(3, layer.in_features, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        return x.grad, y.detach()

    (noisy, y), (plain, z) = of_input(layer.train()), of_input(layer.eval())
    assert torch.equal(noisy, plain)
    assert not torch.allclose(y, z, atol=1e-2)


@pytest.mark.parametrize("variant", STRONG)
def test_recomputed_layers_are_shifted_alike(variant):
    """And the statistics of the step are the same, whose order backward decides."""
    method = LoRAGGPO(variant=variant, sigma=0.3, beta=0.1, rho=0.5)
    model, _, _ = by_hand(method, 2)
    plain = gradients(method, model)
    norms = [p.norm.clone() for p in method.perturbations] if variant == "mgpo" else []
    again = gradients(method, model, checkpointing=True)
    for n, gradient in plain.items():
        torch.testing.assert_close(again[n], gradient, atol=1e-6, rtol=1e-5)
    for perturbation, norm in zip(method.perturbations, norms, strict=False):
        torch.testing.assert_close(perturbation.norm, norm, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("variant", STRONG)
def test_micro_batches_share_mgpos_shift_and_draw_ggpos_anew(variant):
    method = LoRAGGPO(variant=variant)
    model, _, seen = by_hand(method, 2)
    layer, other = list(seen)[:2]
    before, beside = shift_of(layer), shift_of(other)
    method.loss(model.train(), batch(2), tiny.run())
    assert torch.equal(shift_of(layer), before) == (variant == "mgpo")
    assert not torch.equal(before, beside)  # q_proj and k_proj draw apart
    if variant == "ggpo":
        k, q = sorted((before, beside), key=len)
        assert (k * q[: len(k)]).sum().abs() / (k.norm() * q[: len(k)].norm()) < 0.1


def test_the_noise_is_standard_normal_and_independent():
    """Of neighbours in rows and columns, of every layer and forward, and of keys that differ in one bit."""
    method = LoRAGGPO()
    model, run = tiny.attached(method, seed=3)
    drawn = []
    for number in (0, 1, 2, 2**20):
        method.loss(model, batch(number), run)
        drawn += [lora_ggpo.normal(keys, 64, 128) for keys in method.keys[:3]]
    key = torch.tensor([5, 7], dtype=torch.int32)
    drawn += [lora_ggpo.normal(key ^ torch.tensor(bits, dtype=torch.int32), 64, 128)
              for bits in ((0, 0), (1, 0), (0, 1), (-(2**31), 0), (0, -(2**31)))]  # fmt: skip
    n = 64 * 128
    for noise in drawn:
        assert scipy.stats.kstest(noise.flatten(), "norm").pvalue > 1e-4
        assert abs(noise.mean()) < 4 / n**0.5 and abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
        for a, b in ((noise[1:], noise[:-1]), (noise[:, 1:], noise[:, :-1])):
            for power in (1, 2):
                assert abs(scipy.stats.pearsonr((a**power).flatten(), (b**power).flatten())[0]) < 5 / n**0.5
    whole = torch.stack(drawn).flatten(1)
    for table in (whole, whole**2):
        assert (table.corrcoef() - torch.eye(len(drawn))).abs().max() < 5 / n**0.5
    values = [set(noise.tolist()) for noise in whole]  # nor the same numbers in another order
    assert len(values[0] & values[1]) < 30
    many = lora_ggpo.normal(key, 1024, 1024)
    assert many.abs().max() > 4.5 and many.isfinite().all()
    tail = (many.abs() > 3).float().mean().item()
    assert tail == pytest.approx(2 * scipy.stats.norm.sf(3), rel=0.1)


def test_another_seed_draws_other_noise():
    def noise(seed):
        _, _, seen = by_hand(LoRAGGPO(beta=0.0), 2, seed=seed)
        drawn = shift_of(next(iter(seen)))
        return drawn / drawn.norm(dim=1, keepdim=True)  # the sizes of its rows differ by seed in any case

    assert (noise(0) * noise(1)).sum(1).abs().mean() < 0.2


def test_impossible_options_are_refused():
    LoRAGGPO.name = "lora_ggpo"
    build(LoRAGGPO, {"variant": "mgpo"})
    for wrong in ({"variant": "gpo"}, {"sigma": -1.0}, {"rho": -0.1}, {"decay": 1.0}, {"rank": 0}):
        with pytest.raises(BadRequest):
            build(LoRAGGPO, wrong)
    with pytest.raises(ValueError, match="lora_ggpo has no variants"):
        resolve("lora_ggpo.mgpo", known_methods()["lora_ggpo"])
