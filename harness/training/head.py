"""The one LM-head path: log-probabilities of target tokens, never holding the logits of a batch.

With a vocabulary of 262,144 the logits of a batch are its largest tensor by far. Here only the hidden
states of the target positions meet the head, some rows at a time, and backward computes them again.
"""

from contextlib import contextmanager

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 2**26  # logits at a time: 256 MiB in fp32, and still large matrix products


def token_logps(model, batch: dict) -> torch.Tensor:
    """(B, T-1): log p of each next token that is a target, in fp32; 0 where there is no target.

    `batch` holds input_ids, attention_mask and labels, each (B, T); label t says what stands at t,
    -100 that nothing is learned there. Where it holds position_ids, rows are packed, and each of them
    begins at position 0.
    """
    return token_scores(model, batch)[0]


def token_scores(model, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """As token_logps, and beside it (B, T-1) booleans: the target was the most likely token."""
    causal = causal_lm(model)
    decoder = causal.get_decoder()
    packed = "position_ids" in batch  # without a mask, transformers keeps attention within each row
    placed = {name: batch[name] for name in (["position_ids"] if packed else ["attention_mask"])}
    placed |= {name: batch[name] for name in getattr(decoder, "reads", ())}  # what a method's hooks ask for
    hidden = decoder(input_ids=batch["input_ids"], use_cache=False, **placed).last_hidden_state
    hidden = hidden[:, :-1]  # (B, T-1, H)
    labels = batch["labels"][:, 1:]
    targets = labels != -100
    hidden, labels = hidden[targets], labels[targets]  # (N, H), (N,)
    head, softcap = causal.get_output_embeddings(), text_config(causal).get("final_logit_softcapping")
    rows = max(1, CHUNK // head.weight.shape[0])
    chunks = [
        checkpoint(score, head, softcap, h, y, use_reentrant=False)
        for h, y in zip(hidden.split(rows), labels.split(rows), strict=True)
    ] or [(hidden.new_zeros(0, dtype=torch.float32), labels.bool())]
    logps = torch.zeros(targets.shape, dtype=torch.float32, device=hidden.device)
    hits = torch.zeros(targets.shape, dtype=torch.bool, device=hidden.device)
    logps[targets] = torch.cat([c[0] for c in chunks])
    hits[targets] = torch.cat([c[1] for c in chunks])
    return logps, hits


def score(head, softcap, hidden, labels):
    """(N, H), (N,) -> (N,) log-probabilities and (N,) hits."""
    logits = head(hidden).float()  # (N, V)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logps = -torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return logps, logits.argmax(-1) == labels


def causal_lm(model):
    """The transformers model inside whatever wraps it; adapters live in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_config(causal) -> dict:
    return causal.config.get_text_config().to_dict()


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
    hooks += [m.register_forward_hook(made) for m in [*matrices, causal.get_output_embeddings()]]
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
    same log-probabilities apart and packed, up to much less than mixing them would change."""

    def scores(batch):
        return token_logps(model, batch)[batch["labels"][:, 1:] != -100]

    name, remedy = type(causal_lm(model)).__name__, "use --set hp.packing=false"
    try:
        found = scores(packed)
    except TypeError as error:
        return f"{name} cannot read packed rows ({error}): {remedy}"
    expected, mixed = scores(apart), scores({k: v for k, v in packed.items() if k != "position_ids"})
    # The mean: of rounding in bf16 it is small, and a leak reaches every token after it.
    difference, leak = ((x - expected).abs().mean().item() for x in (found, mixed))
    if not difference <= min(tolerance(model), leak / 4):
        return f"{name} mixes packed rows (log-probabilities change by {difference:.3g}): {remedy}"
    return None


def tolerance(model) -> float:
    return 0.05 if model.dtype == torch.bfloat16 else 1e-3
