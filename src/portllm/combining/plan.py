"""Whether patches of one base can become one, and by which rule: from their headers and records alone."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from portllm.combining.agreed import Agreed, agree, is_of_added_tokens
from portllm.errors import Refusal
from portllm.patch.patch import Patch
from portllm.patch.record import PatchRecord
from portllm.tensors.info import TensorInfo

NOT_ADDITIVE = ("use_dora", "target_parameters", "lora_bias", "modules_to_save")
"""Fields of a configuration whose tensors are more than deltas that add up."""


@dataclass(frozen=True, slots=True)
class Exact:
    """The exact weighted sum, optionally truncated to a rank.

    Attributes:
        rank: None adds up the ranks; `auto` drops directions within rounding noise; a number truncates to it.
    """

    rank: int | Literal["auto"] | None = None

    def __str__(self) -> str:
        return "concatenate" if self.rank is None else f"concatenate-rank{self.rank}"


@dataclass(frozen=True, slots=True)
class Selected:
    """The sum of elements selected by TIES or DARE, truncated to a rank.

    Attributes:
        method: `ties` or `dare`.
        density: Fraction of each delta's elements to keep, above 0 and at most 1.
        rank: Rank of the result; None for the sum of the patches' ranks.
        seed: Random seed.
    """

    method: Literal["ties", "dare"]
    density: float
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise ValueError(f"density {self.density}: must be above 0 and at most 1.")

    def __str__(self) -> str:
        rank = "" if self.rank is None else f"-rank{self.rank}"
        return f"{self.method}-density{self.density:g}-seed{self.seed}{rank}"


Combination = Exact | Selected

EXACT = Exact()


@dataclass(frozen=True, slots=True)
class CombinePlan:
    """Patches about to become one.

    Attributes:
        patches: What goes in.
        weights: One for each.
        how: The combination rule.
        modules: For each module of the result, the numbers of the patches that change it.
        refusals: Every reason not to run.
        agreed: What goes along as it is.
    """

    patches: tuple[Patch[TensorInfo], ...]
    weights: tuple[float, ...]
    how: Combination
    modules: Mapping[str, tuple[int, ...]]
    refusals: tuple[Refusal, ...]
    agreed: Agreed


@dataclass(frozen=True, slots=True)
class CombineReport:
    """Result of combining patches.

    Attributes:
        record: The content of the new `patch.json`.
        ranks: By module.
        residuals: By module, the truncation residual: the norm of what was cut off, relative to the combined delta.
        truncation_residual: Of all modules together.
    """

    record: PatchRecord
    ranks: Mapping[str, int]
    residuals: Mapping[str, float]
    truncation_residual: float

    def __repr__(self) -> str:
        return f"CombineReport({len(self.ranks)} modules, truncation_residual={self.truncation_residual:.3g})"


def plan_combine(
    patches: Sequence[Patch[TensorInfo]], *, weights: Sequence[float] | None = None, how: Combination = EXACT
) -> CombinePlan:
    """Plan to combine patches of one base.

    Args:
        patches: At least two.
        weights: One weight per patch; 1 each by default.
        how: The combination rule.

    Raises:
        ValueError: There are not as many weights as patches, or one is no number.
    """
    given = tuple(weights) if weights is not None else (1.0,) * len(patches)
    if len(given) != len(patches):
        raise ValueError(f"{len(given)} weights for {len(patches)} patches: pass one weight per patch.")
    if not all(map(math.isfinite, given)):
        raise ValueError(f"weights {given}: each must be a finite number.")
    refusals = [refusal for patch in patches for refusal in _mismatches(patch, patches[0])]
    if len(patches) < 2:
        refusals.append(Refusal("patches", f"{len(patches)} given; expected two or more."))
    modules: dict[str, tuple[int, ...]] = {}
    for module in sorted({module for patch in patches for module in patch.deltas}):
        shapes = {patch.name: patch.deltas[module].shape for patch in patches if module in patch.deltas}
        if len(set(shapes.values())) > 1:
            said = ", ".join(f"(out={out}, in={width}) in {name}" for name, (out, width) in shapes.items())
            refusals.append(Refusal(module, f"the deltas are {said}. Only deltas of the same shape can be combined."))
        numbers = tuple(n for n, patch in enumerate(patches) if module in patch.deltas and given[n])
        if numbers:
            modules[module] = numbers
    if not modules:
        refusals.append(Refusal("--weights", "all weights are zero, so the result would be empty."))
    agreed = agree([patch for patch, weight in zip(patches, given, strict=True) if weight] or patches)
    refusals += agreed.refusals
    return CombinePlan(tuple(patches), given, how, modules, tuple(sorted(refusals)), agreed)


def _weights_of(record: PatchRecord) -> str:
    fitted = record.capture.fitted_to
    return "the base itself" if fitted is None else f"the base quantized to {fitted.scheme}"


def _mismatches(patch: Patch[TensorInfo], first: Patch[TensorInfo]) -> list[Refusal]:
    """Why one patch cannot be combined with the first."""
    if patch.record is None:
        return [
            Refusal(
                patch.name,
                "has no patch.json, so its base is unknown. Record it once: portllm capture --adapter "
                f"{patch.name} --base BASE -o PATCH.",
            )
        ]
    refusals = []
    if first.record is not None and patch.record.base.fingerprint != first.record.base.fingerprint:
        refusals.append(
            Refusal(
                patch.name,
                f"belongs to {patch.record.base.name} ({patch.record.base.fingerprint}), {first.name} to "
                f"{first.record.base.name} ({first.record.base.fingerprint}). Port it first: portllm port "
                f"{patch.name} --evolved {first.record.base.name} -o PATCH.",
            )
        )
    if first.record is not None and patch.record.capture.fitted_to != first.record.capture.fitted_to:
        refusals.append(
            Refusal(
                patch.name,
                f"was trained on {_weights_of(patch.record)}, but {first.name} on {_weights_of(first.record)}: "
                "their sum would match neither.",
            )
        )
    used = [field for field in NOT_ADDITIVE if patch.config.fields.get(field)]
    if patch.config.fields.get("bias") not in (None, "none"):
        used.append("bias")
    if not is_of_added_tokens(patch):
        used.append("trainable_token_indices")
    if patch.values or patch.resized or used:
        refusals.append(
            Refusal(
                patch.name,
                f"contains more than low-rank deltas ({', '.join(used) or 'tensors stored in full'}), and only "
                "those can be added. Capture it from checkpoints with --dense drop, or train it without these.",
            )
        )
    if bool(patch.config.fields.get("fan_in_fan_out")) != bool(first.config.fields.get("fan_in_fan_out")):
        refusals.append(Refusal(patch.name, f"its fan_in_fan_out differs from that of {first.name}."))
    return refusals
