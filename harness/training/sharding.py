"""What is trained, with gradients and moments, in parts: each device holds one of each tensor (FSDP2).

A decoder layer's weights are whole while it computes, the others' (embeddings, head) while a step does. A
model is loaded and attached whole, in the types of its files, and is whole again to be scored and saved:
2 bytes a weight must fit a card, not the 16 of a training.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from harness.training import head
from harness.training.kernels import decoder_layers
from harness.training.weights import master_weights


class Sharded(torch.nn.Module):
    """Around the model: FSDP2 gathers weights at the forward of a module, and here it is the whole of a loss,
    or of a score, by whichever way these read the model."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, what: Callable, *given: Any) -> Any:
        return what(*given)

    def apart(self) -> None:
        """Gives up what is whole at the moment: after a forward without a backward, or the next step's
        gradients would pass it by."""
        for module in self.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def shard(model: torch.nn.Module, count: int, precision: str) -> Sharded:
    """In place; what is trained is held in fp32 from then on. Every parameter is another object then."""
    whole = Sharded(model)
    mesh = init_device_mesh(next(model.parameters()).device.type, (count,))
    for module in [*decoder_layers(head.causal_lm(model)), whole]:
        master_weights(module, precision)  # a layer at a time: never all of them whole, in fp32
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
        fully_shard(module, mesh=mesh)
        module.set_force_sum_reduction_for_comms(True)  # gradients are sums over the devices, not means
        module.set_gradient_divide_factor(1.0)
    return whole


def whole_again(sharded: Sharded, kept: dict[str, torch.dtype]) -> torch.nn.Module:
    """-> the model as it was before, with its weights of now, in the types that these names have in `kept`.
    On all devices at once."""
    model, made = sharded.model, dict[torch.nn.Parameter, torch.nn.Parameter]()
    sharded.apart()
    names = {parameter: name for name, parameter in model.named_parameters()}
    for module in sharded.modules():
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            if parameter not in made:  # once, where two modules share it
                full = parameter.full_tensor().detach()  # type: ignore[attr-defined]
                full = full.to(kept.get(names[parameter], full.dtype))
                made[parameter] = torch.nn.Parameter(full, parameter.requires_grad)
            module._parameters[key] = made[parameter]
    for module in sharded.modules():
        if isinstance(module, FSDPModule):
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for number in [n for n, hook in hooks.items() if is_fsdp(hook)]:
                    del hooks[number]
                    module._forward_pre_hooks_with_kwargs.pop(number, None)
            module.__class__ = type(module).__mro__[2]  # FSDPLayer(FSDPModule, Layer)
    return model


def is_fsdp(hook: Callable) -> bool:
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of it lies on this device."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def in_full(tensor: Any) -> Any:
    """Of a tensor in parts, or of anything else itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
