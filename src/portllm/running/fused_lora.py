"""LoRA layers that go over memory fewer times than PEFT's own, for models that are only read.

PEFT multiplies by B, scales, and adds: three tensors as large as the output, where a product that adds makes one.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from portllm.foreign import LoraLinear, PeftModel


def fuse(model: PeftModel) -> PeftModel:
    """The model, whose plain LoRA layers from now on compute `x Wᵀ + Σ s (x Aᵀ) Bᵀ` in two products an adapter.

    In float32 and without gradients; all else, and what is not plain LoRA, is left to PEFT. Results are PEFT's, up to
    the rounding of sums.

    Args:
        model: With at least one adapter on it; others may be put beside and switched on later.
    """
    for layer in model.modules():
        if isinstance(layer, LoraLinear) and "forward" not in vars(layer):
            layer.forward = partial(_forward, layer, layer.forward)
    return model


def _forward(layer: LoraLinear, by_peft: Any, x: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:  # noqa: ANN401
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or options or not _is_plain(layer, names, x):
        left: torch.Tensor = by_peft(x, *args, **options)
        return left
    said: torch.Tensor = layer.base_layer(x)
    rows, inputs = said.flatten(0, -2), x.flatten(0, -2)
    for name in names:
        inner = linear(inputs, layer.lora_A[name].weight)
        rows = torch.addmm(rows, inner, layer.lora_B[name].weight.T, alpha=layer.scaling[name])
    return rows.view_as(said)


def _is_plain(layer: LoraLinear, names: list[str], x: torch.Tensor) -> bool:
    factors = [factor for name in names for factor in (layer.lora_A[name], layer.lora_B[name])]
    return (
        type(layer.base_layer) is torch.nn.Linear
        and not (torch.is_grad_enabled() or layer.training or layer.merged or layer.disable_adapters)
        and layer.lora_variant.keys().isdisjoint(names)
        and all(factor.bias is None for factor in factors)
        and {x.dtype, *(each.weight.dtype for each in (layer.base_layer, *factors))} == {torch.float32}
    )
