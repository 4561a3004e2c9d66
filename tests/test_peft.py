"""PEFT's adapters through the one interface: every type that is not refused, and three by their papers."""

import math
import re

import peft
import pytest
import tiny
import torch
from tiny import fit, hyperparams, trained_weights
from torch import nn

from harness.method import Unsupported, build, card, code_hash, known_methods, options, resolve
from harness.training import head
from methods.peft import SEEDS, Peft, config_class, kinds, options_of, refusal

pytestmark = pytest.mark.filterwarnings("ignore:The following rank_pattern")  # PEFT's, of its own file
ROWS = tiny.rows(22, seed=1)
NEEDED = {  # what the tiny model, or the type, leaves no default for
    "shira": {"r": 4},  # 32 would be more weights than a layer has
    "trainabletokens": {"token_indices": [5, 6, 7]},
    "waveft": {"n_frequency": 100},  # 2592 would be more than a layer has
}
MATRICES = 14  # q k v o gate up down, twice


def method(name: str, **chosen):
    return build(resolve(f"peft.{name}", known_methods()["peft"]), {**NEEDED.get(name, {}), **chosen})


def refused(name: str, **chosen) -> str:
    """The one line that a plan would print."""
    with pytest.raises(ValueError) as error:
        build(resolve(name, known_methods()["peft"]), chosen)
    [line] = str(error.value).splitlines()
    return line


def attached(made, steps: int = 4, seed: int = 0, **hp):
    """-> model, run."""
    return tiny.attached(made, None, ROWS, hyperparams(max_steps=steps, **hp), seed)


def batch() -> dict:
    return tiny.batch(ROWS[:8])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        tensors = batch()
        return model.eval()(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits


def trainable(model) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def linears() -> list[nn.Linear]:
    return [m for n, m in tiny.model().named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]


# Every type


@pytest.mark.parametrize("name", Peft.variants())
def test_a_type_trains_alone_and_is_saved_and_merged(name, tmp_path):
    made = method(name)
    before = trained_weights(attached(made)[0])
    base = tiny.model()
    untouched = {
        n: (p, p.detach().clone()) for n, p in base.named_parameters()
    }  # names change, weights do not
    trained, _, _ = fit(made, hyperparams(max_steps=4), ROWS, base=base)

    after = trained_weights(trained)
    assert before.keys() == after.keys()
    assert [n for n in before if torch.equal(before[n], after[n])] == []  # all that is trained moves
    for n, (p, value) in untouched.items():
        assert not p.requires_grad and torch.equal(p, value), n

    found = logits(trained)
    head.check(trained, batch()["input_ids"])  # nothing acts outside of the decoder that the loss calls
    made.save(trained, tmp_path)
    restored = made.restore(lambda **_: tiny.model(), tmp_path)
    # AdaLoRA saves the ranks that are left alone: sums of fewer terms.
    torch.testing.assert_close(logits(restored), found, atol=1e-5 if name == "adalora" else 1e-6, rtol=0)

    if "merging" in made.cannot:
        with pytest.raises(Unsupported):
            made.merge(trained)
    else:
        merged = made.merge(trained)
        assert not any("peft" in type(m).__module__ for m in merged.modules())
        torch.testing.assert_close(logits(merged), found, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in Peft.variants() if n != "adamss"])
def test_a_type_starts_at_its_base_as_it_says(name):
    made = method(name)
    model, run = attached(made)
    difference = (logits(model) - logits(tiny.model())).abs().max().item()
    assert (difference < 1e-5) == made.starts_at_base, difference  # the farthest that start there: 3e-6
    assert ("start" in run.record.notes) != made.starts_at_base


def test_a_start_that_was_asked_to_be_random_is_none_of_the_base():
    assert method("lora").starts_at_base and method("lora", init_lora_weights="gaussian").starts_at_base
    made = method("lora", init_lora_weights=False)
    assert not made.starts_at_base and method("lora").starts_at_base
    assert (logits(attached(made)[0]) - logits(tiny.model())).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["beft", "lily"])
def test_peft_itself_cannot_merge_what_is_said_to_be_unmergeable(name):
    with pytest.raises((ValueError, NotImplementedError)):
        attached(method(name))[0].merge_and_unload()


# What decays: a part of each trained parameter's name -> whether weight decay reaches it

DECAYS = {
    # A weight's change, or the weight itself, as a product of factors or as its own values
    "lora_A": True, "lora_B": True, "lora_E": True, "adamss_A": True, "adamss_B": True, "c3a_kernel": True,
    "deft_P": True, "deft_R": True, "delora_A": True, "delora_B": True, "glora_A": True, "glora_B": True,
    "gralora_A": True, "gralora_B": True, "hada_w": True, "hira_A": True, "hira_B": True, "lily_A": True,
    "lily_B": True, "lily_router": True, "lokr_w": True, "miss_block": True, "U_low": True, "S_low": True,
    "V_low": True, "peanut_A": True, "peanut_B": True, "randlora_lambda": True, "randlora_gamma": True,
    "shira_weight": True, "supertuning_values": True, "trainable_tokens_delta": True,
    "vblora_vector_bank": True,
    # Coefficients of fixed directions
    "fourierft_spectrum": True, "waveft_spectrum": True, "frod_lambda_s": True, "tinylora_v": True,
    "unilora_theta_d": True, "vera_lambda_b": True, "vera_lambda_d": True,
    # Scales, which stand at one or at a length; biases; norms
    "ia3_l": False, "boft_s": False, "delora_lambda": False, "frod_lambda_l": False, "psoft_R": False,
    "road_alpha": False, "beft_bias": False, "norm": False,
    # Rotations; the choice among vectors
    "boft_R": False, "oft_R": False, "hra_u": False, "road_theta": False, "vblora_logits": False,
}  # fmt: skip


@pytest.mark.parametrize("name", Peft.variants())
def test_weight_decay_reaches_what_a_change_is_made_of_and_no_scale_or_rotation(name):
    made = method(name)
    model, run = attached(made, weight_decay=0.1)
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    groups = made.optimizer(model, run).param_groups
    found = {names[p]: group["weight_decay"] for group in groups for p in group["params"]}
    for n in names.values():
        (decays,) = {DECAYS[part] for part in DECAYS if part in n}
        assert found.pop(n) == 0.1 * decays, n
    assert not found


# What is drawn


SEEDED = [n for n in Peft.variants() if {*SEEDS} & {*options_of(config_class(kinds()[n]))}]


@pytest.mark.parametrize("name", [n for n in SEEDED if n not in ("adamss", "psoft")])  # theirs is an SVD's
def test_another_seed_draws_other_projections_and_places(name):
    """With the same values trained: what a type draws is all that differs."""

    def outputs(seed, **chosen):
        model, _ = attached(method(name, **chosen), seed=seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.copy_(torch.linspace(-0.1, 0.1, p.numel()).view_as(p))
        return logits(model)

    assert torch.equal(outputs(0), outputs(0))
    assert (outputs(0) - outputs(1)).abs().max() > 1e-3
    (option,) = {*SEEDS} & {*options_of(config_class(kinds()[name]))}
    assert torch.equal(outputs(0, **{option: 5}), outputs(1, **{option: 5}))  # unless it is asked for


# Names and options


def test_every_type_of_peft_is_either_offered_or_refused_with_a_reason():
    assert Peft.variants() == sorted(name for name, kind in kinds().items() if not refusal(kind))
    left = set(kinds()) - set(Peft.variants())
    assert {peft.PeftType(kind) for kind in kinds().values()} == set(peft.PeftType)
    assert {"vera", "ia3", "oft", "boft", "adalora", "lntuning", "fourierft"} <= set(Peft.variants())
    assert {"prompttuning", "ptuning", "prefixtuning", "cpt", "poly", "xlora", "adaptionprompt"} <= left
    for name in left:
        expected = "attention" if name == "adaptionprompt" else "PeftModel.forward"
        assert expected in refused(f"peft.{name}"), name


def test_what_the_loss_would_not_reach_is_what_is_refused():
    """Prompt tuning through the harness's path is the untouched model, whatever was trained."""
    base = tiny.model()
    tokens = batch()["input_ids"]
    model = peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    own = model(input_ids=tokens).logits[:, 4:]
    assert (own - logits(tiny.model())).abs().max() > 0.1
    scores = [head.token_logps(m, batch()) for m in (model, tiny.model())]
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize(
    ("name", "chosen", "reason"),
    [
        ("peft", {}, "peft.vera.*vera"),
        ("peft.verra", {}, "did you mean vera"),
        ("peft.vera", {"rank": 4}, "unknown option"),
        ("peft.vera", {"r": "much"}, "peft.vera.r: must be a number"),
        ("peft.lora", {"use_dora": 1}, "use_dora: must be true or false"),
        ("peft.vera", {"layers_pattern": "layers"}, "layers_to_transform"),
        ("peft.adalora", {"init_r": 8, "target_r": 8}, "init_r"),
        ("peft.adalora", {"orth_reg_weight": -1.0}, "orth_reg_weight"),
        ("peft.adalora", {"total_step": 7}, "unknown option"),
        ("peft.trainabletokens", {}, "token_indices"),
        ("peft.lora", {"alora_invocation_tokens": [5]}, "PeftModel.forward"),
        ("peft.lora", {"init_lora_weights": "corda_kpm"}, "training script"),
        ("peft.lora", {"init_lora_weights": "eva"}, "training script"),
        ("peft.lora", {"init_lora_weights": "loftq"}, "scale"),
        ("peft.lora", {"kasa_config": {}}, "training script"),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(name, chosen, reason):
    assert re.search(reason, refused(name, **chosen))


def test_a_variant_is_a_method_as_any_other():
    cls = resolve("peft.vera", known_methods()["peft"])
    assert cls is resolve("peft.vera", known_methods()["peft"])
    assert cls.name == "peft.vera" and card(cls)["title"] == "VeRA (PEFT)" and card(cls)["formula"]
    assert code_hash(cls) == code_hash(resolve("peft.ia3", known_methods()["peft"]))
    made = method("vera", r=64)
    assert options(made) == {"r": 64}
    assert options(method("vera", **options(made))) == {"r": 64}


@pytest.mark.parametrize(("name", "option"), [("c3a", "block_size"), ("vblora", "vector_length"),
                                              ("road", "group_size")])  # fmt: skip
def test_sizes_that_do_not_fit_a_model_are_made_to_unless_asked_for(name, option):
    _, run = attached(method(name))
    sizes = (size for m in linears() for size in (m.in_features, m.out_features))
    assert run.record.notes[option] == math.gcd(*sizes)
    model, run = attached(method(name, **{option: 16}))
    assert getattr(model.peft_config["default"], option) == 16
    assert option not in run.record.notes
    with pytest.raises(Unsupported):
        attached(method(name, **{option: 48}))


# Sizes: closed formulas


@pytest.mark.parametrize("r", [4, 256])
def test_vera_trains_two_vectors_a_layer(r):
    assert trainable(attached(method("vera", r=r))[0]) == sum(r + m.out_features for m in linears())


def test_ia3_trains_a_factor_an_output_and_of_down_projections_an_input():
    inner = tiny.gemma().intermediate_size
    expected = sum(m.in_features if m.in_features == inner else m.out_features for m in linears())
    assert trainable(attached(method("ia3"))[0]) == expected
    some, _ = attached(method("ia3", target_modules=["k_proj", "v_proj"]))
    assert trainable(some) == 2 * (32 + 32)


@pytest.mark.parametrize("block", [8, 32])
def test_oft_trains_a_rotation_a_block(block):
    """A rotation of b inputs is a skew-symmetric matrix: b (b - 1) / 2 numbers."""
    expected = sum(m.in_features // block * (block * (block - 1) // 2) for m in linears())
    assert trainable(attached(method("oft", oft_block_size=block))[0]) == expected


def test_norm_tuning_trains_every_norm_and_nothing_else():
    norms = [p for n, p in tiny.model().named_parameters() if "norm" in n]
    assert trainable(attached(method("lntuning"))[0]) == sum(p.numel() for p in norms)


def test_token_tuning_trains_the_embeddings_of_its_tokens():
    before, (trained, _) = tiny.model(), attached(method("trainabletokens"))
    assert trainable(trained) == 3 * tiny.gemma().hidden_size
    with torch.no_grad():
        next(p for p in trained.parameters() if p.requires_grad).add_(1.0)
    ids = torch.arange(4, 9)
    change = trained.get_input_embeddings()(ids) - before.get_input_embeddings()(ids)
    assert [bool(row.any()) for row in change] == [False, True, True, True, False]


# AdaLoRA


@pytest.mark.parametrize("weight", [0.0, 0.5, 100.0])
def test_adaloras_loss_is_pefts_own(weight):
    made = method("adalora", orth_reg_weight=weight)
    model, run = attached(made)
    with torch.no_grad():  # singular values that are not zero, vectors that are not orthogonal
        for n, p in model.named_parameters():
            if "lora_" in n and p.requires_grad:
                p.normal_(std=0.1)
    tensors = {key: batch()[key] for key in ("input_ids", "attention_mask", "labels")}
    weights = [p for p in model.parameters() if p.requires_grad]
    theirs, ours = model(**tensors).loss, made.loss(model, batch(), run)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    for ours_, theirs_ in zip(*(torch.autograd.grad(x, weights) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-5, rtol=1e-4)


def live_ranks(model) -> int:
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def test_adalora_prunes_to_its_budget_by_the_papers_schedule():
    """b(t) = b_T + (b_0 - b_T) (1 - (t - t_i) / (T - t_i - t_f))^3 between two plateaus."""
    total, first, last = 20, 2, 6  # 10 % and 30 %
    made = method("adalora")
    model, run = attached(made, steps=total)
    optimizer = made.optimizer(model, run)
    for t, examples in enumerate(run.batches, 1):
        made.loss(model, run.collate(examples), run).backward()
        optimizer.step()
        optimizer.zero_grad()
        left = min(1.0, max(0.0, 1 - (t - first) / (total - first - last)))
        assert live_ranks(model) == int(MATRICES * 8 + MATRICES * (12 - 8) * left**3), t
    assert t == total


@pytest.mark.parametrize("chosen", [{}, {"target_r": 2, "init_r": 4}, {"tinit": 0, "tfinal": 0}])
def test_adalora_ends_at_its_budget_in_a_whole_training(chosen, tmp_path):
    made = method("adalora", **chosen)
    trained, _, _ = fit(made, hyperparams(max_steps=12), ROWS)
    budget = MATRICES * chosen.get("target_r", 8)
    assert live_ranks(trained) == budget
    ranks = [sum(row) for row in trained.peft_config["default"].rank_pattern.values()]
    assert sum(ranks) == budget and len(set(ranks)) > 1  # some matrices keep more than others
    found = logits(trained)
    made.save(trained, tmp_path)
    restored = made.restore(lambda **_: tiny.model(), tmp_path)
    torch.testing.assert_close(logits(restored), found, atol=1e-5, rtol=0)


def test_a_schedule_that_leaves_no_step_to_prune_is_unsupported():
    with pytest.raises(Unsupported, match="tfinal"):
        attached(method("adalora", tinit=3, tfinal=3), steps=4)
