"""Does a patch fit a model? From headers and fingerprints; every reason why not is gathered, none is raised."""

from collections.abc import Iterator

from portllm.checkpoint.header import FLOAT_DTYPES, TensorInfo
from portllm.checkpoint.reader import Checkpoint, read_bytes
from portllm.checkpoint.ties import EMBEDDING_SUFFIX, HEAD_MODULE, tied_embedding
from portllm.errors import Refusal
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity

WEIGHT = ".weight"
COMPARED_BYTES = 1 << 24


def linear_weights(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    """The weight of every module that a low-rank delta can belong to, by module name.

    A head that is tied to the embedding is such a module too: its weight is the embedding's.
    """
    weights = {
        name.removesuffix(WEIGHT): info
        for name, info in checkpoint.infos.items()
        if name.endswith(WEIGHT) and len(info.shape) == 2 and not name.endswith(EMBEDDING_SUFFIX)
    }
    shared = tied_embedding(checkpoint)
    return weights if shared is None else {**weights, HEAD_MODULE: shared}


def misfits(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Iterator[Refusal]:
    """Why a patch's deltas cannot be added to a model's weights: both ways, nothing is left unaccounted for."""
    weights = linear_weights(checkpoint)
    named = set(patch.config.targets([*weights, *patch.deltas]))
    for module, delta in patch.deltas.items():
        weight = weights.get(module)
        if weight is None:
            yield Refusal(
                module, f"the patch changes it, {checkpoint.name} has no such module.{_near(module, weights)}"
            )
        elif weight.shape != delta.shape:
            yield Refusal(
                module,
                f"the delta is (out={delta.shape[0]}, in={delta.shape[1]}), its weight in {checkpoint.name} is "
                f"(out={weight.shape[0]}, in={weight.shape[1]}). Adding needs equal shapes.",
            )
        elif weight.dtype not in FLOAT_DTYPES:
            yield Refusal(
                module,
                f"its weight in {checkpoint.name} is stored as {weight.dtype}; a delta is added to "
                f"{', '.join(FLOAT_DTYPES)} only. Use the unquantized model.",
            )
    for module in patch.deltas:
        if module not in named:
            yield Refusal(
                module,
                "the patch has tensors for it, adapter_config.json does not name it, so PEFT would drop them without a "
                "word. Add it to target_modules, or take the tensors out.",
            )
    for module in weights:
        if module in named and module not in patch.deltas:
            yield Refusal(
                module,
                f"adapter_config.json names it and {checkpoint.name} has it, the patch has no tensors for it. "
                "Part of the adapter is missing, or it was made for another model.",
            )


def altered_copies(patch: Patch[TensorInfo], base: Checkpoint) -> Iterator[Refusal]:
    """Where a copy of the base's weight that an adapter carries is not this base's."""
    weights = linear_weights(base)
    for module, copy in patch.base_copies.items():
        weight = weights.get(module)
        if weight is None or not _same_bytes(copy, weight):
            yield Refusal(
                module,
                f"the adapter carries a copy of its base's weight, and that is not the weight of {base.name}: it "
                "belongs to another base, or trained this module whole, which is not supported.",
            )


def base_mismatch(
    patch: Patch[TensorInfo], given: ModelIdentity, *, option: str, allow_other_base: bool
) -> Iterator[Refusal]:
    """Why a model is not the one that a patch belongs to; nothing where the patch does not say, or it is meant."""
    if patch.record is None or allow_other_base or patch.record.base.fingerprint == given.fingerprint:
        return
    belongs = patch.record.base
    yield Refusal(
        option,
        f"{given.name} has the fingerprint {given.fingerprint}, the patch {patch.name} belongs to {belongs.name} "
        f"({belongs.fingerprint}). Give that model, carry the patch over with 'portllm port', or pass "
        "--allow-other-base if it is meant.",
    )


def _same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    starts = range(0, left.n_bytes, COMPARED_BYTES)
    spans = ((start, min(start + COMPARED_BYTES, left.n_bytes)) for start in starts)
    return all(read_bytes(left, *span) == read_bytes(right, *span) for span in spans)


def _near(module: str, weights: dict[str, TensorInfo]) -> str:
    """A hint at modules that differ only in what stands before or between the names."""
    tail = module.rsplit(".", 2)[-2:]
    near = [other for other in weights if other.endswith(".".join(tail))]
    if not near:
        return ""
    more = f" and {len(near) - 1} more" if len(near) > 1 else ""
    return f" Modules of that kind are {near[0]}{more}."
