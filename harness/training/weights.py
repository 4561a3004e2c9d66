"""The weights of a training: in which types they are held and computed with, and what became of them."""

from functools import partial

import torch

PIECE = 2**22  # values of a tensor looked at together: 32 MiB as sums of 64 bits
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a value -> what reads them as a number


class Diverged(Exception):
    """What training computes, or what it left, is not a finite number."""


def loaded_types(model) -> dict:
    """Trained parameter -> the type that it was loaded in."""
    return {p: p.dtype for p in model.parameters() if p.requires_grad}


def master_weights(model, precision: str) -> str:
    """One policy for every method: what is trained is held in fp32, what is frozen in the compute
    precision, and autocast computes. Pure bf16 weights would swallow small updates."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
    trained, frozen = (
        ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()
                          if p.requires_grad is chosen}))
        for chosen in (True, False)
    )  # fmt: skip
    return (
        f"trained parameters in {trained}"
        + f", frozen in {frozen}" * bool(frozen)
        + (f", computed in {precision}")
    )


def put_back(types: dict) -> None:
    """After the training: what was held in fp32 returns to the type in which it is saved and used."""
    for parameter, loaded in types.items():
        parameter.data = parameter.data.to(loaded)


def one_arithmetic(model, types: dict) -> None:
    """An embedding or a norm held in fp32 would lift what follows to it, up to the whole residual stream, and
    a frozen one would not: here both give the type that they were loaded in. What an embedding multiplies by
    is rounded to it as well, as Gemma's 33.94 that is 34 in bf16. Torch's own norms go by autocast alone."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, torch.nn.Parameter):
            continue
        loaded = types.get(weight)
        embeds = isinstance(module, torch.nn.Embedding)
        norm = loaded and weight.ndim == 1 and not type(module).__module__.startswith("torch.")
        if loaded in (None, torch.float32) or not (embeds or norm):
            continue
        for factor in filter(torch.is_floating_point, module.buffers() if embeds else ()):
            factor.data = factor.data.to(loaded).to(factor.dtype)
        module.register_forward_hook(partial(give, loaded))


def give(dtype, module, inputs, output):
    return output.to(dtype)


# What the training left


def fingerprints(types: dict) -> list[list[int]]:
    """Of each tensor, in the type that it will be kept in, the sum of its bits, which a change changes, and
    how many values are not finite."""

    def fingerprint(tensor, kept):
        tensor = (
            tensor.to_local() if hasattr(tensor, "to_local") else tensor
        )  # of several devices, this one's
        pieces = [p.to(kept) for p in tensor.detach().flatten().split(PIECE)]
        return torch.stack([sum(p.view(BITS[p.element_size()]).sum() for p in pieces),
                            sum(p.isfinite().logical_not().sum() for p in pieces)])  # fmt: skip

    return torch.stack([fingerprint(parameter, kept) for parameter, kept in types.items()]).tolist()


def check(before: list, after: list, training: list[dict]) -> None:
    """Of the fingerprints of what was trained. Raises Diverged where it is not finite, ValueError where
    nothing was trained."""
    if broken := sum(bad > 0 for _, bad in after):
        raise Diverged(f"{broken} of {len(after)} trained tensors were not finite after the last step")
    norms = [step["grad_norm"] for step in training if step["grad_norm"] is not None]
    if norms and not any(norms):
        raise ValueError(
            f"nothing was trained: the gradient was zero in all {len(norms)} steps, as nothing that is "
            "trained acts on this loss. Other data, or other options of the method, may help"
        )
    if before == after:
        raise ValueError(
            f"nothing was trained: no weight moved in {len(training)} steps, as far as the type that it is "
            "kept in can tell. Raise hp.learning_rate"
        )
