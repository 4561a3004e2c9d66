"""SMT against dense gradients and masked AdamW: which blocks are chosen, and that they alone are trained."""

from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
import tiny
import torch
from tiny import GEMMA_3_1B, LLAMA_32_1B, copy_of, fit, hyperparams
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from harness.errors import BadRequest
from harness.method import Method, build, known_methods, resolve
from harness.spec import RunSpec
from harness.training import evaluation, head
from harness.training.model import load_base, optimizer_bytes, sizes
from harness.training.weights import master_weights
from methods import smt
from methods.smt import SMT

ROWS = tiny.rows(22, seed=1)
QKV = {"q_proj", "k_proj", "v_proj"}
LLAMA = LlamaConfig(
    vocab_size=tiny.VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, attention_bias=True, pad_token_id=tiny.PAD,
    bos_token_id=tiny.BOS, eos_token_id=tiny.EOS, initializer_range=0.1,
)  # fmt: skip


def logits(model) -> torch.Tensor:
    batch = tiny.batch(ROWS[:8])
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def mask_of(layer) -> torch.Tensor:
    """Ones at the trained entries of a weight, from the places alone."""
    mask, side = torch.zeros(layer.weight.shape), layer.side
    for row, column in layer.places.tolist():
        mask[row * side : (row + 1) * side, column * side : (column + 1) * side] = 1
    return mask


def masks(model) -> dict[str, torch.Tensor]:
    return {name: mask_of(layer) for name, layer in smt.sparse_layers(model).items()}


def targets(model, names=QKV) -> dict[str, nn.Linear]:
    return {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in names}


class Masked(Method):
    """The oracle: plain AdamW on whole weights, whose gradients are set to 0 outside the blocks."""

    def __init__(self, masks):
        self.masks = masks

    def attach(self, model, run):
        model.requires_grad_(False)
        for name, mask in self.masks.items():
            weight = model.get_submodule(name).weight.requires_grad_(True)
            weight.register_hook(lambda gradient, mask=mask: gradient * mask)
        return model


# The layer


def layers(bias: bool = True, side: int = 4, dtype=torch.float64, blocks=5, more=((0, 0),)):
    """A plain layer of 12 x 20, and a sparse one of the same weight with five blocks, or fewer; `more` are
    those of another layer of this name, whose room it shares."""
    torch.manual_seed(0)
    plain = nn.Linear(20, 12, bias=bias, dtype=dtype)
    twin = nn.Linear(20, 12, bias=bias, dtype=dtype).requires_grad_(False)
    twin.load_state_dict(plain.state_dict())
    model = Pair({"q": nn.ModuleDict({"x": twin}), "k": nn.ModuleDict({"x": deepcopy(plain)})})
    own = [(2, 4), (0, 1), (1, 1), (2, 0), (0, 4)][:blocks]
    return plain, smt.put(model, {"q.x": torch.tensor(own), "k.x": torch.tensor(more)}, side)["q.x"]


class Pair(nn.ModuleDict):
    def get_decoder(self):
        return self["q"]["x"]


MORE = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2), (2, 3)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 20), (2, 7, 20)])
@pytest.mark.parametrize(("blocks", "more"), [(5, [(0, 0)]), (2, MORE), (1, [*MORE, (0, 4)])])
def test_gradients_are_the_slices_of_the_dense_ones(shape, bias, blocks, more):
    plain, sparse = layers(bias, blocks=blocks, more=more)
    assert len(sparse.blocks) == blocks and len(sparse.rows) == max(5 if blocks == 5 else 0, len(more))
    x = torch.randn(shape, dtype=torch.float64)
    a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
    y, z = plain(a), sparse(b)
    assert torch.equal(y, z)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    torch.testing.assert_close(b.grad, a.grad, atol=1e-14, rtol=0)
    for (row, column), block, found in zip(
        sparse.places.tolist(), sparse.blocks, sparse.blocks.grad, strict=True
    ):
        here = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        assert torch.equal(block, plain.weight[here])
        torch.testing.assert_close(found, plain.weight.grad[here], atol=1e-14, rtol=0)
    assert sparse.weight.grad is None
    assert sparse.bias is None or sparse.bias.grad is None


def test_only_the_inputs_that_meet_a_block_are_kept():
    """Three of five columns: 7 x 12 values of 7 x 20. The weight is kept as it lies, not copied."""
    _, sparse = layers()
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    x = torch.randn(7, 20, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        sparse(x)
    inputs = [t for t in kept if t.is_floating_point() and t.data_ptr() != sparse.weight.data_ptr()]
    assert len(inputs) == 1
    assert inputs[0].untyped_storage().nbytes() == 7 * 12 * 8
    torch.testing.assert_close(inputs[0].reshape(7, 12), x.detach()[:, [*range(8), *range(16, 20)]])


def test_a_layer_whose_columns_are_all_needed_copies_none():
    _, sparse = layers(more=[(0, column) for column in range(5)])
    x = torch.randn(7, 20, dtype=torch.float64)
    y = sparse(x)  # its graph lives as long as it does
    assert y.grad_fn.saved_tensors[0].data_ptr() == x.data_ptr()


def test_under_bf16_autocast_it_computes_as_a_plain_layer_does():
    for frozen in (torch.float32, torch.bfloat16):
        plain, sparse = layers(dtype=torch.float32)
        sparse.weight.data, sparse.bias.data = sparse.weight.to(frozen), sparse.bias.to(frozen)
        x = torch.randn(2, 7, 20)
        a, b = x.clone().requires_grad_(True), x.clone().requires_grad_(True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, z = plain(a), sparse(b)
        assert y.dtype == z.dtype == torch.bfloat16
        assert torch.equal(y, z)
        y.sum().backward()
        z.sum().backward()
        assert a.grad.dtype == b.grad.dtype == torch.float32
        assert torch.equal(a.grad, b.grad)
        assert sparse.blocks.grad.dtype == torch.float32
        dense = smt.tiles(plain.weight.grad, 4)[sparse.places.unbind(1)]
        torch.testing.assert_close(sparse.blocks.grad, dense, atol=0, rtol=2**-7)  # a unit in bf16


# The choice


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
def test_planted_blocks_are_chosen_exactly(score):
    """Over several matrices together; the largest entry alone lies elsewhere."""
    torch.manual_seed(0)
    gradients = {"a": torch.randn(32, 48), "b": torch.randn(16, 64), "c": torch.randn(48, 16)}
    planted = {"a": [(0, 5), (3, 2)], "c": [(1, 1), (2, 0), (5, 1)]}
    for name, places in planted.items():
        for row, column in places:
            gradients[name][8 * row : 8 * row + 8, 8 * column : 8 * column + 8] -= 3.0
    gradients["b"][3, 5] = 50.0
    scores = {name: SMT(score=score).scores(gradient, 8) for name, gradient in gradients.items()}
    assert smt.top_blocks(scores, 5) == planted


def test_the_two_scores_are_their_formulas():
    """A block of +2 and -2 has gradients as large as one of 2, and the mean 0."""
    signs = torch.tensor([[2.0, -2.0], [-2.0, 2.0]])
    gradient = torch.cat([signs, torch.full((2, 2), -1.0)], 1)
    assert SMT().scores(gradient, 2).tolist() == [[2.0, 1.0]]
    assert SMT(score="mean_abs").scores(gradient, 2).tolist() == [[0.0, 1.0]]


def sums(hp, method=None, base=None):
    method, base = method or SMT(), base or tiny.model()
    return method.gradient_sums(base, targets(base), tiny.run(ROWS, hp, method=method))


def test_the_warm_up_sums_the_gradients_of_its_steps_at_the_base():
    hp = hyperparams(micro_batch_size=3, max_steps=5)
    base = tiny.model().requires_grad_(True)
    expected = {n: torch.zeros_like(m.weight) for n, m in targets(base).items()}
    for micro_batches in tiny.steps(ROWS, hp)[:2]:
        logps = torch.cat([head.token_logps(base, batch).flatten() for batch in micro_batches])
        base.zero_grad()
        (-logps.sum() / (logps != 0).sum()).backward()
        for n, module in targets(base).items():
            expected[n] += module.weight.grad
    found = sums(hp, SMT(warmup=2))
    assert found.keys() == expected.keys()
    for n, total in found.items():
        torch.testing.assert_close(total, expected[n], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("changed", [{"micro_batch_size": 3}, {"gradient_checkpointing": True}])
def test_micro_batches_and_recomputation_change_no_score(changed):
    whole, other = sums(hyperparams(max_steps=3)), sums(hyperparams(max_steps=3, **changed))
    for n, total in whole.items():
        torch.testing.assert_close(other[n], total, atol=2e-6, rtol=1e-4)


def test_the_warm_up_recomputes_activations_where_the_training_does():
    base = tiny.model()
    sums(hyperparams(max_steps=1), base=base)
    assert not base.is_gradient_checkpointing
    sums(hyperparams(max_steps=1, gradient_checkpointing=True), base=base)
    assert base.is_gradient_checkpointing


def test_the_warm_up_holds_one_gradient_at_a_time_and_moves_nothing():
    base, seen = tiny.model(), []
    before = copy_of(base)

    def count(_):
        seen.append([n for n, p in base.named_parameters() if p.grad is not None])

    for p in base.parameters():  # registered first, called first
        p.register_post_accumulate_grad_hook(count)
    sums(hyperparams(micro_batch_size=4, max_steps=2), base=base)
    assert len(seen) == 2 * 2 * len(targets(base))
    assert {len(names) for names in seen} == {1}
    assert all(torch.equal(value, before[n]) for n, value in base.state_dict().items())
    assert not [n for n, p in base.named_parameters() if p.requires_grad or p.grad is not None]


@pytest.mark.parametrize("score", ["abs_mean", "mean_abs"])
def test_attach_takes_the_best_blocks_of_all_matrices(score):
    hp = hyperparams(max_steps=2)
    model, run = tiny.attached(SMT(share=0.01, block=8, score=score), examples=ROWS, hp=hp)
    count = int(0.01 * 73_728 / 64)
    ranked = []
    for n, total in sums(hp).items():
        for row in range(0, total.shape[0], 8):
            for column in range(0, total.shape[1], 8):
                block = total[row : row + 8, column : column + 8]
                value = block.abs().mean() if score == "abs_mean" else block.mean().abs()
                ranked.append((value.item(), n, (row // 8, column // 8)))
    expected = {(n, place) for _, n, place in sorted(ranked)[-count:]}
    found = {(n, tuple(p)) for n, m in smt.sparse_layers(model).items() for p in m.places.tolist()}
    assert found == expected
    spread = Counter(n.rpartition(".")[2] for n, _ in expected)
    assert run.record.notes == {
        "warm-up, steps of gradients before the training": 2,
        "side of a block, in weights": 8,
        "trained blocks": count,
        "trained blocks by layer": ", ".join(f"{n}_proj {spread[f'{n}_proj']}" for n in "qkv"),
    }


@pytest.mark.parametrize(
    ("config", "weights", "side"), [(GEMMA_3_1B, 697_761_792, 128), (LLAMA_32_1B, 973_078_528, 256)]
)
def test_published_models_tile_and_train_the_authors_share(config, weights, side, monkeypatch):
    """Gemma's width, 1152, is 9 * 128; Llama's key and value projections are 512 high."""

    def none(self, model, targets, run):
        model.requires_grad_(False)
        return {n: torch.zeros(m.weight.shape) for n, m in targets.items()}

    monkeypatch.setattr(SMT, "gradient_sums", none)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model, run = tiny.attached(SMT(), model)
    assert sizes(model)["trainable"] == int(0.0084 * weights / side**2) * side**2
    assert run.record.notes["side of a block, in weights"] == side


def test_a_side_that_does_not_tile_is_refused_by_name():
    with pytest.raises(ValueError, match=r"48 does not tile model\.layers\.0.*q_proj.*64 x 64.*32 and its"):
        tiny.attached(SMT(block=48))
    with pytest.raises(ValueError, match=r"64 does not tile .*k_proj.*32 x 64"):
        tiny.attached(SMT(block=64))
    assert SMT(block=64).side(targets(tiny.model(), {"q_proj"})) == 64


def test_targets_are_linear_layers_of_the_decoder():
    hp = hyperparams(max_steps=1)
    whole, _ = tiny.attached(SMT(targets="all-linear", share=1.0), examples=ROWS, hp=hp)
    assert sizes(whole)["trainable"] == 73_728
    some, _ = tiny.attached(SMT(targets="o_proj, up_proj", share=1.0), examples=ROWS, hp=hp)
    assert {n.rpartition(".")[2] for n in smt.sparse_layers(some)} == {"o_proj", "up_proj"}
    for name in ("v_porj", "lm_head", "embed_tokens"):
        with pytest.raises(ValueError, match=name):
            tiny.attached(SMT(targets=f"q_proj,{name}"))


def test_options_that_cannot_be_are_refused():
    cls = resolve("smt", known_methods()["smt"])
    build(cls, {})
    for wrong in ({"share": 0.0}, {"share": 1.5}, {"warmup": 0}, {"block": -1}, {"score": "mean"}):
        with pytest.raises(BadRequest):
            build(cls, wrong)


# The training


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["some blocks", "every block"])
def test_training_is_adamw_with_masked_gradients(share):
    """In double precision; with every block it is full fine-tuning of the targets. Clipping acts alike."""
    hp = hyperparams(max_steps=6, learning_rate=1e-2, max_grad_norm=0.1)
    trained, _, _ = fit(SMT(share=share, block=8), hp, ROWS, base=tiny.model().double())
    found = masks(trained)
    selected = sum(mask.sum() for mask in found.values())
    assert selected == (8 * 8 * int(0.1 * 73_728 / 64) if share < 1 else 2 * (64 + 32 + 32) * 64)
    oracle, _, _ = fit(Masked(found), hp, ROWS, base=tiny.model().double())
    expected = copy_of(oracle)
    for n, value in SMT().merge(trained).state_dict().items():
        torch.testing.assert_close(value, expected[n], atol=1e-12, rtol=0)


def test_what_is_not_chosen_stays_bit_identical_and_all_that_is_moves():
    before = copy_of(tiny.model())
    trained, _, _ = fit(SMT(share=0.03, block=8), hyperparams(max_steps=4, weight_decay=0.1), ROWS)
    found = masks(trained)
    assert 1 < len(found) <= 6
    for n, value in SMT().merge(trained).state_dict().items():
        moved = value != before[n]
        mask = found.get(n.removesuffix(".weight"), torch.zeros(())) if n.endswith("weight") else 0
        assert torch.equal(moved, torch.as_tensor(mask).bool().expand_as(moved)), n


def test_sizes():
    """n * side^2 trained, two fp32 moments each; the weights stay beside them, as with adapters."""
    base = sizes(tiny.model())["parameters"]
    trained, optimizer, _ = fit(SMT(share=0.05, block=16), hyperparams(max_steps=1), ROWS)
    n = int(0.05 * 73_728 / 256)
    assert sizes(trained)["trainable"] == n * 256
    assert sizes(trained)["parameters"] == base + n * 256
    assert optimizer_bytes(optimizer) == 8 * n * 256
    assert all(p.grad is None for p in trained.parameters() if not p.requires_grad)


def test_recomputed_activations_give_the_same_gradients():
    def gradients(checkpointing: bool):
        hp = hyperparams(max_steps=1)  # of the warm-up, which must choose the same blocks
        model, run = tiny.attached(SMT(share=0.05, block=8), examples=ROWS, hp=hp)
        run.hp = replace(hp, gradient_checkpointing=checkpointing)
        run.accumulate(model, [run.collate(ROWS[:8])])
        assert model.is_gradient_checkpointing == checkpointing
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, again = gradients(False), gradients(True)
    assert plain.keys() == again.keys()
    for n, gradient in plain.items():
        assert gradient.abs().sum() > 0
        torch.testing.assert_close(again[n], gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("config", [tiny.gemma(), LLAMA], ids=["gemma", "llama with biases"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_is_saved_restored_or_merged_gives_the_same_outputs(config, dtype, tmp_path):
    """In bf16 as on a card: frozen weights in bf16, blocks in fp32, computed under autocast."""
    (tmp_path / "base").mkdir()
    tiny.model(config).save_pretrained(tmp_path / "base")
    spec = RunSpec("any", 0, "base", {}, hyperparams(), locations={"model": str(tmp_path / "base")})

    def load(**more):
        return load_base(spec, dtype, torch.device("cpu"), **more)

    method = SMT(share=0.05, block=8)
    hp = hyperparams(max_steps=3, learning_rate=1e-2)
    model, run = tiny.attached(method, method.load(load), ROWS, hp)
    before = logits(model)
    master_weights(model, "bf16")
    optimizer = method.optimizer(model.train(), run)
    for examples in run.batches:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = method.loss(model, run.collate(examples), run)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    layers = smt.sparse_layers(model).values()
    assert {layer.blocks.dtype for layer in layers} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {dtype}
    trained = logits(model)
    assert not torch.allclose(trained, before, atol=0.05)
    folder = tmp_path / "trained"
    folder.mkdir()
    method.save(model, folder)
    (file,) = folder.iterdir()
    n = sum(len(layer.blocks) for layer in layers)
    assert file.stat().st_size < n * (64 * dtype.itemsize + 16) + 2048  # values, places, a header
    restored = SMT().restore(load, folder)
    assert not restored.training
    assert torch.equal(logits(restored), trained)
    assert torch.equal(logits(SMT().merge(restored)), trained)
    merged = method.merge(model)
    assert not smt.sparse_layers(merged)
    assert {type(m) for m in targets(merged).values()} == {nn.Linear}
    assert merged.state_dict().keys() == load().state_dict().keys()
    assert torch.equal(logits(merged), trained)


def test_evaluation_sees_what_was_trained():
    """In inference mode, between steps and after the last."""
    hp = hyperparams(max_steps=4, learning_rate=1e-2, validations=4)
    trained, _, record = fit(SMT(share=0.2, block=8), hp, ROWS, validation=ROWS)
    seen = [point["loss"] for point in record.validation]
    assert len(set(seen)) == 4 and seen[-1] < seen[0]
    assert evaluation.mean_loss(tiny.likelihoods(SMT().merge(trained), ROWS)) == seen[-1]
