"""Does a patch fit a model? From headers and fingerprints; every reason why not is gathered, none is raised."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual
from portllm.checkpoint.model.names import is_embedding
from portllm.errors import Refusal
from portllm.matching.changes import changes_of, oriented
from portllm.matching.experts import expert_mismatches
from portllm.matching.named import Named, missing, shared_rows, unnamed
from portllm.matching.storage import unaddable
from portllm.patch.adapter_config import HEAD_NAMES
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import Change, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.encoding import Unread
from portllm.tensors.info import TensorInfo


def mismatches(patch: Patch[TensorInfo], checkpoint: Checkpoint, *, n_rows: int | None = None) -> Iterator[Refusal]:
    """Why a patch cannot be put on a model: both ways, nothing is left unaccounted for.

    Args:
        patch: What is put on it.
        checkpoint: The model.
        n_rows: How many rows its embedding and its head get for it; None for as many as they have.
    """
    unread = next((info.encoding for info in checkpoint.infos.values() if isinstance(info.encoding, Unread)), None)
    if unread is not None:
        yield Refusal(
            checkpoint.name,
            f"its config.json says that it is quantized by {unread.scheme}, which is not supported: which module "
            "each of its tensors belongs to is not known. Use the model in 16 bit that it was made from, or a "
            "version of it in a supported format (docs/quantized.md).",
            is_of_input=True,
        )
        return
    patch = oriented(patch, checkpoint)
    weights = checkpoint.matrices
    named = Named(patch, checkpoint)
    for name, change in changes_of(patch).items():
        tensor = checkpoint.tensor(name)
        where = name.removesuffix(WEIGHT) if isinstance(change, LowRankDelta) else name
        if unusable := [*unaddable(where, name, filter(None, [tensor]), checkpoint)]:
            yield from unusable
        elif reason := _unknown(name, change, checkpoint):
            yield Refusal(where, reason)
        elif tensor is None:
            yield Refusal(
                where,
                f"the patch changes it, but {checkpoint.name} has no such {_kind(change)}.{_near(where, weights)}",
            )
        elif problem := _mismatch(change, _resized(tensor, checkpoint, n_rows), checkpoint):
            yield Refusal(where, problem)
    yield from unnamed(patch, named)
    yield from missing(patch, named)
    yield from expert_mismatches(patch, checkpoint)
    yield from shared_rows(patch, named)
    yield from _resized_copies(patch, checkpoint)


def _resized(tensor: TensorInfo, checkpoint: Checkpoint, n_rows: int | None) -> TensorInfo:
    embedding = checkpoint.embedding
    if n_rows is None or not checkpoint.is_by_token(tensor):
        return tensor
    if embedding is not None and n_rows <= embedding.shape[0]:
        return tensor  # a head may have fewer rows than the embedding
    return replace(tensor, shape=(n_rows, *tensor.shape[1:]))


def _resized_copies(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Iterator[Refusal]:
    """Copies of weights, not yet held against the base, that PEFT could not even load over the model's."""
    for name, copies in patch.base_copies.items():
        tensor = checkpoint.tensor(name)
        for copy in copies:
            if tensor is not None and copy.shape != tensor.shape:
                yield Refusal(
                    name,
                    f"the adapter contains it with shape {copy.shape}, but {checkpoint.name} has {tensor.shape}. If "
                    "tokens were added for it, record it once: portllm capture --adapter "
                    f"{patch.name} --base BASE -o PATCH.",
                )


def _unknown(name: str, change: Change[TensorInfo], checkpoint: Checkpoint) -> str | None:
    """Why what is known of a model's type does not suffice for a change; None where it does."""
    if checkpoint.family is not None:
        return _not_as_trained(name, change, checkpoint)
    if isinstance(change, VectorDelta):
        return None
    module = name.rpartition(".")[0]
    is_role = isinstance(change, RowValues) or is_embedding(module) or module.rpartition(".")[2] in HEAD_NAMES
    if not (is_role or (isinstance(change, LowRankDelta) and change.is_embedding)):
        return None
    return f"{checkpoint.why_unknown}, so whether it is tied to another matrix is not known either."


def _not_as_trained(name: str, change: Change[TensorInfo], checkpoint: Checkpoint) -> str | None:
    """Why no weights give what PEFT computes with a change of embedding or head; None where there are such weights."""
    tensor, family = checkpoint.tensor(name), checkpoint.family
    if tensor is None or family is None:
        return None
    if name.endswith(WEIGHT) and family.shares(checkpoint.current_name(name)) and checkpoint.says_tied is not False:
        return _SHARED.format(checkpoint.name)
    if tensor not in (checkpoint.embedding, checkpoint.head):
        return None
    is_added = isinstance(change, RowValues) or (isinstance(change, LowRankDelta) and change.is_embedding)
    if tensor is checkpoint.embedding and is_added and not family.looks_up:
        return (
            f"the embedding of {checkpoint.name} does more than look up rows, and PEFT adds to what comes of that: "
            "no change of the matrix has the same effect. Save the whole embedding instead (modules_to_save)."
        )
    is_of_three = family.ties is not None and not family.ties.alone and checkpoint.tied_embedding is not None
    if is_of_three or (tensor is checkpoint.embedding and family.shares(family.embedding)):
        return _SHARED.format(checkpoint.name)
    return None


_SHARED = (
    "in {} other matrices than head and embedding are the same one, and PEFT changes only one of them: no stored "
    "matrix has the same effect. Train the adapter without it."
)


def _kind(change: Change[TensorInfo]) -> str:
    return "module" if isinstance(change, LowRankDelta) else "tensor"


def _mismatch(change: Change[TensorInfo], tensor: TensorInfo, checkpoint: Checkpoint) -> str | None:
    """Why one change does not fit its tensor, or None."""
    match change:
        case LowRankDelta() if change.shape != tensor.shape:
            names = ("in", "out") if change.transposed else ("out", "in")
            return (
                f"the delta is {_axes(change.shape, names)}, but its weight in {checkpoint.name} is "
                f"{_axes(tensor.shape, names)}. The shapes must be equal."
            )
        case WholeValue(values) | VectorDelta(values) if values.shape != tensor.shape:
            return (
                f"the patch has shape {values.shape}, but {checkpoint.name} has {tensor.shape}. The shapes must be "
                "equal."
            )
        case RowValues(values, rows) if values.shape[1:] != tensor.shape[1:] or tensor.shape[0] <= max(rows):
            return (
                f"the patch has rows of {values.shape[1:]} up to token {max(rows)}, but {checkpoint.name} has "
                f"shape {tensor.shape}. The widths must be equal, and the tokens must exist."
            )
        case _:
            return None


def _axes(shape: tuple[int, ...], names: tuple[str, str]) -> str:
    if len(shape) != 2:
        return str(shape)
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(names, shape, strict=True)) + ")"


def taken_tie(patch: Patch[TensorInfo], model: Checkpoint) -> tuple[TakenForEqual, ...]:
    """The head that is stored beside the embedding it is tied to, where a patch changes either."""
    is_touched = any(model.tensor(name) is model.tied_embedding for name in changes_of(patch))
    return model.stored_twice if is_touched else ()


def tie_mismatch(patch: Patch[TensorInfo], base: Checkpoint, evolved: Checkpoint) -> Iterator[Refusal]:
    """Why trained token rows cannot go where head and embedding are tied otherwise than in the base."""
    was_tied, is_tied = (checkpoint.tied_embedding is not None for checkpoint in (base, evolved))
    if was_tied == is_tied:
        return
    for name in patch.rows:
        yield Refusal(
            name,
            f"the patch trained rows of it. In {base.name} it {'is' if was_tied else 'is not'} tied to the head, "
            f"in {evolved.name} it {'is not' if was_tied else 'is'}: PEFT would change one without the other.",
        )


def unmergeable(changed: Iterable[str], into: Checkpoint, *, dtype: str | None) -> Iterator[Refusal]:
    """Why a patch cannot be added to the weights of a model: those that it changes are quantized.

    What a safetensors file holds so can be stored as the values it stands for, where a dtype is asked for; where none
    is, only modules that are not quantized can be changed, and the others stay as they are.
    """
    if into.quantization is None:
        return
    encodings = {name: info.encoding for name, info in into.infos.items() if info.encoding is not None}
    unread = {name for name, encoding in encodings.items() if isinstance(encoding, Unread)}
    is_listed = all(into.infos[name].listed is not None for name in encodings.keys() - unread)
    touched = sorted(encodings.keys() & set(changed))
    if is_listed and (not unread if dtype is not None else not touched):
        return
    ways = "Store it in 16 bit (--dtype BF16), serve" if is_listed and not unread else "Serve"
    where = f"'{touched[0]}' and {len(touched) - 1} more of {into.name}" if len(touched) > 1 else f"{into.name}"
    yield Refusal(
        "--into",
        f"the weights of {where} are quantized ({into.quantization}): storing the sum that way would round "
        f"most of the patch away. {ways} the patch as an adapter on it, or merge into the 16-bit model that it "
        f"was made from: --into MODEL --quantized-base {into.name}.",
    )


def unmatchable(patch: Patch[TensorInfo], model: Checkpoint, *, option: str) -> Iterator[Refusal]:
    """Why PEFT must not put a patch on a model: it could take forever to find the modules."""
    if patch.config.takes_peft_long(tensor.rpartition(".")[0] for tensor in model.infos):
        yield Refusal(
            option,
            f"{patch.name} selects modules by a regular expression that PEFT could take forever to match. List "
            "the modules in its adapter_config.json.",
        )


def _near(module: str, weights: Mapping[str, TensorInfo]) -> str:
    """A hint at modules that differ only in what stands before or between the names."""
    tail = module.rsplit(".", 2)[-2:]
    near = [other for other in weights if other.endswith(".".join(tail))]
    if not near:
        return ""
    more = f" and {len(near) - 1} more" if len(near) > 1 else ""
    return f" Similar modules: {near[0]}{more}."
