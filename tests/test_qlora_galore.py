"""QLoRA + GaLore: what is in 4 bits, what is trained, what is projected, and what is saved of it."""

import pytest
import tiny
import torch
from bitsandbytes.nn import Linear4bit
from test_methods import GEMMA_3_1B, on_meta
from tiny import fit, hyperparams, losses, trained_weights
from transformers import AutoModelForCausalLM, GPT2Config

from harness.errors import BadRequest
from harness.method import Unsupported, build
from harness.training.model import optimizer_bytes, sizes
from methods.qlora_galore import ATTENTION, WEIGHTS, QLoRAGaLore

ROWS = tiny.rows(16, seed=3)
MLP = ("gate_proj", "up_proj", "down_proj")
METHOD = QLoRAGaLore(rank=4, subspace=6)


@pytest.fixture(scope="module")
def load_base(tmp_path_factory):
    """The tiny model from a folder, with whatever from_pretrained is asked for."""
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    return lambda **more: AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": "cpu"}, **more
    )


def logits(model):
    tensors = tiny.batch(ROWS[:4])
    with torch.no_grad():
        return model.eval()(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits


def linear_shapes(names) -> list[tuple[int, int]]:
    return [tuple(m.weight.shape) for n, m in tiny.model().named_modules() if n.endswith(names)]


def test_the_mlp_and_only_it_is_in_four_bits(load_base):
    model = METHOD.load(load_base)
    four = {n for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert four == {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in MLP}
    plain = dict(tiny.model().named_parameters())
    for n, p in model.named_parameters():
        if ".mlp." not in n:
            assert torch.equal(p, plain[n]), n


def test_the_attention_and_the_mlps_adapters_are_trained_and_the_attention_projected(load_base):
    trained, optimizer, _ = fit(METHOD, hyperparams(max_steps=2), ROWS, base=METHOD.load(load_base))
    names = {n: p for n, p in trained.named_parameters() if p.requires_grad}
    attention = {n for n in names if n.endswith(tuple(f"{name}.weight" for name in ATTENTION))}
    assert len(attention) == 8
    assert len(names) - len(attention) == 12
    assert all(".mlp." in n and "lora_" in n for n in names.keys() - attention)
    projected = {id(p) for g in optimizer.param_groups if "rank" in g for p in g["params"]}
    assert projected == {id(names[n]) for n in attention}
    assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {id(p) for p in names.values()}
    state = 8 * sum(4 * (m + n) for m, n in linear_shapes(MLP))
    state += 4 * sum(2 * 6 * max(m, n) + 6 * min(m, n) for m, n in linear_shapes(ATTENTION))
    assert optimizer_bytes(optimizer) == state
    expected = sum(4 * (m + n) for m, n in linear_shapes(MLP)) + sum(
        m * n for m, n in linear_shapes(ATTENTION)
    )
    assert sizes(trained)["trainable"] == expected


def test_each_part_moves_as_its_own_method_has_it(load_base):
    """Within one gap the attention in a space of its rank, the MLP by its adapters alone."""
    base = METHOD.load(load_base)
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    held = dict(base.named_parameters())
    fit(METHOD, hyperparams(max_steps=6, epochs=4.0, learning_rate=1e-2), ROWS, base=base)
    for n, p in held.items():
        if n.endswith(tuple(f"{name}.weight" for name in ATTENTION)):
            assert torch.linalg.matrix_rank(p.detach() - before[n], rtol=1e-4) == 6, n
        else:
            assert torch.equal(p, before[n]), n


@pytest.mark.parametrize("options", [{}, {"alpha": 4.0, "scale": 0.7}], ids=["defaults", "others"])
def test_a_step_is_adamws_by_hand(options, load_base):
    """Two steps: adapters by AdamW, the attention by AdamW in the first gradient's strongest directions, its
    change times `scale`; both decay. The singular vectors are torch's, the moments worked out here."""
    method = QLoRAGaLore(rank=4, subspace=6, **options)
    hp = hyperparams(max_steps=2, learning_rate=1e-2, weight_decay=0.1, epsilon=1e-6)
    model, run = tiny.attached(method, method.load(load_base), ROWS, hp)
    optimizer, moments = method.optimizer(model.train(), run), {}
    for step, examples in enumerate(run.batches, 1):
        method.loss(model, run.collate(examples), run).backward()
        expected = {}
        for n, p in model.named_parameters():
            if not p.requires_grad:
                continue
            g, basis, scale = p.grad.double(), None, 1.0
            if "lora_" not in n:
                m, v, basis = moments.get(n, (0.0, 0.0, None))
                tall, scale = g.shape[0] >= g.shape[1], method.scale
                if basis is None:
                    u, _, vh = torch.linalg.svd(g, full_matrices=False)
                    basis = vh[:6].T if tall else u[:, :6]
                g = g @ basis if tall else basis.T @ g
            m, v, *_ = moments.get(n, (0.0, 0.0))
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            moments[n] = m, v, basis
            change = m / (1 - 0.9**step) / ((v / (1 - 0.999**step)).sqrt() + 1e-6)
            if basis is not None:
                change = scale * (change @ basis.T if tall else basis @ change)
            expected[n] = p.detach().double() * (1 - 1e-2 * 0.1) - 1e-2 * change
        optimizer.step()
        optimizer.zero_grad()
        for n, p in model.named_parameters():
            if n in expected:
                torch.testing.assert_close(p.detach().double(), expected[n], atol=2e-5, rtol=0)


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_an_adapter_adds_alpha_over_rank_times_its_product(alpha, load_base):
    method = QLoRAGaLore(rank=4, subspace=6, alpha=alpha)
    model, _ = tiny.attached(method, method.load(load_base))
    layer = model.get_base_model().model.layers[0].mlp.down_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.nn.init.normal_(b)
    x = torch.randn(5, layer.in_features)
    torch.testing.assert_close(
        layer(x) - layer.base_layer(x), alpha / 4 * (x @ a.T @ b.T), atol=1e-4, rtol=1e-4
    )


def test_it_starts_at_its_base_and_learns(load_base):
    base = METHOD.load(load_base)
    before = logits(base)
    assert torch.equal(logits(tiny.attached(METHOD, base)[0]), before)
    trained, _, record = fit(
        METHOD, hyperparams(epochs=12.0, learning_rate=1e-2), ROWS, base=METHOD.load(load_base)
    )
    assert losses(record)[-1] < losses(record)[0] - 1
    for n, p in trained_weights(trained).items():
        assert p.dtype == torch.float32, n


def test_what_is_saved_gives_the_same_outputs_again(load_base, tmp_path):
    hp = hyperparams(epochs=4.0, learning_rate=1e-2)
    trained, _, _ = fit(METHOD, hp, ROWS, base=METHOD.load(load_base))
    METHOD.save(trained, tmp_path)
    restored = METHOD.restore(load_base, tmp_path)
    assert torch.equal(logits(restored), logits(trained))
    assert not torch.allclose(logits(restored), logits(METHOD.load(load_base)), atol=0.1)
    values = sum(m * n for m, n in linear_shapes(ATTENTION))
    assert 4 * values < (tmp_path / WEIGHTS).stat().st_size < 4 * values + 2000  # one copy, nothing else
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * 4 * 2 * 6 * 192 + 4000


def test_it_cannot_be_merged(load_base):
    with pytest.raises(Unsupported, match="4 bits"):
        METHOD.merge(tiny.attached(METHOD, METHOD.load(load_base))[0])


def test_a_model_with_other_names_is_refused():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)
    with pytest.raises(Unsupported, match="q_proj"):
        tiny.attached(METHOD, AutoModelForCausalLM.from_config(config))


def test_impossible_options_are_refused():
    QLoRAGaLore.name = "qlora_galore"
    build(QLoRAGaLore, {"rank": 16})
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"subspace": 0}, {"gap": 0}, {"scale": 0.0}):
        with pytest.raises(BadRequest):
            build(QLoRAGaLore, wrong)


def test_the_cards_numbers_are_those_of_gemma():
    """Bytes of weights, gradients and moments, by each method's formula."""
    shapes = {n: tuple(m.weight.shape) for n, m in on_meta(GEMMA_3_1B).named_modules() if n.endswith("_proj")}
    mlp = [s for n, s in shapes.items() if n.endswith(MLP)]
    attention = [s for n, s in shapes.items() if n.endswith(ATTENTION)]
    inside, beside = (sum(m * n for m, n in part) for part in (mlp, attention))
    assert (inside, beside) == (621_084_672, 76_677_120)
    assert inside / (inside + beside) == pytest.approx(0.89, abs=0.001)
    rest, linear = 999_885_952 - inside - beside, inside + beside  # embeddings and norms
    adapters = {
        n: 16 * sum(8 * (a + b) for a, b in part) for n, part in {"mlp": mlp, "all": mlp + attention}.items()
    }
    nf4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8

    def moments(part):
        return 4 * sum(2 * 128 * max(s) + 128 * min(s) for s in part)

    gib = {
        "hybrid": nf4 * inside + 2 * rest + adapters["mlp"] + 8 * beside + moments(attention),
        "qlora": nf4 * linear + 2 * rest + adapters["all"],
        "lora": 2 * (linear + rest) + adapters["all"],
        "galore": 8 * (linear + rest) + moments(mlp + attention) + 8 * rest,
    }
    found = {name: round(value / 2**30, 1) for name, value in gib.items()}
    assert found == {"hybrid": 1.7, "qlora": 1.0, "lora": 2.0, "galore": 10.4}
