"""Other factors in a patch, all of one rank: the form of a LoRA that every runtime serves. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.methods.values import Values, computed, whole
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch


@dataclass(frozen=True, slots=True)
class Factors:
    """What is added to the output of a module: `b a x`, beside or in the place of what its patch adds."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]

    def beside(self, other: "Factors") -> "Factors":
        """The sum of both."""
        return Factors(torch.cat([self.a, other.a]), torch.cat([self.b, other.b], dim=1))


def add_to_b(delta: LowRankDelta[Values], change: Float[Tensor, "d_out r"]) -> LowRankDelta[Values]:
    """The delta whose B is such that `scale B` has changed by a matrix; A is as it was, byte for byte."""
    b = whole(delta.b)
    moved = (b.double() + change.double() / delta.scale).to(torch.promote_types(b.dtype, torch.float32))
    return replace(delta, b=computed(delta.b.name, moved))


def with_appended(patch: Patch[Values], more: Mapping[str, Factors]) -> Patch[Values]:
    """A patch with further factors at some modules, all modules of one rank and scale 1, padded with zeros.

    Args:
        patch: Of low-rank deltas of linear modules, and of what else it holds.
        more: By module, with or without a delta in the patch.
    """
    wide = {module: _unscaled(delta) for module, delta in patch.deltas.items() if not delta.is_embedding}
    for module, factors in more.items():
        old = wide.get(module)
        wide[module] = factors if old is None else old.beside(factors)
    rank = max(len(factors.a) for factors in wide.values())
    deltas = dict(patch.deltas)
    for module, factors in wide.items():
        a, b = _padded(factors, rank)
        old_delta = patch.deltas.get(module)
        deltas[module] = LowRankDelta(
            computed(f"{module}.a", a),
            computed(f"{module}.b", b),
            scale=1.0,
            transposed=old_delta is not None and old_delta.transposed,
            magnitude=None if old_delta is None else old_delta.magnitude,
        )
    fields = {
        **patch.config.fields,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "target_modules": sorted(deltas),
    }
    for name in ("layers_to_transform", "layers_pattern", "exclude_modules"):
        fields.pop(name, None)
    return replace(patch, deltas=dict(sorted(deltas.items())), config=AdapterConfig(fields))


def _unscaled(delta: LowRankDelta[Values]) -> Factors:
    return Factors(whole(delta.a).float(), (whole(delta.b).double() * delta.scale).float())


def _padded(factors: Factors, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - len(factors.a)
    a = torch.nn.functional.pad(factors.a.float(), (0, 0, 0, missing))
    return a, torch.nn.functional.pad(factors.b.float(), (0, missing))
