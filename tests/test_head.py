"""The one LM-head path against the model's own logits, labels and loss."""

import pytest
import tiny
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CohereConfig, Gemma2Config, GraniteConfig, LlamaConfig

from harness.data.batches import collate, pack
from harness.training import head, head_kernel
from methods.lora import LoRA

SMALL = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
    "pad_token_id": tiny.PAD,
    "eos_token_id": tiny.EOS,
    "bos_token_id": tiny.BOS,
}
GEMMA2 = Gemma2Config(**SMALL, head_dim=16, query_pre_attn_scalar=16, sliding_window=16,
                      final_logit_softcapping=1.5)  # fmt: skip
CONFIGS = {
    "gemma3": tiny.gemma(),
    "gemma3 untied": tiny.gemma(tie_word_embeddings=False),
    "gemma2 softcapped": GEMMA2,
    "llama": LlamaConfig(**SMALL),
}


@pytest.fixture(params=CONFIGS)
def model(request):
    return tiny.model(CONFIGS[request.param])


@pytest.fixture
def small_chunks(monkeypatch):
    """Five rows of logits at a time, and what is left in the last chunk."""
    monkeypatch.setattr(head, "CHUNK", 5 * tiny.VOCABULARY + 7)


def batch(count: int = 6, **lengths) -> dict:
    return tiny.batch(tiny.rows(count, seed=3, **lengths))


def test_logps_and_hits_are_those_of_the_models_own_logits(model, small_chunks):
    tensors = batch()
    labels, targets = tensors["labels"][:, 1:], tensors["labels"][:, 1:] != -100
    assert targets.sum() > 3 * 5 and targets.sum() % 5  # several chunks, the last one short
    logits = model(input_ids=tensors["input_ids"], attention_mask=tensors["attention_mask"]).logits[:, :-1]
    # Half of the labels are made right, as a random model's hits would be none.
    most = logits.argmax(-1)
    labels[targets] = torch.where(torch.arange(targets.sum()) % 2 == 0, most[targets], labels[targets])
    expected = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    logps, hits = head.token_scores(model, tensors)
    torch.testing.assert_close(logps, torch.where(targets, expected, 0.0), atol=1e-5, rtol=0)
    assert torch.equal(hits, (most == labels) & targets)
    assert 0 < hits.sum() < targets.sum()
    assert torch.equal(logps, head.token_logps(model, tensors))
    assert logps.dtype == torch.float32


def test_loss_and_gradient_are_those_of_the_models_own_loss(model, small_chunks):
    tensors = batch()
    loss = LoRA().loss(model, tensors, tiny.run())  # the inherited one: the masked mean
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    own = model(**tensors).loss
    own.backward()
    assert loss.item() == pytest.approx(own.item(), abs=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            found[name], p.grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_size_of_a_chunk_changes_nothing(monkeypatch):
    model, tensors = tiny.model(), batch()
    expected = head.token_logps(model, tensors)
    for rows in (1, 7, 10**6):
        monkeypatch.setattr(head, "CHUNK", rows * tiny.VOCABULARY)
        torch.testing.assert_close(head.token_logps(model, tensors), expected, atol=1e-6, rtol=0)
    monkeypatch.setattr(head, "CHUNK", 1)  # less than one row: still a row at a time
    torch.testing.assert_close(head.token_logps(model, tensors), expected, atol=1e-6, rtol=0)


def test_a_batch_without_targets_has_no_scores():
    tensors = batch()
    tensors["labels"][:] = -100
    logps, hits = head.token_scores(tiny.model(), tensors)
    assert logps.shape == hits.shape == tensors["labels"][:, 1:].shape
    assert not logps.any() and not hits.any()


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,lm_head"])
def test_an_adapter_is_read_through_even_on_the_head(targets, small_chunks):
    model, _ = tiny.attached(LoRA(targets=targets), tiny.model(CONFIGS["gemma3 untied"]))
    model.eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    tensors = batch()
    found = -head.token_logps(model, tensors).sum() / (tensors["labels"][:, 1:] != -100).sum()
    assert found.item() == pytest.approx(model(**tensors).loss.item(), abs=1e-5)
    with model.disable_adapter():
        assert found.item() != pytest.approx(model(**tensors).loss.item(), abs=1e-3)


# What is held in memory


class Largest(TorchDispatchMode):
    """The most elements that any one tensor made under it has."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for value in made if isinstance(made, (list, tuple)) else (made,):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return made


def test_the_logits_of_a_batch_are_never_held(small_chunks):
    model = tiny.model()
    tensors = batch(8, prompt=(4, 4), response=(40, 40))
    full = 8 * 40 * tiny.VOCABULARY
    seen = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with Largest() as largest:
        LoRA().loss(model, tensors, tiny.run()).backward()
    assert max(rows for rows, _ in seen) <= 5
    assert sum(rows for rows, _ in seen) == 2 * 8 * 40  # forward and once more in backward; no prompt, no pad
    assert largest.elements < full / 1.5
    with Largest() as largest:  # that this gauge can see them
        model(**tensors).loss.backward()
    assert largest.elements >= full


# The check that a model is one that this path knows


def tokens(count: int = 8) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return torch.randint(len(tiny.SPECIAL), tiny.VOCABULARY, (1, count), generator=draw)


def test_the_check_passes_for_what_is_known(model):
    head.check(model, tokens())


@pytest.mark.parametrize(
    "config",
    [CohereConfig(**SMALL, logit_scale=0.25), GraniteConfig(**SMALL, logits_scaling=4.0)],
    ids=lambda config: config.model_type,
)
def test_the_check_refuses_an_architecture_that_changes_its_logits_after_the_head(config):
    with pytest.raises(ValueError, match="changes its logits after the head"):
        head.check(tiny.model(config), tokens())


@pytest.mark.parametrize("change", [lambda logits: logits * 1.5, lambda logits: logits * torch.nan])
def test_the_check_refuses_changed_logits(change):
    model = tiny.model()

    def after(module, args, output):
        output.logits = change(output.logits)
        return output

    model.register_forward_hook(after)
    with pytest.raises(ValueError, match="changes its logits after the head"):
        head.check(model, tokens())


def test_the_check_passes_in_bf16():
    head.check(tiny.model().to(torch.bfloat16), tokens())


def test_the_check_leaves_no_gradient_and_no_change():
    model = tiny.model()
    before = tiny.copy_of(model)
    head.check(model, tokens())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# The check that packed rows are read as they are apart


def packed_and_apart(rows) -> tuple[dict, dict]:
    [rows] = pack(rows, 200)
    return tuple(collate(rows, tiny.PAD, "cpu", packed=packed) for packed in (0, 200))


def test_rows_that_cannot_show_whether_they_are_mixed_are_not_said_to_be():
    """One row alone, and rows whose answers lie further behind the row before than windows reach."""
    near = tiny.gemma(sliding_window=4, layer_types=["sliding_attention"] * 2)
    alone, far = tiny.rows(1), tiny.rows(4, prompt=(20, 30))
    for config, rows in ((tiny.gemma(), alone), (near, far)):
        reason = head.unpackable(tiny.model(config), *packed_and_apart(rows))
        assert reason.startswith("whether Gemma3ForCausalLM mixes packed rows cannot be told")
        assert reason.endswith("use --set hp.packing=false")
    assert head.unpackable(tiny.model(), *packed_and_apart(far)) is None
    assert head.unpackable(tiny.model(near), *packed_and_apart(tiny.rows(4, prompt=(0, 2)))) is None


@pytest.mark.parametrize(
    ("packed", "mixed", "said"),
    [
        (1e-5, 0.1, None),
        (4e-7, 3e-7, "cannot be told"),  # rounding
        (0.0, 3e-7, "cannot be told"),
        (4e-4, 6e-4, "cannot be told"),
        (0.1, 0.1, "mixes packed rows (log-probabilities change by 0.1)"),
        (0.1, 9.0, "mixes packed rows (log-probabilities change by 0.1)"),
        (torch.nan, 0.1, "mixes packed rows (log-probabilities change by nan)"),
    ],
)
def test_what_is_said_of_packed_rows_is_as_far_as_they_show_it(packed, mixed, said, monkeypatch):
    apart, together = ({"labels": torch.ones(1, 5), **more} for more in ({}, {"position_ids": None}))

    def changed(model, batch):
        change = packed if "position_ids" in batch else 0.0 if batch is apart else mixed
        return torch.full((1, 4), change)

    monkeypatch.setattr(head, "token_logps", changed)
    reason = head.unpackable(tiny.model(), apart, together)
    assert said in reason if said else reason is None


def test_rows_that_are_mixed_are_said_to_be():
    apart, packed = packed_and_apart(tiny.rows(4))
    mixed = packed | {"position_ids": torch.arange(packed["labels"].shape[1])[None]}
    reason = head.unpackable(tiny.model(), apart, mixed)
    assert reason.startswith("Gemma3ForCausalLM mixes packed rows (log-probabilities change by ")


@pytest.mark.skipif(not (head_kernel.triton and torch.cuda.is_available()), reason="a kernel of a GPU")
@pytest.mark.parametrize("columns", [300, 8192, 20001])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_gives_torchs_log_probabilities_and_slopes(columns, softcap, dtype):
    draw = torch.Generator("cuda").manual_seed(0)
    logits = (3 * torch.randn(6, columns, generator=draw, device="cuda")).to(dtype)
    labels, weights = (
        torch.randint(columns, (6,), generator=draw, device="cuda"),
        torch.randn(6, device="cuda"),
    )
    labels[2] = -100
    products = logits.double().requires_grad_()
    capped = softcap * torch.tanh(products / softcap) if softcap else products
    expected = -cross_entropy(capped, labels, reduction="none")
    for given in (None, weights):
        weighted = torch.ones(6, device="cuda").double() if given is None else given.double()
        [slopes] = torch.autograd.grad(expected, products, weighted, retain_graph=True)
        replaced, kept = logits.clone(), logits.clone()
        found = head_kernel.log_probabilities(replaced, labels, softcap, given)
        torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(replaced.double(), slopes, atol=1e-5, rtol=1e-2)
        again = head_kernel.log_probabilities(kept, labels, softcap, given, replace=False)
        assert torch.equal(again, found) and torch.equal(kept, logits)
