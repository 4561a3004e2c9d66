"""What holds for every method there is: each file of methods/, two PEFT variants, and a plugin."""

import copy
import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import fit, hyperparams, losses, trained_weights

from harness.data.batches import Batches
from harness.method import LIMITS, available, build, card, code_hash, find, resolve
from harness.spec import RunSpec
from harness.training.loop import Loop, train
from harness.training.model import load_base, optimizer_bytes, sizes
from harness.training.run import Run
from harness.training.weights import check, fingerprints

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")
ROWS = tiny.rows(16, seed=1)
HP = hyperparams(max_steps=4, max_new_tokens=6)
UNTOUCHED = ("base", "base_nf4")
VARIANTS = ("peft.vera", "peft.ia3", "peft.adalora")
OPTIONS = {  # the tiny model is 64 wide and trains four steps: what is meant for larger ones is made smaller
    "galore": {"rank": 4, "gap": 2},
    "galore_layerwise": {"rank": 4, "gap": 2},
    "qlora_galore": {"subspace": 4, "gap": 2},
    "apollo": {"rank": 4, "gap": 2},
    "grpo": {"group": 2, "answer_tokens": 6},
    "orpo": {"answer_tokens": 6},
    "qlora_orpo": {"answer_tokens": 6},
    "smt": {"share": 0.2},
    "lisa": {"layers": 1, "period": 2},
    "peft.vera": {"r": 8},
}


@pytest.fixture(scope="module")
def plugin(tmp_path_factory) -> Path:
    """The README's own example of a whole method."""
    path = tmp_path_factory.mktemp("plugin") / "bitfit.py"
    path.write_text(next(code.split("```")[0] for code in README.split("```python\n") if "BitFit" in code))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


def names() -> list[str]:
    return sorted({*available(), *VARIANTS, "bitfit"} - {"peft"})


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    """Random rows have no references to earn anything by: here an answer of many different tokens does."""
    monkeypatch.setattr(Run, "reward", lambda self, row, ids: len(set(ids)) / len(ids) + ids[0] / 1000)


@pytest.fixture(params=names())
def cls(request, plugin):
    sources = available([plugin])
    return resolve(request.param, find(request.param, sources))


@pytest.fixture(params=[name for name in names() if name not in UNTOUCHED])
def trained(request, plugin):
    return resolve(request.param, find(request.param, available([plugin])))


def make(cls, **options):
    return build(cls, {**OPTIONS.get(cls.name, {}), **options})


def base_loader(folder, dtype=torch.float32):
    spec = RunSpec("any", 0, folder.name, {}, HP, locations={"model": str(folder)})
    return lambda **more: load_base(spec, dtype, torch.device("cpu"), **more)


def run(cls, folder, rows=ROWS, hp=HP, seed=0):
    """As a run does: load, attach, train. -> method, base (as loaded), model, optimizer, measured."""
    chosen = make(cls)
    base = chosen.load(base_loader(folder))
    model, optimizer, measured = fit(chosen, chosen.own(hp), rows, seed, base=base)
    return chosen, base, model, optimizer, measured


def attached(chosen, folder):
    return tiny.attached(chosen, chosen.load(base_loader(folder)), ROWS, chosen.own(HP))[0]


def log_probabilities(model) -> torch.Tensor:
    from harness.training.head import token_logps

    with torch.no_grad():
        return token_logps(model.eval(), tiny.batch(ROWS[:4]))


def test_a_card_says_what_the_report_needs(cls):
    said = card(cls)
    assert said["title"] and said["summary"] and said["formula"]
    assert set(said["why"]) == {"performance", "efficiency", "generalisation"}
    assert said["paper"] or not cls.trains
    assert said["axis"] in ("none", "parameterisation", "optimizer", "objective", "perturbation")
    assert set(said["cannot"]) <= set(LIMITS)
    assert set(said["hybrid"]) <= set(available())
    assert cls.baseline in available()
    assert cls.trains == (cls.name not in UNTOUCHED)
    json.dumps(said)


def test_what_is_frozen_stays_bit_identical_and_what_is_trained_moves(trained, folder):
    start, chosen, seen = trained_weights(attached(make(trained), folder)), make(trained), {}
    base = chosen.load(base_loader(folder))

    class Watched(type(chosen)):
        def optimizer(self, model, run):
            seen.update({n: (p, p.detach().clone()) for n, p in model.named_parameters()
                         if not p.requires_grad})  # fmt: skip
            return super().optimizer(model, run)

    chosen.__class__ = Watched
    model, _, measured = fit(chosen, chosen.own(HP), ROWS, base=base)
    # A module may write what it trains into its own weight, as sparse tuning does: see that method's tests.
    own = {n for n, m in model.named_modules() if any(p.requires_grad for p in m.parameters(recurse=False))}
    for name, (parameter, value) in seen.items():
        if name.rpartition(".")[0] not in own:
            assert torch.equal(parameter, value), name
            assert parameter.grad is None, name
    assert sizes(model)["trainable"] > 0
    after = dict(model.named_parameters())
    still = [n for n, value in start.items() if torch.equal(after[n], value)]
    assert len(still) <= len(start) // 2, still  # LISA's layers take turns, all others move
    assert len(still) < len(start)
    # None is taken for one that trained nothing.
    of = [fingerprints({side[n]: side[n].dtype for n in start}) for side in (start, after)]
    check(*of, measured.training)


def test_it_starts_at_its_baseline_or_says_that_it_does_not(trained, folder):
    """Else its gain would be taken from another model than the one that it started from."""
    chosen, baseline = make(trained), resolve(trained.baseline, available()[trained.baseline])()
    untouched = log_probabilities(baseline.load(base_loader(folder)))
    model = attached(chosen, folder)
    difference = (log_probabilities(model) - untouched).abs().max().item()
    assert (difference < 1e-4) == chosen.starts_at_base, difference


def test_weight_decay_reaches_matrices_and_no_norm_length_scale_or_rotation(trained, folder):
    chosen = make(trained)
    model, run = tiny.attached(chosen, chosen.load(base_loader(folder)), ROWS, replace(HP, weight_decay=0.1))
    named = {p: n for n, p in model.named_parameters()}
    groups = chosen.optimizer(model, run).param_groups
    found = {named[p]: group["weight_decay"] for group in groups for p in group["params"]}
    assert found
    for n, decay in found.items():
        spared = re.search(r"norm|lora_magnitude|ia3_l|reft.*(rotation|bias)", n)
        assert decay == (0.0 if spared else 0.1), n


def test_the_same_seed_gives_the_same_curve_and_the_loss_is_finite(trained, folder):
    first, second = (losses(run(trained, folder)[-1]) for _ in range(2))
    assert first == second
    assert len(first) == 4
    assert all(abs(loss) < 100 for loss in first)


def test_with_its_state_it_goes_on_as_if_it_had_not_stopped(trained, folder):
    """To the bit, from the middle of a period, a draw or a pruning, in fresh objects."""
    whole, _ = steps(Loop(*begun(trained, folder)), range(4))
    losses, loop = steps(Loop(*begun(trained, folder)), range(1 if trained.name == "grpo" else 2))
    kept = {name: value for name, value in loop.model.state_dict().items() if value.is_floating_point()}
    states = loop.optimizer.state_dict(), loop.scheduler.state_dict(), loop.run.method.state()
    kept, (optimizer, scheduler, own) = copy.deepcopy((kept, states))
    rng, everywhere = loop.run.rng.get_state(), torch.get_rng_state()
    assert plain(own)
    loop = Loop(*begun(trained, folder))
    with torch.no_grad():
        for name, value in loop.model.state_dict().items():
            if name in kept:
                value.copy_(kept[name])
    loop.optimizer.load_state_dict(optimizer)
    loop.scheduler.load_state_dict(scheduler)
    loop.run.method.restore_state(own, loop.model, loop.run)
    loop.run.rng.set_state(rng)
    torch.set_rng_state(everywhere)
    assert losses + steps(loop, range(len(losses), 4))[0] == whole


def begun(cls, folder):
    options = {"grpo": {"updates": 2}, "peft.adalora": {"init_r": 6, "target_r": 2, "deltaT": 1}}
    chosen = make(cls, **options.get(cls.name, {}))
    return tiny.attached(chosen, chosen.load(base_loader(folder)), ROWS, chosen.own(HP))


def steps(loop: Loop, which: range) -> tuple[list[float], Loop]:
    examples = list(loop.run.batches)
    return [loop.step(examples[i])["loss"].item() for i in which], loop


def plain(value) -> bool:
    """What safetensors and JSON can hold."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    scalar = isinstance(value, torch.Tensor | str | int | float | None)
    return all(map(plain, inside)) if isinstance(value, dict | list | tuple) else scalar


def test_a_method_is_given_the_same_batches_as_any_other(trained, folder):
    chosen, given = make(trained), []

    class Watched(type(chosen)):
        def prepare(self, model, examples, run):
            given.append([example.id for example in examples])
            return super().prepare(model, examples, run)

    chosen.__class__ = Watched
    fit(chosen, chosen.own(HP), ROWS, base=chosen.load(base_loader(folder)))
    planned = [[example.id for example in step] for step in Batches(ROWS, HP, 0)]
    assert given[-len(planned) :] == planned  # a warm-up of its own goes before


def test_what_is_saved_gives_the_same_outputs_again(trained, folder, tmp_path):
    chosen, _, model, _, _ = run(trained, folder)
    expected = log_probabilities(model)
    chosen.save(model, tmp_path)
    assert list(tmp_path.rglob("*.safetensors"))
    assert not [p for p in tmp_path.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]
    restored = make(trained).restore(base_loader(folder), tmp_path)
    torch.testing.assert_close(log_probabilities(restored), expected, atol=1e-5, rtol=0)


def test_in_bf16_the_model_that_is_scored_is_the_one_that_is_kept(trained, folder, tmp_path):
    """To the bit, in likelihoods and greedy answers; and trained in the same arithmetic as all others."""
    load, chosen = base_loader(folder, torch.bfloat16), make(trained)
    with tiny.computing("bf16"):
        model, _, measured = fit(chosen, chosen.own(HP), ROWS, base=chosen.load(load))
        model = chosen.keep(model, SimpleNamespace(load_base=load))
        expected = scored(model)
        chosen.save(model, tmp_path)
        assert scored(make(trained).restore(load, tmp_path)) == expected
    assert measured.arithmetic == {"training": {"residual stream": "bfloat16", "products": "bfloat16"}}


def scored(model) -> list:
    return [tiny.likelihoods(model, ROWS, HP), tiny.decoder(HP).answers(model, ROWS[:6])]


def test_merging_keeps_the_outputs_or_is_refused_with_the_declared_reason(trained, folder):
    from harness.method import Unsupported

    chosen, _, model, _, _ = run(trained, folder)
    expected = log_probabilities(model)
    try:
        merged = chosen.merge(model)
    except Unsupported as refusal:
        assert "merging" in chosen.cannot
        assert str(refusal)
        return
    assert "merging" not in chosen.cannot
    plain = tiny.model()
    assert {n for n, _ in merged.named_parameters()} == {n for n, _ in plain.named_parameters()}
    torch.testing.assert_close(log_probabilities(merged), expected, atol=2e-5, rtol=0)


def linears():
    return [m for n, m in tiny.model().named_modules()
            if isinstance(m, torch.nn.Linear) and "lm_head" not in n]  # fmt: skip


def everything() -> int:
    return sum(p.numel() for p in tiny.model().parameters())


def adapters(rank: int = 8) -> int:
    return sum(rank * (m.in_features + m.out_features) for m in linears())


def rows_of_weights() -> int:
    return sum(m.out_features for m in linears())


TRAINABLE = {  # name -> parameters that train, where it is not an adapter's or everything
    "dora": lambda: adapters() + rows_of_weights(),
    "dora_loftq": lambda: adapters() + rows_of_weights(),
    "peft.ia3": None,
    "peft.vera": None,
}
WHOLE = ("full", "full_8bit", "galore", "galore_layerwise", "apollo", "lisa")
ADAPTERS = (
    "lora",
    "qlora",
    "rslora",
    "lora_plus",
    "pissa",
    "loftq",
    "lora_ggpo",
    "orpo",
    "grpo",
    "qlora_orpo",
)


@pytest.mark.parametrize("name", [*ADAPTERS, "dora", "dora_loftq", *WHOLE])
def test_counts_and_state_follow_closed_formulas(name, folder):
    cls = resolve(name, available()[name])
    _, _, model, optimizer, _ = run(cls, folder)
    expected = TRAINABLE[name]() if name in TRAINABLE else everything() if name in WHOLE else adapters()
    if name != "lisa":  # at any moment LISA trains some layers alone
        assert sizes(model)["trainable"] == expected
    if name not in WHOLE:
        assert optimizer_bytes(optimizer) == 8 * expected  # two moments in fp32
    else:
        assert optimizer_bytes(optimizer) <= 8 * expected
        if name not in ("full", "lisa"):
            assert optimizer_bytes(optimizer) < 8 * expected


def test_the_code_of_a_method_has_a_hash(cls):
    assert len(code_hash(cls)) == 12


# Memory, on a model wide enough that weights and states outweigh activations


def peak_bytes(name: str, folder, options: dict) -> tuple[int, int]:
    """-> weights before the training and the highest bytes of tensors that it held beyond them; bytes of
    the optimizer's state. From the allocator's own events: a process's resident memory has Python in it."""
    chosen = build(resolve(name, available()[name]), options)
    hp = chosen.own(hyperparams(max_steps=2, batch_size=2, micro_batch_size=2))
    model, made = tiny.attached(chosen, chosen.load(base_loader(folder)), tiny.rows(4), hp)
    held = sizes(model)["weight_bytes"]
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        optimizer = train(model, made).optimizer
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    growth = accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return held + max(growth), optimizer_bytes(optimizer)


def test_peak_memory_is_ordered_as_theory_says(tmp_path):
    config = tiny.gemma(hidden_size=512, intermediate_size=2048)
    tiny.model(config).save_pretrained(tmp_path)
    weights = 4 * sum(p.numel() for p in tiny.model(config).parameters())
    options = {"galore": {"rank": 16}, "smt": {"warmup": 1}}
    found = {name: peak_bytes(name, tmp_path, options.get(name, {}))
             for name in ("full", "lora", "qlora", "galore", "smt")}  # fmt: skip
    peak = {name: bytes_ for name, (bytes_, _) in found.items()}
    state = {name: bytes_ for name, (_, bytes_) in found.items()}
    assert peak["full"] > 4 * weights  # weight, gradient and two moments of each
    assert peak["lora"] < 2 * weights
    assert peak["qlora"] < peak["lora"] - weights / 2  # most of its weights have 4 of their 32 bits
    assert state["galore"] < state["full"] / 4
    assert peak["galore"] < peak["full"] - weights
    assert state["smt"] < state["full"] / 50
    assert peak["smt"] < 2 * weights  # no gradient of a whole matrix in it
