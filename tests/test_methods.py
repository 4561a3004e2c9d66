"""Each method through its hooks: sizes by formulas and published numbers, and what it may not touch."""

import bitsandbytes
import peft
import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from tiny import GEMMA_3_1B, LLAMA_32_1B, fit, hyperparams, losses, trained_weights
from torch import nn
from transformers import AutoModelForCausalLM

from harness.errors import BadRequest
from harness.method import Unsupported, adam, build, known_methods, options, resolve
from harness.spec import RunSpec
from harness.training import head
from harness.training.model import load_base, optimizer_bytes, sizes
from methods import galore
from methods.dora import DoRA
from methods.full import Full
from methods.galore import GaLore
from methods.lora import LoRA
from methods.qlora import QLoRA

ROWS = tiny.rows(22, seed=1)
ADAPTERS = {"lora": LoRA, "dora": DoRA, "qlora": QLoRA}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model on disk, as a user's own folder."""
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


def loaded(method, folder):
    """The base as a run loads it: through the method's own hook."""
    spec = RunSpec("any", 0, folder.name, {}, hyperparams(), locations={"model": str(folder)})
    device = torch.device("cpu")
    return method.load(lambda **more: load_base(spec, torch.float32, device, **more))


def linears(model) -> dict[str, nn.Linear]:
    """The linear layers of the decoder: all but the head."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n}


def logits(model, count: int = 4) -> torch.Tensor:
    batch = tiny.batch(ROWS[:count])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


# Sizes: closed formulas


def shapes() -> list[tuple[int, int]]:
    return [(m.out_features, m.in_features) for m in linears(tiny.model()).values()]


def test_there_are_fourteen_linear_layers_in_the_tiny_model():
    """q k v o gate up down, twice: what the formulas below are summed over."""
    assert sorted(shapes()) == sorted(
        2 * [(64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128)]
    )


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_trains_as_many_parameters_as_its_formula_says(name, rank, folder):
    method = ADAPTERS[name](rank=rank)
    base = loaded(method, folder)
    whole = sizes(base)["parameters"]
    trained, optimizer, _ = fit(method, hyperparams(max_steps=1), ROWS, base=base)
    expected = sum(rank * (out + into) for out, into in shapes())
    if name == "dora":
        expected += sum(out for out, _ in shapes())
    found = sizes(trained)
    assert found["trainable"] == expected
    assert found["trainable_bytes"] == 4 * expected
    assert found["parameters"] == whole + expected
    assert optimizer_bytes(optimizer) == 8 * expected  # two moments in fp32
    assert whole == sum(p.numel() for p in tiny.model().parameters())  # in 4 bits too: values, not bytes


def test_full_trains_everything():
    trained, optimizer, _ = fit(Full(), hyperparams(max_steps=1), ROWS)
    everything = sum(p.numel() for p in tiny.model().parameters())
    assert sizes(trained) == {
        "parameters": everything,
        "trainable": everything,
        "weight_bytes": 4 * everything,
        "trainable_bytes": 4 * everything,
    }
    assert optimizer_bytes(optimizer) == 8 * everything


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rank", [4, 128])
def test_galore_holds_as_much_state_as_its_formula_says(rank, tied):
    base = tiny.model(tiny.gemma(tie_word_embeddings=tied))
    everything = sum(p.numel() for p in base.parameters())
    trained, optimizer, _ = fit(GaLore(rank=rank), hyperparams(max_steps=1), ROWS, base=base)
    projected, inside = 0, 0
    for m, n in shapes():
        r = min(rank, m, n)
        projected += 2 * r * max(m, n) + r * min(m, n)
        inside += m * n
    assert sizes(trained)["trainable"] == everything
    assert optimizer_bytes(optimizer) == 4 * projected + 8 * (everything - inside)


def test_an_untouched_base_trains_nothing():
    base = resolve("base", known_methods()["base"])
    assert not base.trains
    assert sizes(tiny.model().requires_grad_(False))["trainable"] == 0


# Sizes: published models, on the meta device

ATTENTION = "q_proj,k_proj,v_proj,o_proj"


def on_meta(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(("config", "count"), [(GEMMA_3_1B, 999_885_952), (LLAMA_32_1B, 1_235_814_400)])
def test_the_published_architectures_are_built_right(config, count):
    assert sizes(on_meta(config))["parameters"] == count


@pytest.mark.parametrize(
    ("method", "config", "count"),
    [
        (LoRA(targets=ATTENTION), LLAMA_32_1B, 1_703_936),
        (LoRA(targets="q_proj,v_proj"), LLAMA_32_1B, 851_968),
        (LoRA(), LLAMA_32_1B, 5_636_096),
        (LoRA(targets=ATTENTION), GEMMA_3_1B, 1_490_944),
        (LoRA(targets="q_proj,v_proj"), GEMMA_3_1B, 745_472),
        (LoRA(), GEMMA_3_1B, 6_522_880),
        (LoRA(rank=16), GEMMA_3_1B, 13_045_760),
        (DoRA(targets=ATTENTION), LLAMA_32_1B, 1_785_856),
        (DoRA(targets=ATTENTION), GEMMA_3_1B, 1_560_832),
        (DoRA(), GEMMA_3_1B, 6_982_144),
    ],
    ids=lambda value: f"{value}" if isinstance(value, LoRA) else getattr(value, "model_type", ""),
)
def test_published_trainable_counts(method, config, count):
    assert sizes(method.attach(on_meta(config), tiny.run()))["trainable"] == count


def test_galores_published_state_of_gemma():
    """168.7 M moments, 20.0 M of projectors, and full moments of embeddings and norms: 2.95 GiB."""
    model = on_meta(GEMMA_3_1B).requires_grad_(True)
    groups = GaLore().optimizer(model, tiny.run()).param_groups
    projected = [p for g in groups if "rank" in g for p in g["params"]]
    whole = sum(p.numel() for g in groups if "rank" not in g for p in g["params"])
    assert sum(p.numel() for p in projected) == 697_761_792
    moments = sum(2 * 128 * max(p.shape) for p in projected)
    bases = sum(128 * min(p.shape) for p in projected)
    assert moments / 1e6 == pytest.approx(168.7, abs=0.05)
    assert bases / 1e6 == pytest.approx(20.0, abs=0.05)
    assert (4 * (moments + bases) + 8 * whole) / 2**30 == pytest.approx(2.95, abs=0.005)


# What a method starts from, what it moves, what it may not move


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_at_its_base_exactly(name, folder):
    method = ADAPTERS[name]()
    base = loaded(method, folder)
    before = logits(base)
    after = logits(method.attach(base, tiny.run()))
    # DoRA divides by a norm and multiplies by the same: equal but for rounding.
    torch.testing.assert_close(after, before, atol=2e-5 if name == "dora" else 0.0, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_frozen_weights_stay_bit_identical_and_all_trained_ones_move(name, folder):
    method = ADAPTERS[name]()
    before = trained_weights(tiny.attached(method, loaded(method, folder))[0])
    base = loaded(method, folder)
    frozen = {n: (p, p.detach().clone()) for n, p in base.named_parameters()}  # names change, weights do not
    trained, _, _ = fit(method, hyperparams(max_steps=4), ROWS, base=base)
    for n, (p, value) in frozen.items():
        assert torch.equal(p, value), n
        assert p.grad is None
    assert sum(p.numel() for p in trained.parameters() if not p.requires_grad) == sum(
        p.numel() for p, _ in frozen.values()
    )
    after = trained_weights(trained)
    assert before.keys() == after.keys()
    assert [n for n in before if torch.equal(before[n], after[n])] == []


@pytest.mark.parametrize("method", [Full(), GaLore(rank=4)], ids=["full", "galore"])
def test_every_weight_moves_where_nothing_is_frozen(method):
    before = trained_weights(tiny.model())
    trained, _, _ = fit(method, hyperparams(max_steps=3), ROWS)
    after = trained_weights(trained)
    assert before.keys() == after.keys()
    assert [n for n in before if torch.equal(before[n], after[n])] == []


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_learns_and_can_be_taken_off(name, folder):
    method = ADAPTERS[name]()
    base = loaded(method, folder)
    before = logits(base)
    hp = hyperparams(epochs=12.0, learning_rate=1e-2)
    trained, _, record = fit(method, hp, ROWS, base=base)
    assert losses(record)[-1] < losses(record)[0] - 1
    assert not torch.allclose(logits(trained), before, atol=0.1)
    with trained.disable_adapter():
        assert torch.equal(logits(trained), before)


def test_the_low_rank_difference_has_its_rank_and_merges():
    trained, _, _ = fit(LoRA(rank=3), hyperparams(epochs=4.0), ROWS)
    layer = trained.get_base_model().model.layers[0].mlp.down_proj
    difference = layer.get_delta_weight("default")
    assert torch.linalg.matrix_rank(difference) == 3
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(difference, 16 / 3 * b @ a)  # alpha / rank
    before = logits(trained)
    torch.testing.assert_close(logits(trained.merge_and_unload()), before, atol=2e-4, rtol=0)


def test_dora_is_its_formula():
    """m (W + s B A) / ||W + s B A||, its norm per row and out of the gradient's graph."""
    torch.manual_seed(0)
    wrapped = nn.Sequential(nn.Linear(24, 16))
    wrapped.config = {}
    config = DoRA(rank=4, targets="0").config()
    config.task_type = None
    adapted = peft.get_peft_model(wrapped, config)
    layer = adapted.base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    m = layer.lora_magnitude_vector["default"].weight
    assert m.shape == (16,)
    torch.testing.assert_close(m, layer.weight.norm(dim=1))
    with torch.no_grad():
        b.normal_()
    x = torch.randn(5, 24)
    found = adapted(x)
    (found**2).sum().backward()
    gradients = [p.grad.clone() for p in (a, b, m)]
    whole = layer.weight.detach() + 16 / 4 * b @ a
    expected = x @ (m[:, None] * whole / whole.norm(dim=1, keepdim=True).detach()).T + layer.bias
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for gradient, oracle in zip(gradients, torch.autograd.grad((expected**2).sum(), (a, b, m)), strict=True):
        torch.testing.assert_close(gradient, oracle, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("name", [*ADAPTERS, "full"])
def test_recomputed_activations_give_the_same_gradients(name, folder):
    method = {**ADAPTERS, "full": Full}[name]()

    def gradients(checkpointing: bool):
        hp = hyperparams(gradient_checkpointing=checkpointing)
        model, run = tiny.attached(method, loaded(method, folder), ROWS, hp)
        run.accumulate(model, [run.collate(ROWS)])
        assert head.causal_lm(model).is_gradient_checkpointing == checkpointing
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for n, gradient in plain.items():
        torch.testing.assert_close(again[n], gradient, atol=1e-6, rtol=1e-5)


# Options


def test_options_come_as_asked_and_impossible_ones_are_refused():
    sources = known_methods()
    for name in ("lora", "dora", "qlora", "galore", "full"):
        cls = resolve(name, sources[name])
        default = build(cls, {})
        again = build(cls, options(default))
        assert options(again) == options(default)
        with pytest.raises(BadRequest):
            build(cls, {"no_such_option": 1})
    for options_ in ({"rank": 0}, {"rank": 2.5}, {"dropout": 1.0}, {"alpha": "much"}):
        with pytest.raises(BadRequest):
            build(resolve("lora", sources["lora"]), options_)
    for options_ in ({"rank": 0}, {"gap": 0}):
        with pytest.raises(BadRequest):
            build(resolve("galore", sources["galore"]), options_)


@pytest.mark.parametrize("targets", ["q_proj,v_proj", "q_proj, v_proj"])
def test_targets_are_the_layers_named(targets):
    model = LoRA(targets=targets).attach(tiny.model(), tiny.run())
    adapted = {n.partition(".lora_")[0].rpartition(".")[2] for n in trained_weights(model)}
    assert adapted == {"q_proj", "v_proj"}


def test_a_target_that_no_layer_has_is_refused():
    with pytest.raises(ValueError, match="v_porj"):
        LoRA(targets="q_proj,v_porj").attach(tiny.model(), tiny.run())


# QLoRA


def four_bit(model) -> dict:
    return {n: m for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}


def dequantised(model) -> dict:
    return {
        n: dequantize_4bit(m.weight.data, m.weight.quant_state).clone() for n, m in four_bit(model).items()
    }


def test_qlora_holds_the_linear_layers_and_only_them_in_nf4(folder):
    model = loaded(QLoRA(), folder)
    quantised = four_bit(model)
    assert quantised.keys() == linears(tiny.model()).keys()
    for layer in quantised.values():
        assert layer.weight.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.weight.quant_state.blocksize == 64
        assert layer.compute_dtype == torch.float32  # the precision of the run, not bf16 always
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32


def test_the_codebook_is_the_papers(folder):
    """Dettmers et al. 2023, appendix E, to the four digits there."""
    paper = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0,
             0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1]  # fmt: skip
    layer = next(iter(four_bit(loaded(QLoRA(), folder)).values()))
    torch.testing.assert_close(layer.weight.quant_state.code, torch.tensor(paper), atol=6e-5, rtol=0)


def test_a_four_bit_layer_computes_with_its_dequantised_weight(folder):
    model = loaded(QLoRA(), folder)
    plain = tiny.model()
    for n, weight in dequantised(model).items():
        layer, original = four_bit(model)[n], linears(plain)[n].weight.detach()
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer(x), x @ weight.T, atol=1e-5, rtol=1e-5)
        error = ((weight - original).norm() / original.norm()).item()
        assert error == pytest.approx(0.092, abs=0.005)  # of NF4 on normal weights


def test_a_width_that_is_no_multiple_of_the_block_is_refused_or_right(tmp_path):
    """bitsandbytes 0.50 on a CPU quantises such a weight as one row of blocks and reads it back row by row:
    its error is 0.25 in place of 0.092, with no word of it."""
    config = tiny.gemma(intermediate_size=96)
    tiny.model(config).save_pretrained(tmp_path)
    try:
        weights = dequantised(loaded(QLoRA(), tmp_path))
    except Unsupported:
        return
    for n, weight in weights.items():
        original = linears(tiny.model(config))[n].weight.detach()
        assert ((weight - original).norm() / original.norm()).item() < 0.12, n


def test_a_large_layer_takes_4_127_bits_a_parameter(tmp_path):
    """4 + 8 / 64 + 32 / (64 * 256), by the paper's double quantisation."""
    config = tiny.gemma(hidden_size=512, intermediate_size=4096, num_hidden_layers=1,
                        layer_types=["full_attention"])  # fmt: skip
    tiny.model(config).save_pretrained(tmp_path)
    layer = loaded(QLoRA(), tmp_path).model.layers[0].mlp.down_proj
    found = sizes(layer)
    assert found["parameters"] == 512 * 4096
    assert 8 * found["weight_bytes"] / found["parameters"] == pytest.approx(4.127, rel=0.01)


def test_an_evaluation_changes_neither_gradients_nor_weights_of_qlora(folder):
    """bitsandbytes 0.50 repacks 4-bit weights on AVX512 CPUs, after which gradients are silently wrong."""
    method = QLoRA()
    model, run = tiny.attached(method, loaded(method, folder))
    with torch.no_grad():
        for n, p in model.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.02)
    batch = tiny.batch(ROWS)

    def gradients():
        model.zero_grad()
        method.loss(model.train(), batch, run).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}

    weights, before = dequantised(model), gradients()
    first = tiny.likelihoods(model, ROWS)
    logits(model, 1)  # one row alone takes another path in bitsandbytes
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[tiny.BOS]]))
    after = gradients()
    for n, gradient in before.items():
        assert gradient.abs().sum() > 0, n
        assert torch.equal(after[n], gradient), n
    for n, weight in dequantised(model).items():
        assert torch.equal(weight, weights[n]), n
    assert first == tiny.likelihoods(model, ROWS)


def test_the_four_bit_base_row_is_what_qlora_starts_from(folder):
    cls = resolve(QLoRA.baseline, known_methods()[QLoRA.baseline])
    assert not cls.trains
    assert torch.equal(logits(loaded(cls(), folder)), logits(loaded(QLoRA(), folder)))


# GaLore's optimizer

TALL, WIDE = (48, 32), (24, 40)
HP = hyperparams(learning_rate=1e-2, epsilon=1e-30)  # GaLore's package adds epsilon elsewhere: none at all


def gradients_of(shape, count: int, seed: int = 0) -> list[torch.Tensor]:
    """Strong and weak directions, as a real gradient has them, and another every step."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(count):
        left, right = torch.randn(shape[0], 24, generator=draw), torch.randn(24, shape[1], generator=draw)
        made.append(left * torch.logspace(0, -2, 24) @ right)
    return made


def ours(p, rank, gap, scale=0.25, weight_decay=0.0, hp=HP):
    group = {"params": [p], "rank": rank, "gap": gap, "scale": scale, "weight_decay": weight_decay}
    return galore.projected_adamw()([group], **adam(hp))


def theirs(p, rank, gap, scale=0.25):
    group = {"params": [p], "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": "std"}
    return GaLoreAdamW([group], no_deprecation_warning=True, **adam(HP))


def stepped(optimizer, p, gradients) -> list[torch.Tensor]:
    """The parameter after each step."""
    seen = []
    for gradient in gradients:
        p.grad = gradient.clone()
        optimizer.step()
        seen.append(p.detach().clone())
    return seen


@pytest.mark.parametrize("shape", [TALL, WIDE, (32, 32)])
def test_galore_equals_the_authors_package_in_the_first_subspace(shape):
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    gradients = gradients_of(shape, 8)
    for a, b in zip(
        stepped(ours(p, 4, 100), p, gradients), stepped(theirs(q, 4, 100), q, gradients), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)  # a thousandth of a step: lr * scale


@pytest.mark.parametrize("shape", [TALL, WIDE, (32, 32)])
def test_galore_equals_the_authors_package_across_new_subspaces(shape, monkeypatch):
    """Given the same bases: after the first, a sign of a singular vector would count, as moments stay."""

    def basis(self, weights, rank, type):
        [found] = galore.top_singular_vectors([weights], rank)
        return found.T if type == "right" else found

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", basis)
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    gradients = gradients_of(shape, 10)
    for a, b in zip(
        stepped(ours(p, 4, 3), p, gradients), stepped(theirs(q, 4, 3), q, gradients), strict=True
    ):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_with_the_identity_for_a_basis_galore_is_adamw(shape, weight_decay, monkeypatch):
    monkeypatch.setattr(galore, "top_singular_vectors", lambda grads, rank: [torch.eye(min(shape))])
    hp = hyperparams(learning_rate=1e-2, epsilon=1e-3)
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    gradients = gradients_of(shape, 6)
    adamw = torch.optim.AdamW([q], weight_decay=weight_decay, **adam(hp))
    found = stepped(ours(p, min(shape), 2, 1.0, weight_decay, hp), p, gradients)
    for a, b in zip(found, stepped(adamw, q, gradients), strict=True):
        torch.testing.assert_close(a, b, atol=5e-7, rtol=0)


def test_what_is_not_projected_is_adamw():
    hp = hyperparams(learning_rate=1e-2, weight_decay=0.1)
    p, q = nn.Parameter(torch.ones(TALL)), nn.Parameter(torch.ones(TALL))
    gradients = gradients_of(TALL, 6)
    plain = galore.projected_adamw()([{"params": [p], "weight_decay": 0.1}], **adam(hp))
    adamw = torch.optim.AdamW([q], weight_decay=0.1, **adam(hp))
    for a, b in zip(stepped(plain, p, gradients), stepped(adamw, q, gradients), strict=True):
        torch.testing.assert_close(a, b, atol=5e-7, rtol=0)


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_galore_of_full_rank_is_adamw_in_turned_coordinates(shape):
    hp = hyperparams(learning_rate=1e-2, epsilon=1e-3)
    gradients = gradients_of(shape, 5)
    [turn] = galore.top_singular_vectors(gradients[:1], min(shape))
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(galore.project(torch.ones(shape), turn))
    found = stepped(ours(p, min(shape), 100, 1.0, hp=hp), p, gradients)
    adamw = torch.optim.AdamW([q], weight_decay=0.0, **adam(hp))
    expected = stepped(adamw, q, [g @ turn if shape == TALL else turn.T @ g for g in gradients])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b @ turn.T if shape == TALL else turn @ b, atol=5e-6, rtol=0)


def with_singular_values(shape, values, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(shape[0], len(values), generator=draw).double())[0]
    right = torch.linalg.qr(torch.randn(shape[1], len(values), generator=draw).double())[0]
    return (left * torch.tensor(values).double() @ right.T).float()


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize(
    "values",
    [
        [1.0, 0.9, 0.8, 0.7, 0.1, 0.05, 0.02],
        [1.0, 0.5, 0.1, 1e-3, 5e-4, 1e-4, 1e-5],  # what fp32 Gram matrices lose: s_r / s_1 = 1e-3
        [1e-6, 5e-7, 1e-7, 1e-9, 5e-10, 1e-10, 1e-11],  # the same of a late, tiny gradient
    ],
    ids=["strong", "ill-conditioned", "tiny"],
)
def test_the_basis_spans_the_subspace_of_the_svd(values, transposed):
    gradient = with_singular_values((96, 40), values)
    gradient = gradient.T.contiguous() if transposed else gradient
    rank = 4
    [found] = galore.top_singular_vectors([gradient], rank)
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    expected = left[:, :rank] if transposed else right[:rank].T
    assert found.dtype == gradient.dtype
    assert found.shape == (40, rank)
    torch.testing.assert_close(found.T @ found, torch.eye(rank), atol=1e-6, rtol=0)
    # Sines of the principal angles: what of each basis lies outside the other.
    outside = found.double() - expected @ (expected.T @ found.double())
    assert torch.linalg.matrix_norm(outside, 2) < 1e-6
    strengths = galore.project(gradient, found).norm(dim=1 if transposed else 0)
    assert torch.all(strengths.diff() <= 0)  # strongest first


def test_a_gradient_of_zeros_does_no_harm():
    p = nn.Parameter(torch.ones(TALL))
    optimizer = ours(p, 4, 2, hp=hyperparams())
    for value in stepped(optimizer, p, [torch.zeros(TALL)] * 3):
        assert torch.equal(value, torch.ones(TALL))


def test_within_one_gap_a_weight_moves_in_a_space_of_the_rank_only():
    def moved(gap):
        p = nn.Parameter(torch.zeros(TALL))
        return torch.linalg.matrix_rank(stepped(ours(p, 3, gap), p, gradients_of(TALL, 8))[-1], rtol=1e-4)

    assert moved(100) == 3
    assert moved(4) == 6  # and the sum over two subspaces in more


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_the_moments_live_in_the_subspace(shape):
    p = nn.Parameter(torch.ones(shape))
    optimizer = ours(p, 4, 2)
    stepped(optimizer, p, gradients_of(shape, 3))
    state = optimizer.state[p]
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == ((48, 4) if shape == TALL else (4, 40))
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_galores_state_is_saved_and_loaded_as_any_optimizers(tmp_path):
    run = tiny.run(hp=hyperparams(max_steps=5, weight_decay=0.1))

    def started():
        model = tiny.model()
        return model, GaLore(rank=4, gap=3).optimizer(model, run)

    def step(model, optimizer, batch):
        optimizer.zero_grad()
        Full().loss(model, batch, run).backward()
        optimizer.step()

    steps = [batches[0] for batches in tiny.steps(ROWS, run.hp)]
    model, optimizer = started()
    for batch in steps[:2]:
        step(model, optimizer, batch)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for batch in steps[2:]:
        step(model, optimizer, batch)
    again, resumed = started()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for batch in steps[2:]:
        step(again, resumed, batch)
    for n, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[n], value), n


def test_weight_decay_reaches_matrices_and_spares_norms():
    model, run = tiny.model(), tiny.run(hp=hyperparams(weight_decay=0.1))
    for method in (Full(), GaLore(rank=4)):
        decayed = {}
        for group in method.optimizer(model, run).param_groups:
            decayed |= {id(p): group["weight_decay"] for p in group["params"]}
        assert len(decayed) == len(list(model.parameters()))
        for n, p in model.named_parameters():
            assert decayed[id(p)] == (0.0 if "norm" in n else 0.1), n


def test_the_projected_parameters_are_those_of_the_decoders_linear_layers():
    for tied in (True, False):
        model = tiny.model(tiny.gemma(tie_word_embeddings=tied))
        groups = GaLore(rank=4).optimizer(model, tiny.run()).param_groups
        projected = {id(p) for group in groups if "rank" in group for p in group["params"]}
        assert projected == {id(layer.weight) for layer in linears(model).values()}
