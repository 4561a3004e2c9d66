"""LISA: which layers train, for how long, and that nothing else moves or is held."""

import pytest
import tiny
import torch
from tiny import copy_of, fit, hyperparams

from harness.errors import BadRequest
from harness.method import build, known_methods, resolve
from harness.training.model import optimizer_bytes, sizes
from methods.full import Full
from methods.lisa import LISA

ROWS = tiny.rows(22, seed=1)
CONSTANT = {"warmup_ratio": 0.0, "schedule": "constant"}  # so that every step moves something
DEPTH = 6
CONFIG = tiny.gemma(num_hidden_layers=DEPTH, layer_types=["sliding_attention", "full_attention"] * 3)


def base():
    return tiny.model(CONFIG)


def watched(method, hp, seed: int = 0, model=None):
    """-> model, optimizer, and of each step: the layers of which a weight moved, those of which all did,
    and those with a gradient. None stands for what is outside the layers."""
    seen, inner = [], method.optimizer

    def optimizer_of(model, run):
        optimizer, named, last = inner(model, run), dict(model.named_parameters()), copy_of(model)

        def look(*_):
            still = {layer(n) for n, p in named.items() if torch.equal(p, last[n])}
            moved = {layer(n) for n, p in named.items() if not torch.equal(p, last[n])}
            gradients = {layer(n) for n, p in named.items() if p.grad is not None}
            seen.append({"moved": moved, "wholly": moved - still, "gradients": gradients})
            last.update(copy_of(model))

        optimizer.register_step_post_hook(look)
        return optimizer

    method.optimizer = optimizer_of
    trained, optimizer, _ = fit(method, hp, ROWS, seed, base=model or base())
    return trained, optimizer, seen


def layer(name: str) -> int | None:
    """The number of a parameter's layer; None outside of them."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


@pytest.mark.parametrize("tied", [True, False])
def test_drawn_layers_and_the_rest_move_and_no_other_does(tied):
    """Each step, weight decay included; the same layers through a period, others after it."""
    config = tiny.gemma(num_hidden_layers=DEPTH, layer_types=CONFIG.layer_types, tie_word_embeddings=tied)
    hp = hyperparams(max_steps=12, weight_decay=0.1, **CONSTANT)
    _, _, seen = watched(LISA(layers=2, period=3), hp, model=tiny.model(config))
    assert len(seen) == 12
    for step in seen:
        assert step["moved"] == step["wholly"] == step["gradients"]  # of a frozen layer no gradient arises
        assert None in step["moved"] and len(step["moved"]) == 3
    periods = [[step["moved"] for step in seen[i : i + 3]] for i in range(0, 12, 3)]
    assert all(first == second == third for first, second, third in periods)
    assert len({frozenset(first) for first, *_ in periods}) > 1


@pytest.mark.parametrize("layers", [DEPTH, DEPTH + 5])
def test_with_all_layers_it_is_full_fine_tuning_bit_for_bit(layers):
    hp = hyperparams(max_steps=7, weight_decay=0.1)
    ours, _, _ = fit(LISA(layers=layers, period=2), hp, ROWS, base=base())
    full, _, _ = fit(Full(), hp, ROWS, base=base())
    expected = copy_of(full)
    assert all(torch.equal(value, expected[n]) for n, value in ours.state_dict().items())


@pytest.mark.parametrize("steps", [3, 6, 7])
def test_moments_are_held_for_what_trains_alone(steps):
    """At the end of a period too: the last step draws no more, so that what is measured was in use."""
    method = LISA(layers=2, period=3)
    trained, optimizer, record = fit(method, hyperparams(max_steps=steps), ROWS, base=base())
    layers = trained.model.layers
    one = sizes(layers[0])["parameters"]
    active = sizes(trained)["parameters"] - (DEPTH - 2) * one
    assert optimizer_bytes(optimizer) == 8 * active
    assert record.notes == {"parameters trained at a time": active}
    drawn = [i for i in range(DEPTH) if next(layers[i].parameters()) in optimizer.state]
    assert len(drawn) == 2
    for i, layer in enumerate(layers):
        assert {p.requires_grad for p in layer.parameters()} == {i in drawn}
        assert {p in optimizer.state for p in layer.parameters()} == {i in drawn}


def test_a_layer_drawn_twice_running_keeps_its_moments_and_others_start_anew(monkeypatch):
    """Of six steps, in periods of two: layer 0 trains in all, layer 1 leaves and comes back."""
    draws = iter([[0, 1], [0, 2], [0, 1]])
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(next(draws)))
    _, optimizer, seen = watched(LISA(layers=2, period=2), hyperparams(max_steps=6, **CONSTANT))
    assert [step["moved"] - {None} for step in seen] == [{0, 1}] * 2 + [{0, 2}] * 2 + [{0, 1}] * 2
    parameters = optimizer.param_groups[0]["params"]
    steps = sorted({int(optimizer.state[p]["step"]) for p in parameters if p in optimizer.state})
    assert steps == [2, 6]


def test_a_returned_layer_starts_as_adamw_does(monkeypatch):
    """The first change after coming back is AdamW's first: lr * g / (|g| + eps), in each entry."""
    draws = iter([[0], [1], [0]])
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.tensor(next(draws)))
    hp = hyperparams(max_steps=3)
    method = LISA(layers=1, period=1)
    model, run = tiny.attached(method, base(), ROWS, hp)
    optimizer, weight = method.optimizer(model, run), model.model.layers[0].mlp.down_proj.weight
    for examples in run.batches:
        before = weight.detach().clone()
        method.loss(model, run.collate(examples), run).backward()
        gradient = weight.grad
        optimizer.step()
        optimizer.zero_grad()
    expected = before - hp.learning_rate * gradient / (gradient.abs() + hp.epsilon)
    torch.testing.assert_close(weight.detach(), expected, atol=1e-7, rtol=0)


def choices(seed: int) -> list[frozenset]:
    _, _, seen = watched(LISA(layers=2, period=1), hyperparams(max_steps=8, **CONSTANT), seed)
    return [frozenset(step["moved"]) for step in seen]


def test_the_seed_decides():
    first = choices(0)
    assert first == choices(0)
    assert first != choices(1)


def test_layers_are_drawn_uniformly():
    """600 draws of 2 of 6: each layer 200 times, with a deviation of 11.5."""
    method = LISA(layers=2, period=1)
    model, run = tiny.attached(method, base(), ROWS, hyperparams(max_steps=600), seed=3)
    optimizer = method.optimizer(model, run)
    counts = torch.zeros(DEPTH)
    for _ in range(600):
        drawn = torch.tensor([next(layer.parameters()).requires_grad for layer in model.model.layers])
        assert drawn.sum() == 2
        counts += drawn
        optimizer.step()
    assert torch.all((counts - 200).abs() < 4 * 11.5)


def test_the_global_random_state_is_untouched():
    method = LISA(layers=1, period=1)
    model, run = tiny.attached(method, base(), ROWS, hyperparams(max_steps=4), seed=5)
    before = torch.get_rng_state()
    optimizer = method.optimizer(model, run)
    for _ in range(4):
        optimizer.step()
    assert torch.equal(torch.get_rng_state(), before)


def test_recomputed_activations_give_the_same_gradients():
    def gradients(checkpointing: bool):
        method = LISA()
        model, run = tiny.attached(method, base(), ROWS)
        method.optimizer(model.train(), run)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        method.loss(model, tiny.batch(ROWS[:8]), run).backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for n, gradient in plain.items():
        torch.testing.assert_close(again[n], gradient, atol=1e-6, rtol=1e-5)


def test_the_whole_model_is_saved_and_restored(tmp_path):
    method = LISA()
    trained, _, _ = fit(method, hyperparams(max_steps=2), ROWS, base=base())
    expected = copy_of(trained)
    method.save(trained, tmp_path)
    restored = method.restore(None, tmp_path)
    assert all(torch.equal(value, expected[n]) for n, value in restored.state_dict().items())
    assert method.merge(trained) is trained


def test_options_that_cannot_be_are_refused():
    cls = resolve("lisa", known_methods()["lisa"])
    build(cls, {})
    for wrong in ({"layers": 0}, {"period": 0}, {"layers": 1.5}):
        with pytest.raises(BadRequest):
            build(cls, wrong)
