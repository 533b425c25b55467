"""Is a model the base that a patch belongs to? By fingerprint, and by samples rounded to another dtype."""

from collections.abc import Iterator

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint_in
from portllm.errors import Refusal
from portllm.matching.compatibility import unmatchable
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo


def base_mismatch(
    patch: Patch[TensorInfo],
    given: ModelIdentity,
    *,
    model: Checkpoint,
    option: str,
    allow_other_base: bool,
    evolved: ModelIdentity | None = None,
) -> Iterator[Refusal]:
    """Why a model is not the one that a patch belongs to; nothing where the patch does not say, or it is meant.

    Args:
        patch: The patch.
        given: The identity of the model that was given for its base.
        model: That model.
        option: By which it was given.
        allow_other_base: Whether any model is meant.
        evolved: The model that was given to port to, if one was.
    """
    if patch.record is None or allow_other_base or patch.record.base.fingerprint == given.fingerprint:
        return
    belongs = patch.record.base
    if evolved is not None and evolved.fingerprint == belongs.fingerprint:
        yield Refusal(
            option,
            f"{evolved.name}, which was given as the evolved model, is the base that patch '{patch.name}' belongs to: "
            f"the two are swapped. Pass --base {evolved.name} --evolved {given.name}.",
            is_of_input=True,
        )
        return
    if (dtype := same_in(model, belongs)) is not None:
        yield Refusal(
            option,
            f"{given.name} is the base that patch '{patch.name}' belongs to, {belongs.name}, in another dtype: their "
            f"samples are the same numbers in {dtype}. Pass {belongs.name}, or --allow-other-base to take one for the "
            "other.",
            is_of_input=True,
        )
        return
    hint = (
        " A file that stores the experts differently (individually or stacked) also has another fingerprint."
        if model.expert_parts
        else ""
    )
    yield Refusal(
        option,
        f"{given.name} has the fingerprint {given.fingerprint}, but patch '{patch.name}' belongs to "
        f"{belongs.name} ({belongs.fingerprint}). Pass that model, port the patch (portllm port {patch.name} "
        f"--evolved {given.name} -o PORTED), or pass --allow-other-base if this is "
        f"intended.{hint}{_of_quantized(belongs, given) if option == '--into' else ''}",
        is_of_input=True,
    )


def same_in(model: Checkpoint, other: ModelIdentity) -> str | None:
    """The dtype in which two models are the same numbers, rounded, by what both fingerprints sample; else None."""
    if model.is_quantized or other.quantization is not None:
        return None
    given = identify(model)
    if (
        rounded := next((dtype for dtype, mark in other.rounded.items() if mark == given.fingerprint), None)
    ) is not None:
        return rounded
    return next((dtype for dtype in FLOAT_DTYPES if fingerprint_in(model, dtype) == other.fingerprint), None)


def _of_quantized(belongs: ModelIdentity, given: ModelIdentity) -> str:
    """The way to merge what was fitted to quantized weights into those that they were made from."""
    if belongs.quantization is None or given.quantization is not None:
        return ""
    return f" If {belongs.name} was quantized from {given.name}, add --quantized-base {belongs.name}."


def base_refusals(patch: Patch[TensorInfo], base: Checkpoint, *, option: str) -> Iterator[Refusal]:
    """Why a patch is not one of a model: it says so, or PEFT could take forever to find its modules."""
    given = identify(base)
    if patch.record is not None and patch.record.base.fingerprint != given.fingerprint:
        belongs = patch.record.base
        yield Refusal(
            option,
            f"patch '{patch.name}' belongs to {belongs.name} ({belongs.fingerprint}), not to {base.name} "
            f"({given.fingerprint}). Pass that model, or port the patch first with 'portllm port'.",
        )
    yield from unmatchable(patch, base, option=option)
