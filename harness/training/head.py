"""The one LM-head path: log-probabilities of target tokens, never holding the logits of a batch.

With a vocabulary of 262,144 the logits of a batch are its largest tensor by far. Here only the hidden
states of the target positions meet the head, some rows at a time. Where the head is frozen, the gradients of
what it reads are made beside the log-probabilities, and backward only scales them; the logits of a trained
head are made again in backward.
"""

from contextlib import contextmanager, nullcontext

import torch
from torch.nn.functional import cross_entropy, pad
from torch.utils.checkpoint import checkpoint

from harness.training import head_kernel
from harness.training.attention import flash

CHUNK = 2**26  # logits at a time: 256 MiB in fp32, and still large matrix products
ROWS = ("cu_seq_lens", "longest")  # of a batch: where rows lie, for attention that needs no mask
FUSED_ROWS = 512  # at a time of a frozen head where slopes replace logits: 256 MiB in 16 bits; or
FUSED_SHARE = 1 / 8  # of all rows, if that is more: larger products, beside layers that hold more, too
TRAINED_ROWS = 2048  # of a trained one: each time, a gradient as large as the head is added up


def token_logps(model, batch: dict, fused: bool = False) -> torch.Tensor:
    """(B, T-1): log p of each next token that is a target, in fp32; 0 where there is no target. `fused`: by a
    kernel, where there is one.

    `batch` holds input_ids, attention_mask and labels, each (B, T); label t says what stands at t,
    -100 that nothing is learned there. Where it holds position_ids, rows are packed, and each of them
    begins at position 0. Where it holds `targets`, these are the places in the B * T tokens that are followed
    by a label, (N,), with any number of last tokens behind them, which nothing follows. Where it holds
    `cu_seq_lens` and `longest`, rows lie between these of the B * T tokens and attention needs no mask.
    """
    causal = causal_lm(model)
    hidden, labels, places = at_targets(causal, batch)
    head, softcap = causal.get_output_embeddings(), softcap_of(causal)
    if not plain(head):
        logps, _ = in_chunks(head, softcap, hidden, labels)
    else:
        learning = torch.is_grad_enabled()
        logps = LogProbabilities.apply(hidden, head.weight, labels, softcap, learning, fused)
    return on_grid(logps, places, batch)


def token_scores(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """As token_logps, and beside it (B, T-1) booleans: the target was the most likely token."""
    causal = causal_lm(model)
    hidden, labels, places = at_targets(causal, batch)
    found = in_chunks(causal.get_output_embeddings(), softcap_of(causal), hidden, labels)
    logps, hits = (on_grid(values, places, batch) for values in found)
    return logps, hits


def at_targets(causal, batch: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> (N, H) hidden states, (N,) the labels that follow them, (N,) their places in the B * T tokens."""
    labels = pad(batch["labels"][:, 1:], (0, 1), value=-100).flatten()
    places = batch.get("targets")
    if places is None:
        places = (labels != -100).nonzero()[:, 0]
    decoder = causal.get_decoder()
    packed = "position_ids" in batch  # without a mask, transformers keeps attention within each row
    given = {name: batch[name] for name in (["position_ids"] if packed else ["attention_mask"])}
    given |= {name: batch[name] for name in getattr(decoder, "reads", ())}  # what a method's hooks ask for
    if rows := batch.get("cu_seq_lens") is not None:
        given.pop("attention_mask", None)
        given |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch["cu_seq_lens"])
        given |= dict.fromkeys(("max_length_q", "max_length_k"), batch["longest"])
    with flash(causal) if rows else nullcontext():
        output = decoder(input_ids=batch["input_ids"], use_cache=False, **given)
    return output.last_hidden_state.flatten(0, 1)[places], labels[places], places  # of (B, T, H)


def on_grid(values, places, batch: dict) -> torch.Tensor:
    """(N,) -> (B, T-1), 0 where there is no target."""
    shape = batch["labels"].shape
    return values.new_zeros(shape.numel()).index_put((places,), values).view(shape)[:, :-1]


def in_chunks(head, softcap, hidden, labels) -> list[torch.Tensor]:
    """(N,) log-probabilities and (N,) hits, by the head as a module, whatever it is."""
    rows = max(1, CHUNK // head.weight.shape[0])
    chunks = [
        checkpoint(score, head, softcap, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
    ]
    return [torch.cat(values) for values in zip(*chunks, strict=True)]


def score(head, softcap, hidden, labels):
    """(N, H), (N,) -> (N,) log-probabilities and hits."""
    logits = capped(head(hidden), softcap)  # (N, V)
    return chosen(logits, labels), logits.argmax(-1) == labels


class LogProbabilities(torch.autograd.Function):
    """(N, H), (V, H), (N,) -> (N,) in fp32: log-probabilities of the labels, 0 at -100.

    A log-probability depends on one hidden state, so that its gradient is one row, which waits for backward
    whatever the loss will be. A trained head's gradient is a sum over rows that the loss weighs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, softcap, learning, fused):
        device, trained = hidden.device.type, weight.requires_grad
        ctx.fused = fused and head_kernel.serves(device)
        most = TRAINED_ROWS if trained else max(FUSED_ROWS, int(FUSED_SHARE * len(labels)))
        ctx.rows, ctx.softcap = most if ctx.fused else max(1, CHUNK // weight.shape[0]), softcap
        autocast = torch.is_autocast_enabled(device)
        ctx.dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
        ctx.ahead = learning and not trained
        with torch.autocast(device, enabled=False):
            states, matrix = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            step = with_gradients if ctx.ahead else alone
            parts = [
                step(h, matrix, y, softcap, ctx.fused)
                for h, y in zip(states.split(ctx.rows), labels.split(ctx.rows), strict=True)
            ]
        if ctx.ahead:
            ctx.save_for_backward(torch.cat([gradients for _, gradients in parts]))
            return torch.cat([logps for logps, _ in parts])
        if learning:
            ctx.save_for_backward(states, weight, labels)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        if ctx.ahead:
            [gradients] = ctx.saved_tensors
            return (gradients * grad[:, None]).to(gradients.dtype), None, None, None, None, None
        states, weight, labels = ctx.saved_tensors
        matrix, of_weight, of_states = weight.to(ctx.dtype), torch.zeros_like(weight), []
        for h, y, g in zip(*(x.split(ctx.rows) for x in (states, labels, grad)), strict=True):
            of_state, of_matrix = backwards(h, matrix, y, ctx.softcap, ctx.fused, g)
            of_states.append(of_state)
            of_weight += of_matrix
        return torch.cat(of_states), of_weight, None, None, None, None


def alone(hidden, matrix, labels, softcap, fused):
    """(N,) log-probabilities."""
    logits = hidden @ matrix.T
    if fused:
        return head_kernel.log_probabilities(logits, labels, softcap, replace=False)
    return chosen(capped(logits, softcap), labels)


def with_gradients(hidden, matrix, labels, softcap, fused):
    """(N,) log-probabilities, and (N, H) the gradient of each with respect to its hidden state."""
    logits = hidden @ matrix.T
    if fused:
        return head_kernel.log_probabilities(logits, labels, softcap), logits @ matrix
    logits = capped(logits, softcap)
    return chosen(logits, labels), slopes(logits, labels, softcap).to(matrix.dtype) @ matrix


def backwards(hidden, matrix, labels, softcap, fused, weights):
    """The gradients of the hidden states (N, H) and of the head (V, H), where each row has a weight (N,)."""
    logits = hidden @ matrix.T
    if fused:
        head_kernel.log_probabilities(logits, labels, softcap, weights)
    else:
        logits = slopes(capped(logits, softcap), labels, softcap).mul_(weights[:, None]).to(matrix.dtype)
    return logits @ matrix, logits.T @ hidden


def capped(logits, softcap):
    """In fp32, and where a model bounds its logits, bounded."""
    logits = logits.float()
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def chosen(logits, labels):
    """(N, V), (N,) -> (N,) log-probabilities, 0 at the label -100."""
    return -cross_entropy(logits, labels, reduction="none")


def slopes(logits, labels, softcap):
    """(N, V): of each log-probability with respect to the head's products."""
    columns = torch.arange(logits.shape[1], device=logits.device)
    slopes = ((columns == labels[:, None]).float() - logits.softmax(1)) * (labels >= 0)[:, None]
    return slopes * (1 - (logits / softcap) ** 2) if softcap else slopes


def plain(head) -> bool:
    """A matrix and nothing else, and nobody listens to it."""
    return type(head) is torch.nn.Linear and head.bias is None and not (
        head._forward_hooks or head._forward_pre_hooks
    )  # fmt: skip


def softcap_of(causal) -> float | None:
    return getattr(causal.config.get_text_config(), "final_logit_softcapping", None)


def causal_lm(model):
    """The transformers model inside whatever wraps it; adapters live in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def arithmetic(model):
    """-> a dict that the forwards within fill: the types of the `residual stream`, which each decoder layer
    is given, and of `products`, which each matrix gives. Null where this architecture does not show them."""
    causal = causal_lm(model)
    types: dict[str, set] = {"residual stream": set(), "products": set()}
    decoder, count = causal.get_decoder(), causal.config.get_text_config().num_hidden_layers
    lists = [m for m in decoder.children() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    layers = [layer for layers in lists for layer in layers]
    within = [m for layer in layers for m in layer.modules()]
    matrices = [m for m in within if getattr(getattr(m, "weight", None), "ndim", 0) == 2]

    def given(module, args, kwargs):
        types["residual stream"].add([*args, *kwargs.values()][0].dtype)

    def made(module, args, output):
        types["products"].add(output.dtype)

    hooks = [layer.register_forward_pre_hook(given, with_kwargs=True) for layer in layers]
    output = causal.get_output_embeddings()
    hooks += [m.register_forward_hook(made) for m in [*matrices, *getattr(output, "heads", [output])]]
    found: dict[str, str | None] = {}
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        for name, seen in types.items():
            found[name] = ", ".join(sorted(str(t).removeprefix("torch.") for t in seen)) or None


@torch.no_grad()
def check(model, tokens: torch.Tensor) -> None:
    """Raises ValueError unless this path equals the model's own logits on tokens (B, T): an
    architecture that does something else after its head must not be measured wrongly."""
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}
    batch["prompt_lengths"] = batch["attention_mask"].sum(1)  # all of it: as who is given no batch takes it
    own = model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits.float()
    own = own[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    difference = (token_logps(model, batch) - own).abs().max().item()
    if not difference <= tolerance(model):
        raise ValueError(
            f"{type(causal_lm(model)).__name__} changes its logits after the head (by {difference:.3g} in "
            "log-probability), which harness/training/head.py does not know: teach it there first"
        )


@torch.no_grad()
def unpackable(model, apart: dict, packed: dict) -> str | None:
    """Why this model cannot read packed rows, or None: the same rows, in the same order, must have the
    same log-probabilities apart and packed, up to much less than mixing them changes. Where that changes
    nothing either, as of one row, nothing is known."""

    def scores(batch):
        return token_logps(model, batch)[batch["labels"][:, 1:] != -100]

    name, remedy = type(causal_lm(model)).__name__, "use --set hp.packing=false"
    try:
        found = scores(packed)
    except TypeError as error:
        return f"{name} cannot read packed rows ({error}): {remedy}"
    expected, mixed = (
        scores(apart),
        scores({k: v for k, v in packed.items() if k not in ("position_ids", *ROWS)}),
    )
    # The mean: of rounding in bf16 it is small, and a leak reaches every token after it.
    difference, leak = ((x - expected).abs().mean().item() for x in (found, mixed))
    if not difference <= tolerance(model):
        return f"{name} mixes packed rows (log-probabilities change by {difference:.3g}): {remedy}"
    if leak <= max(2 * difference, tolerance(model) / 100):  # of fp32, such a share is rounding alone
        changes = f"log-probabilities change by {difference:.3g}, where they are mixed by {leak:.3g}"
        return f"whether {name} mixes packed rows cannot be told from these ({changes}): {remedy}"
    return None


def tolerance(model) -> float:
    device = model.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    return 0.05 if torch.bfloat16 in (model.dtype, autocast) else 1e-3
