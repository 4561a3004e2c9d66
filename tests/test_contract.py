"""What holds for every method there is: each file of methods/, two PEFT variants, and a plugin."""

import json
import re
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import fit, hyperparams

from harness.contract import checks
from harness.method import LIMITS, build, card, code_hash, find, known_methods, resolve
from harness.spec import RunSpec
from harness.training.loop import train
from harness.training.model import load_base, optimizer_bytes, sizes
from harness.training.run import Run

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
PERIODS = {"grpo": {"updates": 2}, "peft.adalora": {"init_r": 6, "target_r": 2, "deltaT": 1}}


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
    return sorted({*known_methods(), *VARIANTS, "bitfit"} - {"peft"})


@pytest.fixture(autouse=True)
def reward(monkeypatch):
    """Random rows have no references to earn anything by: here an answer of many different tokens does."""
    monkeypatch.setattr(Run, "reward", lambda self, row, ids: len(set(ids)) / len(ids) + ids[0] / 1000)


@pytest.fixture(params=names())
def cls(request, plugin):
    sources = known_methods([plugin])
    return resolve(request.param, find(request.param, sources))


@pytest.fixture(params=[name for name in names() if name not in UNTOUCHED])
def trained(request, plugin):
    return resolve(request.param, find(request.param, known_methods([plugin])))


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


def test_a_card_says_what_the_report_needs(cls):
    said = card(cls)
    assert said["title"] and said["summary"] and said["formula"]
    assert set(said["why"]) == {"performance", "efficiency", "generalisation"}
    assert said["paper"] or not cls.trains
    assert said["axis"] in ("none", "parameterisation", "optimizer", "objective", "perturbation")
    assert set(said["cannot"]) <= set(LIMITS)
    assert set(said["hybrid"]) <= set(known_methods())
    assert cls.baseline in known_methods()
    assert cls.trains == (cls.name not in UNTOUCHED)
    json.dumps(said)


def test_it_holds_what_every_method_must(trained, folder, plugin, monkeypatch):
    """In the middle of a draw, a period and a pruning: by twos, STOP is in it."""
    if trained.name != "bitfit":  # tests/test_house.py reads the others without torch, all in one process
        monkeypatch.setattr(checks.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    options = {**OPTIONS.get(trained.name, {}), **PERIODS.get(trained.name, {})}
    plugins = [plugin] * (trained.name == "bitfit")
    found = tiny.examine(trained.name, folder, options, ROWS, HP, plugins)
    assert [f"{f.holds}: {f.says}" for f in found if not f.ok] == []


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
    cls = resolve(name, known_methods()[name])
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
    chosen = build(resolve(name, known_methods()[name]), options)
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
