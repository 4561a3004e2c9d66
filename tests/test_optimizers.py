"""APOLLO, GaLore layerwise, 8-bit AdamW: against their authors' packages, AdamW and closed formulas."""

import gc
import math
from itertools import combinations, pairwise

import apollo_torch.random_projector
import pytest
import tiny
import torch
from apollo_torch import APOLLOAdamW
from test_methods import GEMMA_3_1B, gradients_of, on_meta, shapes, stepped, with_singular_values
from tiny import fit, hyperparams, losses, trained_weights
from torch import nn
from transformers import AutoModelForCausalLM

from harness import ROOT
from harness.errors import BadRequest
from harness.method import adam, build
from harness.training.model import optimizer_bytes
from methods import apollo, galore
from methods.apollo import APOLLO, apollo_adamw, random_bases
from methods.full import Full
from methods.full_8bit import Full8bit
from methods.galore import GaLore, project
from methods.galore_layerwise import GaLoreLayerwise, capturable_adamw

ROWS = tiny.rows(22, seed=1)
TALL, WIDE, SQUARE = (48, 32), (24, 40), (32, 32)
HP = hyperparams(learning_rate=1e-2, epsilon=1e-30)  # apollo-torch adds epsilon elsewhere: none at all

# APOLLO


def ours(p, hp=HP, weight_decay=0.0, **options):
    method = APOLLO(**{"rank": 4, "gap": 3, **options})
    group = {"rank": method.rank, "gap": method.gap, "scale": method.scale, "scaling": method.scaling}
    return apollo_adamw()([{"params": [p], "weight_decay": weight_decay, **group}], seed=0, **adam(hp))


def theirs(p, rank=4, gap=3, scale=1.0, scaling="channel"):
    group = {"params": [p], "rank": rank, "update_proj_gap": gap, "scale": scale, "scale_type": scaling,
             "proj": "random", "proj_type": "std"}  # fmt: skip
    return APOLLOAdamW([group], **adam(HP))


@pytest.fixture
def same_bases(monkeypatch):
    """Each package asks for another basis every gap; both are given the next of one sequence."""

    def basis(shape, period):
        return torch.randn(shape, generator=torch.Generator().manual_seed(period)) / math.sqrt(shape[1])

    asked = []

    def of_theirs(self, weights, rank, type, seed):
        found = basis((min(weights.shape), rank), len(asked))
        asked.append(seed)
        return found.T if type == "right" else found

    monkeypatch.setattr(apollo_torch.random_projector.GradientProjector, "get_orthogonal_matrix", of_theirs)
    seeds = []

    def of_ours(alike, rank, seed):
        if seed not in seeds:
            seeds.append(seed)
        return basis((min(alike[0].shape), rank), len(seeds) - 1).expand(len(alike), -1, -1)

    monkeypatch.setattr(apollo, "random_bases", of_ours)
    return seeds, asked


@pytest.mark.parametrize("options", [{}, {"rank": 1, "scale": 128.0, "scaling": "tensor"}, {"scale": 0.3}],
                         ids=["apollo", "mini", "scaled"])  # fmt: skip
@pytest.mark.parametrize("shape", [TALL, WIDE, SQUARE])
def test_apollo_equals_the_authors_package(shape, options, same_bases):
    """Ten steps over four subspaces, with gradients that grow and so meet the limiter."""
    gradients = [g * (3 if i in (2, 5) else 1) for i, g in enumerate(gradients_of(shape, 10))]
    p, q = nn.Parameter(torch.ones(shape)), nn.Parameter(torch.ones(shape))
    found, expected = stepped(ours(p, **options), p, gradients), stepped(theirs(q, **options), q, gradients)
    seeds, asked = same_bases
    assert len(seeds) == len(asked) == 4
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=2e-6)


def test_the_limiter_acts_in_that_test():
    """An update may exceed the last one by 1 % and no more, but for AdamW's correction of the first steps."""
    p = nn.Parameter(torch.zeros(TALL))
    optimizer, norms = ours(p), []
    for t, (gradient, factor) in enumerate(
        zip(gradients_of(TALL, 8), [1, 1, 3, 1, 1, 3, 1, 1], strict=True), 1
    ):
        before = p.detach().clone()
        stepped(optimizer, p, [gradient * factor])
        norms.append(optimizer.state[p]["norm"].item())
        correction = (1 - 0.999**t) ** 0.5 / (1 - 0.9**t)
        assert (p - before).norm().item() == pytest.approx(1e-2 * correction * norms[-1], rel=1e-4)
    growth = [b / a for a, b in pairwise(norms)]
    assert max(growth) == pytest.approx(1.01, abs=1e-5)
    assert min(growth) < 1


@pytest.mark.parametrize("shape", [TALL, WIDE])
def test_a_basis_is_random_and_its_projection_keeps_lengths_in_the_mean(shape):
    gradient = gradients_of(shape, 1)[0]
    first, again, other = (random_bases([gradient] * 100, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.shape == (100, min(shape), 8)
    bases = [*first, *other]
    assert not any(torch.equal(a, b) for a, b in pairwise(bases))
    ratios = [(apollo.project(gradient, basis).norm() / gradient.norm()) ** 2 for basis in bases]
    assert torch.stack(ratios).mean().item() == pytest.approx(1, abs=0.1)


def test_each_weight_and_each_gap_has_a_subspace_of_its_own_and_no_global_random_state(monkeypatch):
    """Also where a weight has no gradient for a step: the others' subspaces are what they would be."""
    used = []
    monkeypatch.setattr(apollo, "project", lambda g, basis: used.append(basis) or project(g, basis))

    def bases(steps_of_the_second):
        weights = [nn.Parameter(torch.ones(TALL)) for _ in range(2)]
        group = {"rank": 4, "gap": 2, "scale": 1.0, "scaling": "channel", "weight_decay": 0.0}
        optimizer = apollo_adamw()([{"params": weights, **group}], seed=0, **adam(HP))
        used.clear()
        for step, gradient in enumerate(gradients_of(TALL, 4)):
            weights[0].grad = gradient.clone()
            weights[1].grad = gradient.clone() if step in steps_of_the_second else None
            optimizer.step()
        return [basis.clone() for basis in used]

    before = torch.get_rng_state()
    found = bases({0, 1, 2, 3})
    assert torch.equal(torch.get_rng_state(), before)
    periods = [found[0:4], found[4:8]]
    for first, second, again, second_again in periods:
        assert torch.equal(first, again) and torch.equal(second, second_again)
    distinct = [period[i] for period in periods for i in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in combinations(distinct, 2))
    late = bases({1, 3})  # step, weight: 00 10 11 20 30 31
    for place, other in ((0, 0), (1, 0), (2, 1), (3, 4), (4, 4), (5, 1)):
        assert torch.equal(late[place], found[other])


def test_another_seed_has_other_subspaces_and_the_same_seed_the_same():
    """Of a run, on equal gradients of equal weights."""

    def trained(seed):
        model = tiny.model()
        weight = model.model.layers[0].mlp.down_proj.weight
        optimizer = APOLLO(rank=4).optimizer(model, tiny.run(hp=HP, seed=seed))
        return stepped(optimizer, weight, gradients_of(weight.shape, 4))[-1]

    assert torch.equal(trained(0), trained(0))
    assert (trained(0) - trained(1)).abs().max() > 1e-3


def test_apollos_epsilon_and_decay_act_as_torchs(monkeypatch):
    """Channels of one weight, an identity for a basis, no limiter: each update is AdamW's of its weight."""
    monkeypatch.setattr(apollo, "random_bases", lambda alike, rank, seed: torch.ones(1, 1, 1))
    monkeypatch.setattr(apollo, "GROWTH", 1e9)
    hp = hyperparams(learning_rate=1e-2, epsilon=1e-3)
    p, q = nn.Parameter(torch.ones(16, 1)), nn.Parameter(torch.ones(16, 1))
    gradients = [torch.linspace(0.01, 1, 16)[:, None] * size for size in (1, 3, 2, 5, 1, 1)]  # of one sign
    adamw = torch.optim.AdamW([q], weight_decay=0.1, **adam(hp))
    found = stepped(ours(p, hp, weight_decay=0.1, rank=1, gap=100), p, gradients)
    for a, b in zip(found, stepped(adamw, q, gradients), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


@pytest.mark.parametrize("options", [{"rank": 4}, {"rank": 1, "scale": 128.0, "scaling": "tensor"}],
                         ids=["apollo", "mini"])  # fmt: skip
def test_apollo_holds_as_much_state_as_its_formula_says_and_trains_everything(options):
    before = trained_weights(tiny.model())
    trained, optimizer, _ = fit(APOLLO(**options), hyperparams(max_steps=3), ROWS)
    everything = sum(p.numel() for p in trained.parameters())
    inside = sum(m * n for m, n in shapes())
    moments = sum(2 * options["rank"] * max(m, n) for m, n in shapes())
    assert optimizer_bytes(optimizer) == 4 * moments + 8 * (everything - inside)
    assert [n for n, value in trained_weights(trained).items() if torch.equal(value, before[n])] == []
    for state in optimizer.state.values():
        assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_apollo_learns():
    _, _, record = fit(APOLLO(rank=8), hyperparams(epochs=8.0, learning_rate=5e-3), ROWS)
    assert losses(record)[-1] < losses(record)[0] - 1


def test_apollos_published_state_of_gemma():
    """2 r max(m, n), of channels: 337 M at rank 256, 1.3 M at rank 1, and no basis."""
    model = on_meta(GEMMA_3_1B).requires_grad_(True)
    groups = APOLLO().optimizer(model, tiny.run()).param_groups
    longer = sum(max(p.shape) for g in groups if "rank" in g for p in g["params"])
    assert 2 * 256 * longer / 1e6 == pytest.approx(2 * 168.7, abs=0.1)  # twice GaLore's, whose rank is 128
    assert 2 * longer / 1e6 == pytest.approx(1.318, abs=0.001)


def test_apollos_state_is_saved_and_loaded_as_any_optimizers(tmp_path):
    gradients = gradients_of(TALL, 6)
    p = nn.Parameter(torch.ones(TALL))
    optimizer = ours(p)
    stepped(optimizer, p, gradients[:4])
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    q = nn.Parameter(p.detach().clone())
    resumed = ours(q)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(stepped(optimizer, p, gradients[4:]), stepped(resumed, q, gradients[4:]), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_of_zeros_does_no_harm():
    p = nn.Parameter(torch.ones(TALL))
    for value in stepped(ours(p, hyperparams()), p, [torch.zeros(TALL)] * 4):
        assert torch.equal(value, torch.ones(TALL))


def test_impossible_options_of_apollo_are_refused():
    APOLLO.name = "apollo"
    build(APOLLO, {"scaling": "tensor"})
    for wrong in ({"scaling": "row"}, {"rank": 0}, {"gap": 0}, {"scale": 0.0}):
        with pytest.raises(BadRequest):
            build(APOLLO, wrong)


# GaLore's subspaces: what their iteration promises, against the SVD

ORDER = torch.arange(1.0, 289.0)
SPECTRA = {
    "slow": ORDER**-0.5, "harmonic": 1 / ORDER, "fast": ORDER**-2.0, "exponential": torch.exp(-ORDER / 10),
    "on noise": torch.where(ORDER < 60, 1 / ORDER, (1 - ORDER / 600) / 60),
    "one spike": torch.where(ORDER < 2, 1.0, 1e-3 * ORDER**-0.5), "few": (ORDER <= 50) / ORDER,
}  # fmt: skip


def held(gradient, basis, rank: int) -> tuple[float, float]:
    """-> the share of the best basis's squares that this one holds, and the largest angle, in degrees, to a
    direction 1.25 times as strong as the first that is left out."""
    basis, (u, s, vh) = basis.double(), torch.linalg.svd(gradient.double(), full_matrices=False)
    best = vh.T if gradient.shape[0] >= gradient.shape[1] else u
    torch.testing.assert_close(basis.T @ basis, torch.eye(rank).double(), atol=1e-6, rtol=0)
    squares = project(gradient.double(), basis).square().sum() / (s[:rank] ** 2).sum()
    strong = best[:, :rank][:, s[:rank] > 1.25 * s[rank] + 1e-6 * s[0]]
    return squares.item(), torch.linalg.vector_norm(
        strong - basis @ (basis.T @ strong), dim=0
    ).max().asin().rad2deg().item()


@pytest.mark.parametrize("transposed", [False, True], ids=["tall", "wide"])
def test_a_subspace_is_as_near_to_the_svds_as_the_card_says(transposed):
    """All of them at once, as a step finds them; a zero among them."""
    gradients = [with_singular_values((400, 288), values.tolist()) for values in SPECTRA.values()]
    gradients.insert(3, torch.zeros(400, 288))
    if transposed:
        gradients = [gradient.T.contiguous() for gradient in gradients]
    bases = galore.top_singular_vectors([*gradients, gradients[0][:200, :200]], 64)
    assert bases[-1].shape == (200, 64)
    torch.testing.assert_close(bases[3].T @ bases[3], torch.eye(64), atol=1e-6, rtol=0)
    for name, gradient, basis in zip(
        SPECTRA, gradients[:3] + gradients[4:], bases[:3] + bases[4:-1], strict=True
    ):
        squares, angle = held(gradient, basis, 64)
        assert squares > 0.999, name
        assert angle < 1, name
        low = project(
            gradient, basis
        )  # nearly singular vectors, in their order: columns that do not correlate
        low = low.T if transposed else low
        low = low[:, low.norm(dim=0) > 1e-6 * low.norm()]
        correlation = (low / low.norm(dim=0)).T @ (low / low.norm(dim=0)) - torch.eye(low.shape[1])
        assert correlation.abs().max() < 0.1, name
        assert correlation.square().mean().sqrt() < 0.01, name


@pytest.mark.parametrize("rank", [16, 48])
def test_so_it_is_of_a_trained_models_gradients(rank, monkeypatch):
    monkeypatch.setattr(galore, "SMALL", 0)
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model", dtype=torch.float32)
    ids = torch.randint(5, 1000, (4, 48), generator=torch.Generator().manual_seed(0))
    model(input_ids=ids, labels=ids).loss.backward()
    gradients = [layer.mlp.down_proj.weight.grad for layer in model.model.layers]
    gradients.append(model.model.layers[1].self_attn.q_proj.weight.grad)
    for gradient, basis in zip(gradients, galore.top_singular_vectors(gradients, rank), strict=True):
        squares, angle = held(gradient, basis, rank)
        assert squares > 0.999
        assert angle < 1


def test_a_basis_is_a_function_of_its_gradient_alone():
    gradients = [with_singular_values((250, 200), SPECTRA["slow"][:200].tolist(), seed) for seed in (0, 1)]
    together = galore.top_singular_vectors(gradients, 8)
    torch.manual_seed(1)
    for gradient, basis in zip(gradients, together, strict=True):
        torch.testing.assert_close(galore.top_singular_vectors([gradient], 8)[0], basis, atol=1e-6, rtol=0)


@pytest.mark.parametrize("method", [GaLore(rank=24, gap=2), APOLLO(rank=24, gap=2)], ids=["galore", "apollo"])
def test_no_step_waits_for_the_device(method, monkeypatch):
    """Tensors without values have none that could be asked for: neither in a step nor for new subspaces."""

    def bases(alike, rank, seed):  # there is no generator for them
        return alike[0].new_empty(len(alike), min(alike[0].shape), rank)

    monkeypatch.setattr(apollo, "random_bases", bases)
    model = on_meta(tiny.gemma(hidden_size=256, intermediate_size=208)).requires_grad_(True)
    optimizer = method.optimizer(model, tiny.run())
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.empty_like(p)
        optimizer.step()
    assert all(state["step"] == 3 for state in optimizer.state.values())


@pytest.mark.parametrize("cls", [GaLore, APOLLO])
def test_in_how_many_parts_a_step_is_taken_changes_nothing_but_rounding(cls, monkeypatch):
    def trained():
        model = tiny.model()
        optimizer = cls(rank=4, gap=2).optimizer(model, tiny.run(hp=hyperparams(weight_decay=0.1)))
        for step in range(3):
            for i, p in enumerate(model.parameters()):
                p.grad = gradients_of(p.shape if p.ndim == 2 else (*p.shape, 1), 1, seed=10 * step + i)[
                    0
                ].view_as(p)
            optimizer.step()
        return model.state_dict()

    def bases(alike, rank, seed):  # a part draws its own: here all have the same
        return torch.eye(min(alike[0].shape), rank).expand(len(alike), -1, -1)

    monkeypatch.setattr(apollo, "random_bases", bases)
    together = trained()
    for module in (galore, apollo):
        monkeypatch.setattr(module, "PROJECTED", 1)
    monkeypatch.setattr(galore, "GRAM", 1)
    for name, value in trained().items():
        torch.testing.assert_close(value, together[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [60, 220], ids=["LAPACK", "iterated"])
def test_no_rounding_decides_a_sign(size):
    """Rows in another order: the same right singular vectors, by other roundings."""
    values = (0.9 ** torch.arange(12.0)).tolist()
    gradient = with_singular_values((300, size), values)
    for seed in range(3):
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        bases = galore.top_singular_vectors([gradient, gradient[order] * 3, -gradient], 8)
        assert all(basis.sum(0).min() > 0 for basis in bases)
        for other in bases[1:]:
            torch.testing.assert_close(bases[0], other, atol=1e-4, rtol=0)


# GaLore layerwise

UNCLIPPED = hyperparams(max_steps=5, epochs=4.0, learning_rate=5e-3, weight_decay=0.1, max_grad_norm=0.0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_layerwise_is_galore_to_the_bit_where_nothing_is_clipped(tied, checkpointing):
    def trained(method):
        base = tiny.model(tiny.gemma(tie_word_embeddings=tied))
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        model, optimizer, record = fit(method, UNCLIPPED, ROWS, base=base)
        return trained_weights(model), losses(record), optimizer_bytes(optimizer)

    plain, layerwise = trained(GaLore(rank=4, gap=2)), trained(GaLoreLayerwise(rank=4, gap=2))
    assert layerwise[1:] == plain[1:]
    for n, value in plain[0].items():
        assert torch.equal(layerwise[0][n], value), n


def test_one_gradient_is_alive_at_a_time():
    def most_alive(method):
        model = tiny.model().requires_grad_(True)
        alive = []

        def count(_):
            alive.append(sum(p.grad is not None for p in model.parameters()))

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(count)
        fit(method, UNCLIPPED, ROWS, base=model)
        assert len(alive) == 5 * len(list(model.parameters()))
        return max(alive), len(list(model.parameters()))

    assert most_alive(GaLoreLayerwise(rank=4))[0] == 1
    most, everything = most_alive(GaLore(rank=4))
    assert most == everything


def test_without_its_optimizer_the_weights_are_left_alone_and_its_moments_are_freed():
    trained, optimizer, _ = fit(GaLoreLayerwise(rank=4), UNCLIPPED, ROWS)
    before = trained_weights(trained)
    del optimizer
    gc.collect()
    Full().loss(trained, tiny.batch(ROWS), tiny.run()).backward()
    for n, p in trained.named_parameters():
        assert torch.equal(p, before[n])
        assert p.grad is not None


def test_what_a_graph_reads_lies_with_the_parameters_also_after_a_state_was_loaded():
    """A rate on the host would be that of the capture for ever."""
    weight = nn.Parameter(torch.empty(4, 4, device="meta"))
    one = capturable_adamw()([weight], lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    assert one.param_groups[0]["lr"].is_meta
    state = one.state_dict()
    state["param_groups"][0]["lr"] = torch.tensor(1e-3, dtype=torch.float64)  # as a checkpoint holds it
    one.load_state_dict(state)
    assert one.param_groups[0]["lr"].is_meta


def test_a_weight_that_has_its_first_gradient_late_has_a_subspace():
    """As an expert that no token of the first step has asked for."""
    torch.manual_seed(0)
    first, late = (nn.Parameter(torch.randn(8, 6)) for _ in range(2))
    groups = [{"params": [first, late], "rank": 2, "gap": 200, "scale": 1.0, "weight_decay": 0.0}]
    one = capturable_adamw()(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)
    for learning in ([first], [first, late]):
        before = late.detach().clone()
        for p in learning:
            p.grad = torch.randn_like(p)
            with torch.no_grad():
                one.take([p], one.param_groups[0])
            p.grad = None
        one.step()
    assert one.state[late]["step"] == 1 and torch.linalg.matrix_rank(late - before, rtol=1e-3) == 2


def test_layerwise_says_what_it_cannot():
    assert GaLoreLayerwise.overrides["max_grad_norm"][0] == 0
    assert "accumulation" in GaLoreLayerwise.cannot


# 8-bit AdamW


def test_eight_bit_adamw_is_adamw_within_its_rounding():
    """METHODS: bitsandbytes' is within 1.6e-4 of torch's after five steps of 1e-3."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(64, 128, generator=draw)
    gradients = [torch.randn(64, 128, generator=draw) for _ in range(5)]
    hp = hyperparams(learning_rate=1e-3, weight_decay=0.1)
    found = {}
    for method in (Full(), Full8bit()):
        holder = nn.Linear(128, 64, bias=False)
        holder.weight.data = start.clone()
        found[type(method)] = stepped(method.optimizer(holder, tiny.run(hp=hp)), holder.weight, gradients)[-1]
    difference = (found[Full] - found[Full8bit]).abs().max().item()
    assert 0 < difference < 5e-4
    assert (found[Full] - start).abs().max() > 4e-3


def test_eight_bit_adamw_waits_for_no_weight(monkeypatch):
    """bitsandbytes would for the card after each, as moments need it that are paged."""
    from bitsandbytes.optim import optimizer

    waits = []
    monkeypatch.setattr(optimizer, "sync_gpu", waits.append)
    fit(Full8bit(), hyperparams(max_steps=2), ROWS)
    assert not waits


def test_eight_bit_adamw_trains_as_full_does_to_its_rounding():
    hp = hyperparams(epochs=4.0, learning_rate=1e-3)
    found = [losses(fit(method, hp, ROWS)[2]) for method in (Full(), Full8bit())]
    assert found[0][0] == found[1][0]
    assert found[0][-1] == pytest.approx(found[1][-1], abs=0.05)
    assert found[0][0] - found[0][-1] > 0.3


def test_eight_bit_adamw_holds_as_much_state_as_its_formula_says():
    """Two bytes a value and two fp32 scales for 256 values; below 4096 values eight bytes."""
    trained, optimizer, _ = fit(Full8bit(), hyperparams(max_steps=2), ROWS)
    expected = small = 0
    for p in trained.parameters():
        n = p.numel()
        small += n < 4096
        expected += 8 * n if n < 4096 else 2 * n + 2 * 4 * math.ceil(n / 256)
    assert small and small < len(list(trained.parameters()))
    tensors = {
        t.data_ptr(): t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)
    }
    held = sum(t.numel() * t.element_size() for t in tensors.values())
    assert held == expected + 2 * 256 * 4  # and the two tables of codes, shared by all


def test_eight_bit_adamw_starts_from_full_gradients_and_moves_every_weight():
    before = trained_weights(tiny.model())
    trained, _, _ = fit(Full8bit(), hyperparams(max_steps=3), ROWS)
    assert [n for n, value in trained_weights(trained).items() if torch.equal(value, before[n])] == []


def test_of_noise_too_a_subspace_holds_what_the_card_says():
    """Where no direction stands out, they hold about as much as any."""
    torch.manual_seed(0)
    gradients = [torch.randn(400, 288), with_singular_values((400, 288), (ORDER**-0.1).tolist())]
    for gradient, basis in zip(gradients, galore.top_singular_vectors(gradients, 64), strict=True):
        assert 0.99 < held(gradient, basis, 64)[0] <= 1 + 1e-6
