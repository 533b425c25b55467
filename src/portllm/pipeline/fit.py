"""Does a patch fit a model? From headers and fingerprints; every reason why not is gathered, none is raised."""

from collections.abc import Iterator

from portllm.checkpoint.header import FLOAT_DTYPES, TensorInfo
from portllm.checkpoint.reader import Checkpoint, read_bytes
from portllm.checkpoint.ties import EMBEDDING_SUFFIX, HEAD, HEAD_MODULE, tied_embedding
from portllm.errors import Refusal
from portllm.patch.adapter_tensors import BIAS, WEIGHT
from portllm.patch.delta import Change, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity

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


def tensor_of(name: str, checkpoint: Checkpoint) -> TensorInfo | None:
    """The tensor that a patch means by a name; a tied head is the embedding."""
    if name == HEAD and (shared := tied_embedding(checkpoint)) is not None:
        return shared
    return checkpoint.infos.get(name)


def changes_of(patch: Patch[TensorInfo]) -> dict[str, Change[TensorInfo]]:
    """What a patch does, by the name of the tensor it is done to."""
    return {
        **{module + WEIGHT: delta for module, delta in patch.deltas.items()},
        **patch.values,
        **patch.rows,
        **patch.bias_deltas,
    }


def misfits(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Iterator[Refusal]:
    """Why a patch cannot be put on a model: both ways, nothing is left unaccounted for."""
    weights = linear_weights(checkpoint)
    for name, change in changes_of(patch).items():
        tensor = tensor_of(name, checkpoint)
        where = name.removesuffix(WEIGHT) if isinstance(change, LowRankDelta) else name
        if tensor is None:
            yield Refusal(
                where, f"the patch changes it, {checkpoint.name} has no such {_kind(change)}.{_near(where, weights)}"
            )
        elif problem := _mismatch(change, tensor, checkpoint):
            yield Refusal(where, problem)
    yield from _unnamed(patch, weights)
    yield from _missing(patch, checkpoint, weights)


def _kind(change: Change[TensorInfo]) -> str:
    return "module" if isinstance(change, LowRankDelta) else "tensor"


def _mismatch(change: Change[TensorInfo], tensor: TensorInfo, checkpoint: Checkpoint) -> str | None:
    """Why one change does not fit its tensor, or None."""
    if tensor.dtype not in FLOAT_DTYPES:
        return (
            f"its weight in {checkpoint.name} is stored as {tensor.dtype}; a patch is added to "
            f"{', '.join(FLOAT_DTYPES)} only. Use the unquantized model."
        )
    match change:
        case LowRankDelta() if change.shape != tensor.shape:
            names = ("in", "out") if change.transposed else ("out", "in")
            return (
                f"the delta is {_axes(change.shape, names)}, its weight in {checkpoint.name} is "
                f"{_axes(tensor.shape, names)}. Adding needs equal shapes."
            )
        case WholeValue(values) | VectorDelta(values) if values.shape != tensor.shape:
            return f"the patch has shape {values.shape}, {checkpoint.name} has {tensor.shape}. Both must be equal."
        case RowValues(values, rows) if values.shape[1:] != tensor.shape[1:] or max(rows) >= tensor.shape[0]:
            return (
                f"the patch has rows of {values.shape[1:]} up to token {max(rows)}, {checkpoint.name} has shape "
                f"{tensor.shape}. Both must have the same width, and the tokens must be there."
            )
        case _:
            return None


def _axes(shape: tuple[int, ...], names: tuple[str, str]) -> str:
    if len(shape) != 2:
        return str(shape)
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True)) + ")"


def _unnamed(patch: Patch[TensorInfo], weights: dict[str, TensorInfo]) -> Iterator[Refusal]:
    named = set(patch.config.targets([*weights, *patch.deltas]))
    for module in patch.deltas:
        if module not in named:
            yield Refusal(
                module,
                "the patch has tensors for it, adapter_config.json does not name it, so PEFT would drop them without a "
                "word. Add it to target_modules, or take the tensors out.",
            )


def _missing(patch: Patch[TensorInfo], checkpoint: Checkpoint, weights: dict[str, TensorInfo]) -> Iterator[Refusal]:
    """What the configuration names, the model has and the patch lacks."""
    targets = set(patch.config.targets(weights))
    biases = patch.config.biases
    expected = [module for module in targets if not patch.config.saves(module + WEIGHT) and module not in patch.deltas]
    expected += [
        name
        for name in checkpoint.infos
        if name not in patch.values
        and name.removesuffix(WEIGHT) not in patch.deltas
        and (patch.config.saves(name) or _is_trained_bias(name, biases, targets))
    ]
    for name in sorted(expected):
        yield Refusal(
            name,
            f"adapter_config.json names it and {checkpoint.name} has it, the patch has no tensors for it. "
            "Part of the adapter is missing, or it was made for another model.",
        )


def _is_trained_bias(name: str, biases: str, targets: set[str]) -> bool:
    if not name.endswith(BIAS) or biases == "none":
        return False
    return biases == "all" or name.removesuffix(BIAS) in targets


def altered_copies(patch: Patch[TensorInfo], base: Checkpoint) -> Iterator[Refusal]:
    """Where a copy of the base's weight that an adapter carries is not this base's."""
    for module, copy in patch.base_copies.items():
        weight = tensor_of(module + WEIGHT, base)
        if weight is None or not same_bytes(copy, weight):
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


def same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two tensors are stored alike and equal, byte for byte."""
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
