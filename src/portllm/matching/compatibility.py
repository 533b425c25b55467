"""Does a patch fit a model? From headers and fingerprints; every reason why not is gathered, none is raised."""

from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeVar

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual
from portllm.checkpoint.model.identity import fingerprint_in
from portllm.checkpoint.model.names import is_embedding
from portllm.checkpoint.tensor.encoding import Unread
from portllm.checkpoint.tensor.info import FLOAT_DTYPES, TensorInfo
from portllm.errors import Refusal
from portllm.matching.experts import expert_changes, expert_mismatches
from portllm.patch.adapter_config import HEAD_NAMES
from portllm.patch.adapter_tensors import BIAS, WEIGHT
from portllm.patch.delta import Change, Factor, LowRankDelta, RowValues, VectorDelta, WholeValue
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity

F = TypeVar("F", bound=Factor)


def oriented(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Patch[TensorInfo]:
    """The patch with each delta the way round in which the model stores the weight.

    `fan_in_fan_out` is one word for all modules, and PEFT corrects it module by module when it loads an adapter: a
    GPT-2 adapter of Conv1D layers and the head may say either. Where the model's family is known it is asked instead.
    """
    turned = {}
    for module, delta in patch.deltas.items():
        is_transposed = checkpoint.is_transposed(module)
        if is_transposed is not None and delta.transposed != (delta.is_embedding or is_transposed):
            turned[module] = replace(delta, transposed=not delta.transposed)
    experts = {
        name: replace(delta, transposed=True)
        for name, delta in patch.experts.items()
        if checkpoint.has_transposed_experts(name) and not delta.transposed
    }
    is_as_it_was = not (turned or experts)
    return (
        patch
        if is_as_it_was
        else replace(patch, deltas={**patch.deltas, **turned}, experts={**patch.experts, **experts})
    )


def changes_on(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> dict[str, Change[TensorInfo]]:
    """What a patch that fits a model does, by the name of the tensor in the model; a tied head has a name too."""
    changes: dict[str, Change[TensorInfo]] = {}
    for name, change in changes_of(patch).items():
        tensor = checkpoint.stored(name)
        changes[checkpoint.current_name(name) if tensor is None else tensor.name] = change
    for name, delta in patch.experts.items():
        changes |= expert_changes(name, delta, checkpoint)
    return changes


def changes_of(patch: Patch[F]) -> dict[str, Change[F]]:
    """What a patch does, by the name that it has for the tensor it is done to; all but experts."""
    return {
        **{module + WEIGHT: delta for module, delta in patch.deltas.items()},
        **patch.values,
        **patch.rows,
        **patch.bias_deltas,
    }


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
        )
        return
    patch = oriented(patch, checkpoint)
    weights = checkpoint.matrices
    named = _Named(patch, checkpoint)
    for name, change in changes_of(patch).items():
        tensor = checkpoint.tensor(name)
        where = name.removesuffix(WEIGHT) if isinstance(change, LowRankDelta) else name
        if reason := _unknown(name, change, checkpoint):
            yield Refusal(where, reason)
        elif tensor is None:
            yield Refusal(
                where,
                f"the patch changes it, but {checkpoint.name} has no such {_kind(change)}.{_near(where, weights)}",
            )
        elif problem := _mismatch(change, _resized(tensor, checkpoint, n_rows), checkpoint):
            yield Refusal(where, problem)
    yield from _unnamed(patch, named)
    yield from _missing(patch, named)
    yield from expert_mismatches(patch, checkpoint)
    yield from _shared_rows(patch, named)
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


def outline(patch: Patch[TensorInfo]) -> Hashable:
    """All that `mismatches` asks of a patch: the same for patches of one recipe, however they were trained."""
    return (
        repr(patch.config.fields),
        tuple((name, _outline(change)) for name, change in changes_of(patch).items()),
        tuple((name, delta.a.shape, delta.b.shape, delta.rank) for name, delta in patch.experts.items()),
        tuple((name, tuple(copy.shape for copy in copies)) for name, copies in patch.base_copies.items()),
    )


def _outline(change: Change[TensorInfo]) -> Hashable:
    match change:
        case LowRankDelta():
            return change.a.shape, change.b.shape, change.transposed, change.is_embedding
        case RowValues(values, rows):
            return values.shape, rows
        case WholeValue(values) | VectorDelta(values):
            return type(change), values.shape
        case _:
            raise TypeError(f"{change} is of an expert")


def _unknown(name: str, change: Change[TensorInfo], checkpoint: Checkpoint) -> str | None:
    """Why what is known of a model's type does not suffice for a change; None where it does."""
    if reason := checkpoint.why_converted(name):
        return reason
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
    if tensor.dtype not in FLOAT_DTYPES:
        return (
            f"its weight in {checkpoint.name} is stored as {tensor.dtype}; a patch can only be added to "
            f"{', '.join(FLOAT_DTYPES)}. Use the unquantized model."
        )
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


class _Named:
    """What a patch's configuration names in a model."""

    def __init__(self, patch: Patch[TensorInfo], checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.config = config = patch.config
        self.tied = checkpoint.tied_embedding
        named = [*patch.deltas, *(name for name in changes_of(patch) if not name.endswith(WEIGHT)), *patch.values]
        self.tensors = checkpoint.running([*named, *patch.experts])
        modules = [*self._matrices(), *patch.deltas]
        self.targets = {*config.targets(modules), *(m for m in modules if "weight" in config.parameters_of(m))}
        if config.means_all_linear:  # but for the head, which PEFT knows from the model
            self.targets -= {module for module in modules if checkpoint.is_head(module + WEIGHT)}
        if self._ties_head_to(self.targets):
            self.targets.add(checkpoint.head_module)

    def _matrices(self) -> list[str]:
        return [
            name.removesuffix(WEIGHT)
            for name, info in self.tensors.items()
            if name.endswith(WEIGHT) and len(info.shape) == 2
        ]

    def saves(self, tensor: str) -> bool:
        """Whether it names a tensor as one that is saved whole."""
        is_twin = (
            self.config.keeps_ties("modules_to_save") and self.tied is not None and self.checkpoint.is_head(tensor)
        )
        return self.config.saves(tensor) or (is_twin and self.tied is not None and self.config.saves(self.tied.name))

    def trains_bias(self, tensor: str, info: TensorInfo) -> bool:
        """Whether it names a tensor as a bias that is trained."""
        if not tensor.endswith(BIAS) or len(info.shape) != 1:
            return False
        of_target = self.config.biases == "lora_only" and tensor.removesuffix(BIAS) in self.targets
        return self.config.biases == "all" or of_target

    def row_modules(self) -> list[str]:
        """The embeddings, by any name that PEFT takes, of which it names rows."""
        tokens = self.config.fields.get("trainable_token_indices")
        if not isinstance(tokens, dict):
            return [""] if tokens else []
        names = [name for name, rows in tokens.items() if rows]
        # One of two tied modules stands for both where they have the same rows.
        head = next((name for name in names if f".{self.checkpoint.head_module}".endswith(f".{name}")), None)
        twins = [name for name in names if name != head and tokens[name] == tokens.get(head)]
        return [name for name in names if not (self.tied is not None and twins and name == head)]

    def _ties_head_to(self, modules: Collection[str]) -> bool:
        if not self.config.keeps_ties("target_modules") or self.tied is None:
            return False
        return any(self.checkpoint.tensor(module + WEIGHT) is self.tied for module in modules)


def _unnamed(patch: Patch[TensorInfo], named: _Named) -> Iterator[Refusal]:
    """What the patch has and the configuration does not name."""
    for module in patch.deltas:
        if module not in named.targets:
            yield Refusal(
                module,
                "the patch has tensors for it, but adapter_config.json does not name it, so PEFT would silently "
                "ignore them. Add it to target_modules, or remove the tensors.",
            )
    for name in patch.values:
        if named.checkpoint.is_head(name) and not named.saves(name):
            yield Refusal(
                name,
                "the patch has a value for it because it was tied to the embedding, and ensure_weight_tying is "
                f"set; in {named.checkpoint.name} it is not tied. Add {named.checkpoint.head_module} to "
                "modules_to_save.",
            )
    for name in patch.rows:
        module = name.removesuffix(WEIGHT)
        is_input = named.checkpoint.stored(name) is named.checkpoint.embedding
        tokens = patch.config.fields.get("trainable_token_indices")
        is_named = isinstance(tokens, dict) and any(f".{module}".endswith(f".{key}") for key in tokens)
        if not (is_named or (is_input and not isinstance(tokens, dict))):
            yield Refusal(
                module,
                "the patch has token rows for it, but trainable_token_indices does not name it (without a name, it "
                "means the embedding), so PEFT would ignore them.",
            )


def _missing(patch: Patch[TensorInfo], named: _Named) -> Iterator[Refusal]:
    """What the configuration names, the model has and the patch lacks."""
    model = named.checkpoint
    infos = named.tensors
    deltas, values, targets = (
        set(map(model.current_name, part)) for part in (patch.deltas, patch.values, named.targets)
    )
    if not any(map(model.is_of_expert, deltas)):
        # One expert is a module of its own in a file, and in the model that transformers 4 builds; not in today's.
        targets = {module for module in targets if not model.is_of_expert(module)}
    expected = [module for module in targets if not named.saves(module + WEIGHT) and module not in deltas]
    expected += [
        name
        for name, info in infos.items()
        if model.current_name(name) not in values
        and model.current_name(name.removesuffix(WEIGHT)) not in deltas
        and (named.saves(name) or named.trains_bias(name, info))
    ]
    of_rows = [name.removesuffix(WEIGHT) for name in patch.rows]
    expected += [
        f"trainable_token_indices {name}".strip()
        for name in named.row_modules()
        if not any(not name or module == name or module.endswith(f".{name}") for module in of_rows)
    ]
    for name in sorted(expected):
        yield Refusal(
            name,
            f"adapter_config.json names it and {named.checkpoint.name} has it, but the patch has no tensors for "
            "it. Part of the adapter is missing, or it was made for another model.",
        )


def _shared_rows(patch: Patch[TensorInfo], named: _Named) -> Iterator[Refusal]:
    """Trained rows of a tied embedding are the head's too, so nothing else may be done to the head."""
    if named.tied is None or not any(named.checkpoint.tensor(name) is named.tied for name in patch.rows):
        return
    head = named.checkpoint.head_module
    if head in patch.deltas or head + WEIGHT in patch.values:
        yield Refusal(
            head,
            "the patch changes it and trained token rows of the embedding, which it is tied to in "
            f"{named.checkpoint.name}; PEFT would overwrite rows of the changed head. This combination is not "
            "supported.",
        )


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
        )
        return
    if (dtype := same_in(model, belongs)) is not None:
        yield Refusal(
            option,
            f"{given.name} is the base that patch '{patch.name}' belongs to, {belongs.name}, in another dtype: their "
            f"samples are the same numbers in {dtype}. Pass {belongs.name}, or --allow-other-base to take one for the "
            "other.",
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


def _near(module: str, weights: Mapping[str, TensorInfo]) -> str:
    """A hint at modules that differ only in what stands before or between the names."""
    tail = module.rsplit(".", 2)[-2:]
    near = [other for other in weights if other.endswith(".".join(tail))]
    if not near:
        return ""
    more = f" and {len(near) - 1} more" if len(near) > 1 else ""
    return f" Similar modules: {near[0]}{more}."


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
