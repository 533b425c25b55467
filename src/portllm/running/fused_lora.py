"""LoRA layers that go over memory fewer times than PEFT's own, for models that are only read.

PEFT multiplies by B, scales, and adds: three tensors as large as the output, where a product that adds needs none. In
bfloat16 PEFT does all of that in float32, since it keeps factors so, which takes longer than the layer itself. Here it
is done in bfloat16, whose products are summed in float32, by factors that are split in two parts so that they are what
they were.
"""

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear

from portllm.foreign import LoraLinear, PeftModel


def fuse(model: PeftModel) -> PeftModel:
    """The model, whose plain LoRA layers from now on compute `x Wᵀ + Σ s (x Aᵀ) Bᵀ` in two products an adapter.

    In float32 and bfloat16 and without gradients; all else, and what is not plain LoRA, is left to PEFT. Results are
    PEFT's, up to the rounding of sums.

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
        a, b = _in_dtype(layer.lora_A[name].weight, layer.lora_B[name].weight, x.dtype)
        rows.addmm_(linear(inputs, a), b.T, alpha=layer.scaling[name])
    return rows.view_as(said)


def _in_dtype(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors in a dtype; where that has fewer bits, of three times the rank, with the product but for its last bits.

    Each is the sum of what the dtype holds of it and of the rest: `B A = B1 A1 + B1 A2 + B2 A1 + B2 A2`, of which the
    last is too small to count.
    """
    if a.dtype == dtype:
        return a, b
    (a1, a2), (b1, b2) = (_halves(factor, dtype) for factor in (a, b))
    return torch.cat([a1, a2, a1]), torch.cat([b1, b1, b2], dim=1)


def _halves(factor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    first = factor.to(dtype)
    return first, (factor - first).to(dtype)


def _is_plain(layer: LoraLinear, names: list[str], x: torch.Tensor) -> bool:
    factors = [factor for name in names for factor in (layer.lora_A[name], layer.lora_B[name])]
    return (
        type(layer.base_layer) is torch.nn.Linear
        and not (torch.is_grad_enabled() or layer.training or layer.merged or layer.disable_adapters)
        and layer.lora_variant.keys().isdisjoint(names)
        and all(factor.bias is None for factor in factors)
        and x.dtype == layer.base_layer.weight.dtype in (torch.float32, torch.bfloat16)
        and {factor.weight.dtype for factor in factors} <= {x.dtype, torch.float32}
    )
