"""LoRA's relatives: where each starts, how fast it moves, and that what is saved gives the same outputs."""

import gc
import inspect
import weakref
from functools import partial
from itertools import islice, pairwise
from math import sqrt

import bitsandbytes
import peft
import pytest
import tiny
import torch
from peft.optimizers import create_loraplus_optimizer
from peft.utils import loftq_utils
from tiny import fit, hyperparams, trained_weights
from torch import nn
from transformers import AutoModelForCausalLM, get_scheduler

from harness import ROOT
from harness.method import Unsupported, build, card, known_methods, resolve
from harness.spec import RunSpec
from harness.training.model import load_base, sizes
from harness.training.weights import master_weights
from methods import loftq
from methods.dora import DoRA
from methods.dora_loftq import DoRALoftQ
from methods.eva import EVA, Spread
from methods.loftq import LoftQ
from methods.lora import LoRA, adapted_layers
from methods.lora_plus import LoRAPlus
from methods.pissa import PiSSA
from methods.qlora import QLoRA
from methods.rslora import RsLoRA

ROWS = tiny.rows(22, seed=1)
FAMILY = {"lora": LoRA, "dora": DoRA, "rslora": RsLoRA, "lora_plus": LoRAPlus, "pissa": PiSSA,
          "eva": partial(EVA, rank=2)}  # fmt: skip
FOUR_BIT = {"qlora": QLoRA, "loftq": LoftQ, "dora_loftq": DoRALoftQ}
FAST = hyperparams(max_steps=4, learning_rate=1e-2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


def loader(folder, dtype=torch.float32):
    """`load_base` as a run gives it to a method."""
    spec = RunSpec("any", 0, folder.name, {}, hyperparams(), locations={"model": str(folder)})
    return lambda **more: load_base(spec, dtype, torch.device("cpu"), **more)


def started(method, load):
    """-> a method's own base with the method on it, and the run that it was given."""
    run = tiny.run(ROWS, method=method)
    run.loader = load
    return method.attach(method.load(load), run), run


def logits(model) -> torch.Tensor:
    batch = tiny.batch(ROWS[:4])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def factors(layer) -> tuple[torch.Tensor, torch.Tensor, float]:
    b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
    return b, a, layer.scaling["default"]


def difference(layer) -> torch.Tensor:
    b, a, s = factors(layer)
    return s * b @ a


def equal(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# Each of them


@pytest.mark.parametrize("name", ["rslora", "lora_plus", "pissa", "eva", "loftq", "dora_loftq"])
def test_the_card_is_whole(name):
    cls = resolve(name, known_methods()[name])
    said = card(cls)
    assert all(said[key] for key in ("title", "summary", "formula", "paper"))
    assert said["why"].keys() == {"performance", "efficiency", "generalisation"}


@pytest.mark.parametrize("name", FAMILY)
def test_merged_weights_give_the_same_outputs(name):
    method = FAMILY[name]()
    trained, _, _ = fit(method, FAST, ROWS)
    with trained.disable_adapter():
        untouched = logits(trained)
    before = logits(trained)
    assert (before - untouched).abs().max() > 0.1  # there is something to merge
    merged = method.merge(trained)
    assert type(merged) is type(tiny.model())
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]
    equal(logits(merged), before)


@pytest.mark.parametrize("name", FOUR_BIT)
def test_on_a_four_bit_base_merging_is_refused_with_its_reason(name, folder):
    method = FOUR_BIT[name]()
    with pytest.raises(Unsupported, match="rounded to 4 bits"):
        method.merge(started(method, loader(folder))[0])
    assert "rounded to 4 bits" in method.cannot["merging"]


@pytest.mark.parametrize("name", [*FAMILY, *FOUR_BIT])
def test_what_is_saved_gives_the_same_outputs(name, folder, tmp_path):
    cls = {**FAMILY, **FOUR_BIT}[name]
    method = cls()
    base = method.load(loader(folder))
    trained, _, _ = fit(method, FAST, ROWS, base=base)
    before = logits(trained)
    method.save(trained, tmp_path)
    assert torch.equal(logits(trained), before)  # saving leaves the model as it was
    restored = cls().restore(loader(folder), tmp_path)
    assert not restored.training
    equal(logits(restored), before)


@pytest.mark.parametrize("name", FAMILY)
def test_peft_alone_loads_what_is_saved_on_the_untouched_base(name, folder, tmp_path):
    method = FAMILY[name]()
    trained, _, _ = fit(method, FAST, ROWS)
    method.save(trained, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), logits(trained))


@pytest.mark.parametrize("name", [*FAMILY, *FOUR_BIT])
def test_bf16_bases_start_learn_and_come_back(name, folder, tmp_path):
    """As on a GPU: frozen weights in bf16, adapters in fp32, autocast."""
    cls = {**FAMILY, **FOUR_BIT}[name]
    method = cls()
    model, run = started(method, loader(folder, torch.bfloat16))
    run.hp = FAST
    master_weights(model, "bf16")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    optimizer = method.optimizer(model, run)

    def computed(model):
        with torch.autocast("cpu", torch.bfloat16):
            return logits(model).float()

    untouched = computed(method.load(loader(folder, torch.bfloat16)))
    start = computed(model)
    for examples in islice(run.batches, 2):
        with torch.autocast("cpu", torch.bfloat16):
            loss = method.loss(model.train(), run.collate(examples), run)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    before = computed(model)
    method.save(model, tmp_path)
    after = computed(cls().restore(loader(folder, torch.bfloat16), tmp_path))
    noise = 0.02 * untouched.std()  # of bf16 through the layers
    assert (after - before).std() <= (noise if name == "pissa" else 0) < (before - start).std() / 5
    if "loftq" not in name:
        assert (start - untouched).std() < noise


@pytest.mark.parametrize("name", ["rslora", "lora_plus", "eva"])
def test_these_start_at_the_base_exactly(name, folder):
    model, _ = started(FAMILY[name](), loader(folder))
    assert torch.equal(logits(model), logits(tiny.model()))


def test_options_that_cannot_be_are_refused():
    for cls, options in ((LoftQ, {"iterations": 0}), (LoRAPlus, {"ratio": 0.0}), (EVA, {"rho": 0.5})):
        with pytest.raises(ValueError, match=next(iter(options))):
            build(cls, options)
        with pytest.raises(ValueError, match="rank"):
            build(cls, {"rank": 0})


@pytest.mark.parametrize("cls", [LoftQ, PiSSA])
def test_a_rank_above_a_layers_size_is_refused_by_name(cls, folder):
    with pytest.raises(ValueError, match=r"k_proj has only 32 singular vectors, not 33"):
        started(cls(rank=33), loader(folder))
    started(cls(rank=32), loader(folder))


# LoftQ


def four_bit_layer(weight, rank, alpha, double=True):
    """PEFT's layer on bitsandbytes' layer, as a 4-bit model has it."""
    base = bitsandbytes.nn.Linear4bit(
        weight.shape[1], weight.shape[0], bias=False, compress_statistics=double, quant_type="nf4"
    )
    base.weight = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=double, quant_type="nf4", module=base
    )
    base.to("cpu")
    wrapped = nn.Sequential(base)
    wrapped.config = {}
    config = LoRA(rank=rank, alpha=alpha, targets="0").config()
    config.task_type = None
    return peft.get_peft_model(wrapped, config).base_model.model[0]


def gaussian(out=512, into=1024):
    return torch.randn(out, into, generator=torch.Generator().manual_seed(0))


def quantised(layer) -> torch.Tensor:
    weight = layer.base_layer.weight
    return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)


def ratio(layer, weight) -> float:
    """Error of the start over that of plain NF4."""
    plain = weight - quantised(four_bit_layer(weight, 1, 1))
    return ((weight - quantised(layer) - difference(layer)).norm() / plain.norm()).item()


def loftq_layer(weight, rank, alpha, iterations):
    layer = four_bit_layer(weight, rank, alpha)
    with torch.no_grad():
        LoftQ(rank=rank, alpha=alpha, iterations=iterations).start([layer], [weight])
    return layer


@pytest.mark.parametrize(("rank", "one", "five"), [(8, 0.978, 0.927), (16, 0.957, 0.882), (64, 0.841, 0.722)])
def test_the_error_on_gaussian_weights_is_that_of_the_alternation(rank, one, five):
    """Measured with a plain script of SVDs before this was written."""
    weight = gaussian()
    assert ratio(loftq_layer(weight, rank, rank, 1), weight) == pytest.approx(one, abs=0.005)
    assert ratio(loftq_layer(weight, rank, 2.0 * rank, 5), weight) == pytest.approx(five, abs=0.005)


@pytest.mark.parametrize("shape", [(256, 128), (128, 256)])
def test_every_iteration_comes_nearer(shape):
    weight = gaussian(*shape)
    errors = [1.0] + [ratio(loftq_layer(weight, 8, 16, n), weight) for n in range(1, 6)]
    assert all(after < before for before, after in pairwise(errors))


@pytest.mark.parametrize("alpha", [2.0, 8.0, 32.0])
def test_the_scaling_is_part_of_the_fit(alpha):
    """As PEFT leaves it out, its start is farther from the weight than no adapter at all."""
    weight = gaussian(256, 128)
    layer = loftq_layer(weight, 8, alpha, 5)
    assert ratio(layer, weight) < 0.9
    if alpha == 8:
        return
    for part in (layer.lora_A, layer.lora_B):
        part["default"].weight.data *= layer.scaling["default"] ** 0.5
    assert ratio(layer, weight) > 0.9


@pytest.mark.parametrize("shape", [(64, 128), (192, 64)])
def test_at_full_rank_no_error_is_left(shape):
    weight = gaussian(*shape)
    layer = loftq_layer(weight, 64, 16, 1)
    assert (weight - quantised(layer) - difference(layer)).norm() / weight.norm() < 1e-6


def test_the_start_is_pefts_where_pefts_is_right(monkeypatch):
    """alpha = rank, scales not quantised again. PEFT's function names a GPU: here it is given this device."""
    source = inspect.getsource(loftq_utils.loftq_init).replace('"cuda"', '"cpu"')
    exec(source, vars(loftq_utils), theirs := {})
    weight = gaussian(128, 256)
    for iterations in (1, 5):
        q, a, b = theirs["loftq_init"](weight.clone(), 4, 8, iterations)
        layer = four_bit_layer(weight, 8, 8, double=False)
        with torch.no_grad():
            LoftQ(rank=8, alpha=8, iterations=iterations).start([layer], [weight])
        equal(difference(layer), b @ a, 1e-3)
        same = (quantised(layer) - q).abs() < 1e-4  # a weight between two codes may go either way
        assert same.float().mean() > 0.999
        ours, other = weight - quantised(layer) - difference(layer), weight - q - b @ a
        assert ours.norm().item() == pytest.approx(other.norm().item(), rel=1e-4)


@pytest.mark.parametrize("shape", [(96, 40), (40, 96), (48, 48)])
def test_the_truncation_is_the_svds_and_balanced(shape):
    matrix = gaussian(*shape)
    [(left, right), (none, nothing)] = loftq.truncate([matrix, torch.zeros(shape)], 5)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    equal((left @ right).double(), u[:, :5] * s[:5] @ v[:5])
    equal(left.T @ left, torch.diag(s[:5]).float(), 1e-4)
    equal(right @ right.T, torch.diag(s[:5]).float(), 1e-4)
    assert not (none @ nothing).any()


@pytest.mark.parametrize("shape", [(320, 200), (200, 320)])
def test_the_truncation_of_large_matrices_is_nearly_the_svds(shape):
    """Of noise, where singular values are nearest to each other, and of what trained weights are more like.
    The error is no larger than that of the randomised SVD that PiSSA's authors recommend."""
    noise = gaussian(*shape)
    u, _, vh = torch.linalg.svd(noise, full_matrices=False)
    weight = u / torch.arange(1, 201) ** 0.5 @ vh
    for matrix, factors, most in zip(
        (noise, weight), loftq.truncate([noise, weight], 8), (5e-4, 1e-6), strict=True
    ):
        least = torch.linalg.svdvals(matrix.double())[8:].norm()
        error = (matrix.double() - factors[0].double() @ factors[1].double()).norm()
        u, s, v = torch.svd_lowrank(matrix, 8, niter=4)
        assert 1 - 1e-6 < error / least < 1 + most
        assert error < (matrix - u * s @ v.T).norm()
        equal(factors[0].norm(dim=0), factors[1].norm(dim=1), 1e-4)


@pytest.mark.parametrize("cls", [LoftQ, DoRALoftQ])
@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_the_started_model_computes_with_q_plus_the_difference(cls, alpha, folder):
    model, _ = started(cls(alpha=alpha), loader(folder))
    plain = tiny.model()
    errors = torch.zeros(3)
    for name, layer in adapted_layers(model).items():
        weight = plain.get_submodule(name).weight
        start = quantised(layer) + difference(layer)
        base = four_bit_layer(weight.detach(), 1, 1)
        errors += torch.stack([x.norm() ** 2 for x in (weight - quantised(base), weight - start, weight)])
        weight.data = start
    assert len(adapted_layers(model)) == 14
    equal(logits(model), logits(plain), 5e-5)


def test_loftq_starts_nearer_to_the_model_than_its_four_bit_base():
    """In the logits of a trained model: the distance is what its own base row is there to show."""
    demo = ROOT / "demo" / "model"
    ids = torch.randint(5, 1000, (4, 64), generator=torch.Generator().manual_seed(0))

    def outputs(method):
        load = loader(demo)
        with torch.no_grad():
            model = started(method, load)[0] if method else load()
            return model.eval()(input_ids=ids).logits

    whole = outputs(None)
    near, far = ((outputs(m) - whole).square().mean().sqrt() for m in (LoftQ(rank=16), QLoRA(rank=16)))
    assert near < 0.9 * far


@pytest.mark.parametrize("cls", [LoftQ, DoRALoftQ])
def test_the_notes_are_the_errors_over_all_layers_together(cls, folder):
    method = cls(rank=4)
    plain, four_bit = tiny.model(), method.load(loader(folder))
    before = {n: bitsandbytes.functional.dequantize_4bit(m.weight.data, m.weight.quant_state)
              for n, m in four_bit.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}  # fmt: skip
    model, run = tiny.attached(method, four_bit)
    layers = adapted_layers(model)
    weights = {n: plain.get_submodule(n).weight.detach() for n in layers}

    def norm(tensors):
        return torch.cat([t.flatten() for t in tensors]).norm()

    whole = norm(weights.values())
    plain_error = norm(weights[n] - before[n] for n in layers) / whole
    start_error = norm(weights[n] - quantised(m) - difference(m) for n, m in layers.items()) / whole
    found = list(run.record.notes.values())
    assert found == pytest.approx([plain_error.item(), start_error.item()], rel=1e-4)
    assert found[1] < found[0] == pytest.approx(0.092, abs=0.002)  # of NF4 on normal weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loftq_holds_as_many_bytes_as_qlora(dtype, folder):
    models = [started(cls(), loader(folder, dtype))[0] for cls in (QLoRA, LoftQ)]
    found = [sizes(model) for model in models]
    held = [f.pop("weight_bytes") for f in found]  # with a few digits of text: the mean of the scales
    assert found[0] == found[1] and abs(held[0] - held[1]) < 2 * 14
    for layer in adapted_layers(models[1]).values():  # one state, not an old one beside it
        assert layer.base_layer.quant_state is layer.base_layer.weight.quant_state
        assert layer.base_layer.quant_state.dtype == dtype  # what it dequantises to
    states = [
        [vars(m.weight)["quant_state"].as_dict(packed=True) for m in model.modules()
         if isinstance(m, bitsandbytes.nn.Linear4bit)] for model in models
    ]  # fmt: skip
    for ours, theirs in zip(*states, strict=True):
        assert {k: (v.shape, v.dtype) for k, v in ours.items() if "quant_state" not in k} == {
            k: (v.shape, v.dtype) for k, v in theirs.items() if "quant_state" not in k
        }


def test_each_original_is_freed_as_soon_as_it_is_used(folder, monkeypatch):
    seen, alive = [], []
    monkeypatch.setattr(loftq, "TOGETHER", 1)  # one at a time

    def load(**more):
        model = loader(folder)(**more)
        if not more:
            seen.extend(weakref.ref(m.weight) for n, m in model.named_modules()
                        if isinstance(m, nn.Linear) and n != "lm_head")  # fmt: skip
        return model

    def start(self, layers, weights, original=LoftQ.start):
        alive.append(sum(ref() is not None for ref in seen))
        return original(self, layers, weights)

    monkeypatch.setattr(LoftQ, "start", start)
    model, _ = started(LoftQ(), load)
    assert alive == list(range(13, -1, -1))
    gc.collect()
    assert not any(ref() is not None for ref in seen) and model is not None


def test_transformers_and_peft_alone_load_a_saved_loftq(folder, tmp_path):
    method = LoftQ()
    base = method.load(loader(folder))
    trained, _, _ = fit(method, FAST, ROWS, base=base)
    before = logits(trained)
    method.save(trained, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    equal(logits(peft.PeftModel.from_pretrained(base, tmp_path)), before)
    assert not torch.allclose(logits(QLoRA().restore(loader(folder), tmp_path)), before, atol=1e-2)


def test_only_the_layers_named_are_changed(folder):
    model, _ = started(LoftQ(targets="q_proj,v_proj"), loader(folder))
    plain = QLoRA().load(loader(folder))
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            name = name.removesuffix(".base_layer")
            same = torch.equal(layer.weight.data, plain.get_submodule(name).weight.data)
            assert same != name.endswith(("q_proj", "v_proj")), name


def test_the_lengths_of_dora_are_those_of_the_new_rows(folder):
    layers, old = (adapted_layers(started(cls(), loader(folder))[0]) for cls in (DoRALoftQ, LoftQ))
    for name, layer in layers.items():
        m = layer.lora_magnitude_vector["default"].weight
        assert m.requires_grad and m.dtype == torch.float32
        equal(m.detach(), (quantised(layer) + difference(layer)).norm(dim=1))
        assert torch.equal(quantised(layer), quantised(old[name]))


def test_dora_loftq_trains_its_three_parts(folder):
    method = DoRALoftQ()
    before = trained_weights(started(method, loader(folder))[0])
    trained, _, _ = fit(method, FAST, ROWS, base=method.load(loader(folder)))
    after = trained_weights(trained)
    kinds = {n.split(".")[-3 if n.endswith(".weight") else -2] for n in after}
    assert {"lora_A", "lora_B", "lora_magnitude_vector"} <= kinds
    assert [n for n in before if torch.equal(before[n], after[n])] == []


# LoRA


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_a_layer_adds_alpha_over_rank_times_its_product(alpha):
    layer = next(iter(adapted_layers(tiny.attached(LoRA(rank=4, alpha=alpha))[0]).values()))
    nn.init.normal_(layer.lora_B["default"].weight)
    b, a, _ = factors(layer)
    x = torch.randn(5, layer.in_features)
    equal(layer(x) - layer.base_layer(x), alpha / 4 * x @ a.T @ b.T, 1e-4)


def test_dropout_leaves_out_its_share_of_the_adapters_inputs_and_only_in_training():
    model, _ = tiny.attached(LoRA(rank=64, alpha=64, dropout=0.25, targets="q_proj"))
    layer = next(iter(adapted_layers(model).values()))
    for factor in (layer.lora_A, layer.lora_B):  # of 64 x 64: the adapter adds what it is given
        factor["default"].weight.data = torch.eye(64)
    x = torch.ones(500, 64)
    added = layer.train()(x) - layer.base_layer(x)
    assert (added.abs() < 1e-4).float().mean().item() == pytest.approx(0.25, abs=0.02)
    equal(added[added.abs() > 1e-4], torch.tensor(1 / 0.75).expand(int((added.abs() > 1e-4).sum())), 1e-4)
    equal(layer.eval()(x) - layer.base_layer(x), x, 1e-4)


# rsLoRA


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rslora_divides_by_the_root_of_the_rank(rank):
    model, _ = tiny.attached(RsLoRA(rank=rank, alpha=8))
    assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {8 / sqrt(rank)}


# LoRA+


def test_with_the_ratio_one_lora_plus_is_lora_to_the_bit():
    hp = hyperparams(max_steps=4, learning_rate=1e-2, weight_decay=0.1)
    ours, theirs = (trained_weights(fit(m, hp, ROWS)[0]) for m in (LoRAPlus(ratio=1), LoRA()))
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if not torch.equal(ours[n], theirs[n])] == []


def test_the_learning_rates_are_those_of_pefts_lora_plus():
    model, run = tiny.attached(LoRAPlus(), hp=hyperparams(learning_rate=1e-3, weight_decay=0.1))

    def rates(optimizer):
        return {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}

    ours = LoRAPlus(ratio=16).optimizer(model, run)
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    assert rates(ours) == rates(theirs)
    assert set(rates(ours)) == {p for p in model.parameters() if p.requires_grad}
    assert ours.param_groups[0]["lr"] == 1e-3  # the one that a run reports
    assert {group["weight_decay"] for group in ours.param_groups} == {0.1}


def test_the_rate_that_a_run_reports_is_that_of_a():
    """B's is `ratio` times as large, and would stand in the report as the shared hyperparameter."""
    hp = hyperparams(max_steps=6, learning_rate=1e-3, schedule="linear", warmup_ratio=0.34)
    record = fit(LoRAPlus(ratio=16), hp, ROWS)[2]
    expected = [1e-3 * factor for factor in (0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3)]
    assert [step["learning_rate"] for step in record.training] == pytest.approx(expected)


def test_the_schedule_acts_on_both_learning_rates():
    model, run = tiny.attached(LoRAPlus(), hp=hyperparams(learning_rate=1e-3))
    optimizer = LoRAPlus(ratio=4).optimizer(model, run)
    scheduler = get_scheduler("linear", optimizer, 2, 6)
    seen = []
    for _ in range(7):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        optimizer.step()
        scheduler.step()
    factors = [0, 0.5, 1, 0.75, 0.5, 0.25, 0]
    assert [a for a, _ in seen] == pytest.approx([1e-3 * f for f in factors])
    assert [b for _, b in seen] == pytest.approx([4e-3 * f for f in factors])


# PiSSA


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_pissa_starts_at_the_truncated_svd_and_freezes_the_rest(alpha):
    plain = tiny.model()
    model, _ = tiny.attached(PiSSA(rank=4, alpha=alpha))
    for name, layer in adapted_layers(model).items():
        weight = plain.get_submodule(name).weight.detach()
        u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
        top = (u[:, :4] * s[:4] @ v[:4]).float()
        equal(difference(layer), top)
        equal(layer.base_layer.weight.detach(), weight - top)
        assert not layer.base_layer.weight.requires_grad
    equal(logits(model), logits(plain))


def test_pissa_is_saved_as_a_plain_lora_of_twice_the_rank(folder, tmp_path):
    """An adapter marked pissa would make PEFT do the SVD again as it loads, which fails on a model that is
    loaded without memory (low_cpu_mem_usage)."""
    method = PiSSA(rank=4)
    trained, _, _ = fit(method, FAST, ROWS)
    method.save(trained, tmp_path)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.init_lora_weights, config.r, config.lora_alpha / config.r) == (True, 8, 4.0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    equal(logits(peft.PeftModel.from_pretrained(base, tmp_path, low_cpu_mem_usage=True)), logits(trained))


# EVA


def eva_inputs(method, hp) -> dict[str, torch.Tensor]:
    """What each linear layer is given, (tokens, in), over the batches that EVA is given."""
    model, seen = tiny.model(), {}

    def keep(name, mask):
        return lambda module, args: seen.setdefault(name, []).append(args[0][mask].detach())

    for inputs in method.inputs(tiny.run(ROWS, hp)):
        mask = inputs["attention_mask"].bool()
        handles = [m.register_forward_pre_hook(keep(n, mask)) for n, m in model.named_modules()
                   if isinstance(m, nn.Linear) and n != "lm_head"]  # fmt: skip
        with torch.no_grad():
            model(**inputs)
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("rho", [1.0, 2.0])
def test_a_spans_the_main_directions_of_the_layers_inputs(rho):
    hp = hyperparams(epochs=1.0, micro_batch_size=4)
    method = EVA(rank=4, rho=rho)
    layers = adapted_layers(tiny.attached(method, examples=ROWS, hp=hp)[0])
    inputs = eva_inputs(method, hp)
    assert layers.keys() <= inputs.keys()
    for name, layer in layers.items():
        a = factors(layer)[1].double()
        x = inputs[name].double() - inputs[name].double().mean(0)
        _, s, v = torch.linalg.svd(x, full_matrices=False)
        rank = len(a)
        assert rank == layer.r["default"] <= 4 * rho
        equal(a @ a.T, torch.eye(rank).double(), 1e-4)
        # What the rows of A keep of the inputs' variance, beside what the best directions keep.
        assert (x @ a.T).norm() ** 2 > 0.99 * (s[:rank] ** 2).sum(), name
        assert torch.linalg.svdvals(a @ v[:rank].T)[0] > 0.999  # the strongest direction is among them
        random = torch.linalg.qr(torch.randn(x.shape[1], rank).double())[0]
        assert (x @ random).norm() ** 2 < 0.7 * (s[:rank] ** 2).sum(), name  # the bound above says something


def test_an_incremental_pca_is_that_of_all_vectors_at_once():
    """Uneven batches, padded, of a mean far from 0 and of variances from 1 down to 1e-6."""
    draw = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(96, 96, generator=draw))[0]
    vectors = torch.randn(900, 96, generator=draw) * torch.arange(1, 97) ** -1.5 @ turn + 3
    spread = Spread(96, 24, "cpu")
    for part in vectors.split([100, 500, 7, 293]):
        padded = torch.cat([part, torch.full((5, 96), 1e3)])
        spread.add(padded, torch.arange(len(padded)) < len(part))
    centred = vectors.double() - vectors.double().mean(0)
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    found, shares = spread.directions(8)
    equal(spread.mean, vectors.double().mean(0), 1e-6)
    equal((found.double() * vh[:8]).sum(1).abs(), torch.ones(8).double(), 1e-4)
    torch.testing.assert_close(shares.double(), (s**2 / (s**2).sum())[:8], rtol=1e-4, atol=0)


def test_evas_start_is_near_pefts():
    """Whose PCA keeps fewer directions between batches and ends when none turns by more than 8 degrees."""
    hp, method = hyperparams(epochs=1.0), EVA(rank=4)
    model, run = tiny.attached(LoRA(rank=4), examples=ROWS, hp=hp)
    batches = method.inputs(run)
    ours = method.start(model, batches)
    theirs = peft.get_eva_state_dict(
        model,
        batches,
        method.config(),
        forward_fn=lambda model, inputs: model(**inputs),
        show_progress_bar=False,
    )
    layers = eva_inputs(method, hp)
    assert ours.keys() == theirs.keys() and sum(map(len, ours.values())) == sum(map(len, theirs.values()))
    for name, a in ours.items():
        assert abs(len(a) - len(theirs[name])) <= 1, name
        x = layers[name.removeprefix("base_model.model.")]
        x, rank = (x - x.mean(0)).double(), min(len(a), len(theirs[name]))
        kept, other = ((x @ rows[:rank].double().T).square().sum() for rows in (a, theirs[name]))
        assert 0.999 < kept / other < 1.1, name


def test_layers_with_the_same_inputs_start_alike_and_are_computed_once(monkeypatch):
    added = []
    monkeypatch.setattr(
        Spread, "add", lambda self, *args, add=Spread.add: added.append(self) or add(self, *args)
    )
    model, run = tiny.attached(EVA(rank=4, rho=1.0), examples=ROWS)
    batches = len(EVA(rank=4).inputs(run))
    assert len(set(added)) == 2 * 4 and len(added) == 2 * 4 * batches  # of 2 layers: qkv, o, gate up, down
    for layer in model.get_base_model().model.layers:
        q, k, v = (factors(getattr(layer.self_attn, f"{name}_proj"))[1] for name in "qkv")
        assert torch.equal(q, k) and torch.equal(q, v)
        assert torch.equal(factors(layer.mlp.gate_proj)[1], factors(layer.mlp.up_proj)[1])


def test_eva_gives_ranks_away_and_keeps_their_sum_and_scaling():
    for rho in (1.0, 2.0):
        model, run = tiny.attached(EVA(rank=4, alpha=8, rho=rho), examples=ROWS)
        ranks = {name: layer.r["default"] for name, layer in adapted_layers(model).items()}
        assert sum(ranks.values()) == 4 * 14
        assert (set(ranks.values()) == {4}) == (rho == 1)
        assert {layer.scaling["default"] for layer in adapted_layers(model).values()} == {2.0}
        assert list(run.record.notes.values()) == [
            f"{len(ranks)}: {min(ranks.values())} to {max(ranks.values())}"
        ]


def test_eva_does_not_see_padding():
    def start(pad):
        model, run = tiny.model(), tiny.run(ROWS)
        run.pad = pad
        torch.manual_seed(0)
        return trained_weights(EVA(rank=4).attach(model, run))

    plain, other = start(tiny.PAD), start(77)
    assert plain.keys() == other.keys()
    for name, value in plain.items():
        equal(value.abs(), other[name].abs(), 1e-4)


def test_eva_goes_through_training_rows_alone_and_not_through_all(monkeypatch):
    run = tiny.run(ROWS, hyperparams(epochs=20.0, batch_size=4, micro_batch_size=2))
    monkeypatch.setattr("methods.eva.TOKENS", 200)
    inputs = EVA(rank=1).inputs(run)
    assert {tuple(i) for i in inputs} == {("input_ids", "attention_mask")}
    rows = {(*row.prompt_ids, *row.response_ids) for row in ROWS}
    lengths = [int(one["attention_mask"].sum()) for one in inputs]
    assert sum(lengths[:-1]) < 200 <= sum(lengths)
    for one in inputs:
        assert len(one["input_ids"]) == 2
        for ids, mask in zip(one["input_ids"], one["attention_mask"], strict=True):
            assert tuple(ids[mask.bool()].tolist()) in rows


def test_eva_refuses_less_data_than_directions():
    with pytest.raises(Unsupported, match="EVA needs 1024 tokens of training data, not"):
        tiny.attached(EVA(rank=256), examples=ROWS[:4])
