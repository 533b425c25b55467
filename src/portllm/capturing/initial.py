"""Convert an adapter that began with a part of its base's weights into one that belongs to that base as it is.

One weight is in memory at a time, where the part has to be computed from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal, refuse
from portllm.linalg import frobenius
from portllm.matching.changes import oriented
from portllm.patch.adapter_config import AdapterConfig
from portllm.patch.adapter_start import converted_fields
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta
from portllm.patch.initial_factors import (
    KNOWN_ENOUGH,
    InitialFactors,
    known_to,
    leading_columns_part,
    principal_part,
    without,
)
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.tensors.info import TensorInfo
from portllm.tensors.spool import Spool
from portllm.tensors.tensors import load

UNIT_ROUNDOFF = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-25, "F64": 2.0**-25}
"""Half a step of a storage dtype, relative: to what PEFT rounded the weights that it left; it knows no float64."""


@dataclass(frozen=True, slots=True)
class Converted:
    """An adapter that belongs to its base as it is.

    Attributes:
        patch: Its factors lie in the spool.
        known_to: By module whose part was computed anew, how exactly its delta is known, relative to its norm.
    """

    patch: Patch[TensorInfo]
    known_to: Mapping[str, float]


def convert(
    adapter: Patch[TensorInfo],
    *,
    base: Checkpoint,
    initial: Patch[TensorInfo] | None,
    spool: Spool,
    progress: Progress,
) -> Converted:
    """The adapter less what it began with.

    Args:
        adapter: It fits the base, and can be converted.
        base: The model as it was before PEFT changed it.
        initial: The adapter before training; None to compute what it began with from the weights.
        spool: Takes the new factors.
        progress: Progress callback (weights).

    Raises:
        PlanRefusedError: The weights do not determine what the adapter began with.
    """
    deltas, known, refusals = {}, {}, []
    for done, (module, delta) in enumerate(oriented(adapter, base).deltas.items(), start=1):
        if initial is not None:
            less = without(_loaded(delta), load(initial.deltas[module].a), load(initial.deltas[module].b))
        else:
            weight = base.tensor(module + WEIGHT) or base.info(module + WEIGHT)
            values = load(weight)
            began = _computed(adapter.config, delta, values)
            less = without(_loaded(delta), began.a, began.b)
            known[module] = known_to(less, began.uncertainty)
            rounded = UNIT_ROUNDOFF[weight.dtype] * frobenius(values.float())
            if known[module] > KNOWN_ENOUGH and began.uncertainty > rounded:
                refusals.append(_undetermined(module, adapter.config, known[module]))
        a, b = spool.add(f"{module}.lora_A", less.a), spool.add(f"{module}.lora_B", less.b)
        deltas[module] = replace(adapter.deltas[module], a=a, b=b)
        progress("convert", done, len(adapter.deltas), "tensors")
    refuse(refusals)
    config = AdapterConfig(converted_fields(adapter.config.fields))
    return Converted(replace(adapter, deltas=deltas, config=config, base_copies={}), known)


def _loaded(delta: LowRankDelta[TensorInfo]) -> LowRankDelta[Tensor]:
    # A magnitude stays where it is: it scales the same weight before and after.
    return LowRankDelta(a=load(delta.a), b=load(delta.b), scale=delta.scale)


def _computed(config: AdapterConfig, delta: LowRankDelta[TensorInfo], weight: Tensor) -> InitialFactors:
    oriented = weight.T if delta.transposed else weight
    part = principal_part if config.changed_base == "pissa" else leading_columns_part
    return part(oriented.to(torch.float32), rank=delta.rank, scale=delta.scale)


def _undetermined(module: str, config: AdapterConfig, known: float) -> Refusal:
    what = (
        "the singular values of its weight are nearly equal at the cut"
        if config.changed_base == "pissa"
        else "the first columns of its weight are nearly dependent"
    )
    return Refusal(
        module,
        f"{what}, so the adapter's initial factors cannot be recomputed: its delta would only be known to "
        f"{100 * known:.2g} %. Pass the adapter as it was saved before training with --initial.",
    )
