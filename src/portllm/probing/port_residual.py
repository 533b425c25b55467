"""The port residual of every module against the paper's yardstick and the honest one; weights are read in row blocks.

The paper's Table 1 compares the residual `R = Δ' - Δ` with the naive update `W1 + Δ`, which holds the whole weight.
Whether the port is close to retraining is a question about the delta: `|R|` against `|Δ'|`. Both are given.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import NonFiniteError, Refusal, refuse
from portllm.linalg import square_sum
from portllm.matching.changes import oriented
from portllm.matching.compatibility import mismatches
from portllm.measures.residual import Residual, measure_residual
from portllm.measures.spectral import SpectralNorm, spectral_norm
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta
from portllm.patch.low_rank import load_delta
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load_rows

NORMS = ("frobenius", "spectral")
Ratios = dict[str, float | None]
"""By norm; None where the yardstick is zero."""

BLOCK_ELEMENTS = 1 << 22
KEPT_ELEMENTS = 1 << 26
"""A weight of no more elements stays in memory while it is multiplied with; a larger one is read at each product."""


@dataclass(frozen=True, slots=True)
class ModuleResidual:
    """One module.

    Attributes:
        deltas: Ported and retrained delta beside each other.
        update_frobenius: `|W1 + Δ|`.
        update_spectral: `|W1 + Δ|₂`.
    """

    deltas: Residual
    update_frobenius: float
    update_spectral: SpectralNorm

    @property
    def of_update(self) -> Ratios:
        """`|R| / |W1 + Δ|` in both norms: the paper's yardstick."""
        return _ratios(_norms(self.deltas.residual), self._update)

    @property
    def of_delta(self) -> Ratios:
        """`|R| / |Δ'|` in both norms: the honest yardstick."""
        return _ratios(_norms(self.deltas.residual), _norms(self.deltas.retrained))

    def to_json(self) -> dict[str, object]:
        """All numbers."""
        found = self.deltas
        return {
            "residual": {
                **_norms(found.residual),
                "rank": len(found.residual),
                "singular_values": list(found.residual),
            },
            "ported": {**_norms(found.ported), "singular_values": list(found.ported)},
            "retrained": {**_norms(found.retrained), "singular_values": list(found.retrained)},
            "update": {**self._update, "spectral_tolerance": self.update_spectral.tolerance},
            "of_update": self.of_update,
            "of_delta": self.of_delta,
            "cosine": found.cosine,
            "column_cosines": list(found.column_cosines),
            "row_cosines": list(found.row_cosines),
        }

    @property
    def _update(self) -> dict[str, float]:
        return {"frobenius": self.update_frobenius, "spectral": self.update_spectral.value}


@dataclass(frozen=True, slots=True)
class PortResidual:
    """All modules.

    Attributes:
        modules: By name.
    """

    modules: Mapping[str, ModuleResidual]

    def to_json(self) -> dict[str, object]:
        """The modules, and all of them as one block-diagonal matrix.

        Squares add up in its Frobenius norm, and its spectral norm is the largest of the modules'. `mean_of_update` and
        `mean_of_delta` are means of the modules' ratios.
        """
        found = [module.deltas for module in self.modules.values()]
        residual, ported, retrained = (
            {"frobenius": math.hypot(*(value for part in parts for value in part)), "spectral": _largest(parts)}
            for parts in (
                [module.residual for module in found],
                [module.ported for module in found],
                [module.retrained for module in found],
            )
        )
        update = {
            "frobenius": math.hypot(*(module.update_frobenius for module in self.modules.values())),
            "spectral": max(module.update_spectral.value for module in self.modules.values()),
        }
        norms = ported["frobenius"] * retrained["frobenius"]
        return {
            "total": {
                "residual": residual,
                "ported": ported,
                "retrained": retrained,
                "update": update,
                "of_update": _ratios(residual, update),
                "of_delta": _ratios(residual, retrained),
                "mean_of_update": _mean([module.of_update for module in self.modules.values()]),
                "mean_of_delta": _mean([module.of_delta for module in self.modules.values()]),
                "cosine": sum(module.product for module in found) / norms if norms else None,
            },
            "modules": {name: module.to_json() for name, module in self.modules.items()},
        }


def port_residual(
    evolved: Checkpoint,
    ported: Patch[TensorInfo],
    retrained: Patch[TensorInfo],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> PortResidual:
    """Compare a ported patch with one that was trained on the evolved model, module by module.

    Args:
        evolved: The model that both fit.
        ported: Of plain LoRA deltas.
        retrained: Of plain LoRA deltas of the same modules.
        seed: Of the first vectors of the spectral norms.
        progress: Progress callback (modules).

    Raises:
        PlanRefusedError: A patch does not fit, holds more than LoRA deltas, or the modules differ; with every reason.
        NonFiniteError: A weight or a delta holds an infinity or NaN.
    """
    refuse([*mismatches(ported, evolved), *mismatches(retrained, evolved), *incomparable(ported, retrained)])
    ported, retrained = oriented(ported, evolved), oriented(retrained, evolved)
    modules: dict[str, ModuleResidual] = {}
    for module in ported.deltas:
        one, other = (load_delta(patch.deltas[module]) for patch in (ported, retrained))
        deltas = measure_residual(one, other)
        weight = evolved.tensor(module + WEIGHT)
        if weight is None:
            raise AssertionError("the patch fits the model")
        modules[module] = ModuleResidual(deltas, *_update_norms(module, weight, one, seed=seed))
        progress("residual", len(modules), len(ported.deltas), "tensors")
    return PortResidual(modules)


def incomparable(ported: Patch[TensorInfo], retrained: Patch[TensorInfo]) -> Iterator[Refusal]:
    """Why two patches are not LoRA deltas of the same weights, and nothing else."""
    for patch in (ported, retrained):
        if not patch.is_plain_lora:
            yield Refusal(
                patch.name,
                "contains more than plain LoRA deltas (a DoRA magnitude, experts, saved tensors, token rows or "
                "biases); the residual is only defined for plain LoRA. Compare plain LoRA patches.",
            )
    for module in sorted(ported.deltas.keys() ^ retrained.deltas.keys()):
        there, lacks = (ported, retrained) if module in ported.deltas else (retrained, ported)
        yield Refusal(module, f"{there.name} changes it, but {lacks.name} does not. Train both on the same modules.")


def _update_norms(
    module: str, weight: TensorInfo, delta: LowRankDelta[Tensor], *, seed: int
) -> tuple[float, SpectralNorm]:
    """`|W1 + Δ|` and `|W1 + Δ|₂`."""
    left, right = delta.b.float() * delta.scale, delta.a.float()
    if delta.transposed:
        left, right = right.T, left.T
    blocks = _blocks(weight)
    total = sum(square_sum(rows + left[start : start + len(rows)] @ right) for start, rows in blocks())
    if not math.isfinite(total):
        raise NonFiniteError(
            f"'{module}': its weight or its delta contains an infinity or NaN, so nothing can be measured."
        )

    def gram(x: Tensor) -> Tensor:
        vector = x.float()
        inner, image = right @ vector, torch.zeros_like(x)
        for start, rows in blocks():
            part = left[start : start + len(rows)]
            y = rows @ vector + part @ inner
            image += (y @ rows + (y @ part) @ right).double()
        return image

    return math.sqrt(total), spectral_norm(gram, weight.shape[1], seed=seed)


def _blocks(weight: TensorInfo) -> Callable[[], Iterator[tuple[int, Tensor]]]:
    """Runs through the rows of a weight, in float32, as often as it is called."""
    step = max(1, BLOCK_ELEMENTS // weight.shape[1])

    def read() -> Iterator[tuple[int, Tensor]]:
        for start in range(0, weight.shape[0], step):
            yield start, load_rows(weight, start, min(start + step, weight.shape[0])).float()

    if weight.n_params > KEPT_ELEMENTS:
        return read
    kept = list(read())
    return lambda: iter(kept)


def _norms(values: tuple[float, ...]) -> dict[str, float]:
    return {"frobenius": math.hypot(*values), "spectral": values[0] if values else 0.0}


def _largest(parts: list[tuple[float, ...]]) -> float:
    return max((part[0] for part in parts if part), default=0.0)


def _ratios(one: Mapping[str, float], other: Mapping[str, float]) -> Ratios:
    return {kind: one[kind] / other[kind] if other[kind] else None for kind in NORMS}


def _mean(modules: list[Ratios]) -> Ratios:
    found = {kind: [ratio for module in modules if (ratio := module[kind]) is not None] for kind in NORMS}
    return {kind: math.fsum(ratios) / len(ratios) if ratios else None for kind, ratios in found.items()}
