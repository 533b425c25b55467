"""Which quantized weights a patch was fitted to, and whether they can be had again. Headers and samples only."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal
from portllm.measures.drift import DriftSums, measure_drift
from portllm.measures.four_bit import SCHEMES
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_spans, sample_span

OPTION = "--quantized-base"

LEAST_COSINE = 0.9
"""Of a weight and what is left of it: 0.995 for NF4, 0.97 for the two bits of Q2_K; 0 for another model."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """The quantized weights that deltas were fitted to.

    Attributes:
        scheme: How they are quantized.
        source: Where they are had from, for people.
        weights: They themselves, by the tensor of the model merged into; empty where they are computed from it.
        left_alone: Where they are computed: linear modules that were not quantized, by the ends of their names; the
            output head, unless transformers was told otherwise.
    """

    scheme: str
    source: str
    weights: Mapping[str, TensorInfo] = field(default_factory=dict)
    left_alone: tuple[str, ...] = ()


def fitted_of(patch: Patch[TensorInfo], into: Checkpoint, quantized: Checkpoint | None) -> Fitted | None:
    """The quantized weights that a patch was fitted to; None where it was not, or they cannot be had."""
    if patch.record is None:
        return None
    if quantized is not None:
        return Fitted(quantized.quantization or "", quantized.name, _weights(patch, into, quantized))
    told = patch.record.capture.fitted_to
    source = f"{into.name}, quantized the same way"
    if told is not None:
        return Fitted(told.scheme, source, left_alone=told.left_alone)
    scheme = quantization_of(patch)
    return Fitted(scheme, source, left_alone=(into.head_module,)) if scheme in SCHEMES and scheme is not None else None


def quantization_of(patch: Patch[TensorInfo]) -> str | None:
    """How the weights that a patch was first made for are quantized, whether they can be had or not; else None."""
    if patch.record is None:
        return None
    if patch.record.capture.fitted_to is not None:
        return patch.record.capture.fitted_to.scheme
    first = patch.record.ports[0].source if patch.record.ports else patch.record.base
    return first.quantization


def misnamed(patch: Patch[TensorInfo], into: Checkpoint, quantized: Checkpoint) -> Iterator[Refusal]:
    """Why a model is not the quantized base of a patch, or not made from the model that is merged into."""
    if quantized.quantization is None:
        yield Refusal(OPTION, f"{quantized.name} is not quantized. Merge into the model that the patch belongs to.")
    elif patch.record is None:
        yield Refusal(
            OPTION, f"{patch.name} has no patch.json that records the weights it was trained on. Capture it first."
        )
    elif patch.record.ports:
        yield Refusal(
            OPTION,
            f"{patch.name} was trained on quantized weights and has been ported since: their difference from "
            f"{into.name} is no longer their quantization error alone. Omit the option.",
        )
    elif identify(quantized).fingerprint != patch.record.base.fingerprint:
        yield Refusal(
            OPTION,
            f"{quantized.name} is not {patch.record.base.name} ({patch.record.base.fingerprint}), which the patch "
            f"{patch.name} belongs to.",
        )
    elif (cosine := _likeness(_weights(patch, into, quantized), into)) < LEAST_COSINE:
        yield Refusal(
            OPTION,
            f"{quantized.name} is not a quantization of {into.name}: the cosine of their weights is {cosine:.3f}. "
            "Merge into the model that it was made from.",
        )


def _weights(patch: Patch[TensorInfo], into: Checkpoint, quantized: Checkpoint) -> dict[str, TensorInfo]:
    """The quantized form of each weight that the patch changes, by its name in the model merged into."""
    weights = {}
    for module in patch.deltas:
        mine, theirs = into.tensor(module + WEIGHT), quantized.tensor(module + WEIGHT)
        if mine is not None and theirs is not None and theirs.encoding is not None and mine.shape == theirs.shape:
            weights[mine.name] = theirs
    return weights


def _likeness(weights: Mapping[str, TensorInfo], into: Checkpoint) -> float:
    """The cosine of quantized weights and those they were made from, from samples."""
    spans = [
        (info, *sample_span(into.infos[name]))
        for name, stored in weights.items()
        for info in (into.infos[name], stored)
    ]
    values = load_spans(spans)
    sums = sum((measure_drift(old, new) for old, new in zip(values, values, strict=True)), DriftSums())
    return sums.cosine if sums.base_sq else 1.0
