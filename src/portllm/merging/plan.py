"""Decide before reading: what a merge would do, and every reason not to, from headers alone.

A plan is a value. It can be printed, compared and tested without weights; running it is another module's job, and a
plan with refusals does not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual, listed_tensors, same_bytes
from portllm.checkpoint.safetensors.writer import Entry, Shard, lay_out
from portllm.errors import Refusal
from portllm.files.source import Source
from portllm.matching.added_tokens import added_tokens, height_of, n_rows_of, unexplained
from portllm.matching.base import base_mismatch
from portllm.matching.base_copies import hold_copies
from portllm.matching.changes import changes_on, oriented
from portllm.matching.compatibility import mismatches, unmergeable
from portllm.matching.own_values import own_values, without
from portllm.matching.quantized_base import Fitted, fitted_of, misnamed, quantization_of
from portllm.matching.side_files import NO_SIDE_FILES, SideFiles, choose_side_files
from portllm.merging.heads import plan_head
from portllm.merging.options import AS_IT_IS, MergeOptions
from portllm.patch.adapter_folder import files_of
from portllm.patch.delta import Change, RowValues, WholeValue
from portllm.patch.identify import identify
from portllm.patch.nothing import why_nothing
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo

QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
"""Of `config.json`: how transformers loads the weights."""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """One tensor of the output: `source`'s values, and what the patch does to them.

    Attributes:
        entry: The tensor to write.
        source: The tensor to read.
        change: What the patch does, or None for a tensor that it does not touch.
        resized: Where the entry has more rows than the source: the weight of a resized model, whose last rows these
            are; None for rows of zeros.
    """

    entry: Entry
    source: TensorInfo
    change: Change[TensorInfo] | None
    resized: TensorInfo | None = None

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes are those of the output."""
        as_stored = self.source.stored_as == self.entry.dtype and self.source.shape == self.entry.shape
        return self.change is None and as_stored


@dataclass(frozen=True, slots=True)
class MergePlan:
    """A patch about to be added to a model's weights.

    Attributes:
        patch: The patch.
        into: The model.
        identity: Its identity.
        options: How.
        steps: One for each tensor of the output, by name.
        shards: Which tensor goes into which file.
        config_changes: Fields of `config.json` that the output needs otherwise; None for one that it must not have.
        notes: What a user should know, though it is no reason to stop.
        refusals: Every reason not to run.
        fitted: The quantized weights that the patch was fitted to, where they can be had again.
        taken: Copies of the model's weights in the adapter, which are compared whole.
        beside: What lies beside the weights.
        leave_out: Tensors of the model that the output does not have, and that are not read.
    """

    patch: Patch[TensorInfo]
    into: Checkpoint
    identity: ModelIdentity
    options: MergeOptions
    steps: Mapping[str, MergeStep]
    shards: tuple[Shard, ...]
    config_changes: Mapping[str, object]
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    fitted: Fitted | None = None
    taken: tuple[TakenForEqual, ...] = ()
    beside: SideFiles = NO_SIDE_FILES
    leave_out: frozenset[str] = frozenset()

    @property
    def nothing(self) -> str | None:
        """Why the patch changes nothing; None where it does. Reads factors."""
        return why_nothing(self.patch)

    @property
    def files(self) -> tuple[Source, ...]:
        """What is read."""
        quantized = {} if self.fitted is None else self.fitted.weights
        return (*self.into.files, *files_of(self.patch), *{info.file for info in quantized.values()})

    @property
    def keeps_storage(self) -> bool:
        """Whether what is quantized in the model is so in the output, byte for byte."""
        return self.into.quantization is not None and self.options.dtype is None

    @property
    def n_bytes(self) -> int:
        """Bytes of tensors that the run writes."""
        return sum(step.entry.n_bytes for step in self.steps.values())

    @property
    def n_changed(self) -> int:
        """Tensors that the patch changes."""
        return sum(step.change is not None for step in self.steps.values())


def plan_merge(
    patch: Patch[TensorInfo],
    *,
    into: Checkpoint,
    options: MergeOptions = AS_IT_IS,
    quantized_base: Checkpoint | None = None,
) -> MergePlan:
    """Plan to add a patch to a model's weights.

    Args:
        patch: What to add.
        into: The model that it belongs to.
        options: How.
        quantized_base: The quantized model that the patch belongs to, where `into` is what that was made from.
    """
    dtype = options.dtype
    identity = identify(into)
    held = hold_copies(patch, into)
    whole = oriented(held.patch, into)
    own = own_values(whole, into)
    head = plan_head(whole, own, into)
    patch = without(whole, own)
    height = height_of(patch, into)
    refusals = [
        *held.refusals,
        *unexplained(patch, into, added_tokens(patch, into)),
        *head.refusals,
        *mismatches(patch, into, n_rows=height),
    ]
    if quantized_base is None:
        refusals += base_mismatch(
            patch, identity, model=into, option="--into", allow_other_base=options.allow_other_base
        )
    else:
        refusals += misnamed(patch, into, quantized_base)
    on_model = changes_on(patch, into)
    refusals += unmergeable(on_model, into, dtype=dtype)
    notes = [*held.notes, *head.notes]
    if patch.record is None:
        notes.append(f"{patch.name} has no patch.json: {into.name} is assumed to be its base.")
    beside = choose_side_files(patch, into, n_rows=height or None, whose=options.tokenizer)
    notes += beside.notes
    refusals += beside.refusals
    fitted = None if into.quantization is not None else fitted_of(patch, into, quantized_base)
    if (scheme := quantization_of(patch)) is not None and into.quantization is None:
        measured = "the report shows how much" if fitted else "the difference is not measured"
        notes.append(f"the patch was trained on {scheme} weights, which differ from {into.name}: {measured}.")
    changes, sources, unties = _untangle(on_model, into)
    config_changes: dict[str, object] = {**head.config_changes}
    if unties:
        config_changes |= into.untied_config
        notes.append("the patch unties head and embedding: the output has a separate head.")
    if into.quantization is not None and dtype is None:
        notes.append(f"what the patch does not change stays quantized as in {into.name} ({into.quantization}).")
        sources = as_listed(sources)
    elif into.quantization is not None:
        config_changes |= _unquantized({**into.config, **config_changes})
        notes.append(f"the output contains the dequantized weights of {into.name} with the patch added.")
    if dtype is not None:
        config_changes["dtype"] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    if height > n_rows_of(into):
        config_changes |= _with_vocabulary(config_changes, into, height)
        notes.append(
            f"embedding and head have {height} rows in the output, {height - n_rows_of(into)} more than in {into.name}."
        )
    steps = {
        name: _step(name, info, changes.get(name), patch, into, height, dtype) for name, info in sorted(sources.items())
    }
    steps = {name: step for name, step in steps.items() if name not in head.leave_out}
    steps |= {
        name: MergeStep(Entry(name, _stored_as(info, dtype), info.shape), info, None)
        for name, info in head.tensors.items()
    }
    shards = lay_out({name: step.entry for name, step in steps.items()}, shard_bytes=options.shard_bytes)
    return MergePlan(
        whole, into, identity, options, steps, shards, config_changes, tuple(notes), tuple(sorted(refusals)), fitted,
        held.taken, beside, head.leave_out,
    )  # fmt: skip


def _step(
    name: str,
    info: TensorInfo,
    change: Change[TensorInfo] | None,
    patch: Patch[TensorInfo],
    into: Checkpoint,
    height: int,
    dtype: str | None,
) -> MergeStep:
    """One tensor of the output; embedding and head have as many rows as the patch needs."""
    is_resized = height > n_rows_of(into) and into.is_by_token(info)
    shape = (height, *info.shape[1:]) if is_resized else info.shape
    tensor = into.tensor(name) if is_resized else None
    found = (weight for other, weight in patch.resized.items() if tensor is not None and into.tensor(other) is tensor)
    return MergeStep(Entry(name, _stored_as(info, dtype), shape), info, change, next(found, None))


def _with_vocabulary(changes: Mapping[str, object], into: Checkpoint, n_rows: int) -> dict[str, object]:
    """The fields of `config.json` that say how many rows there are; a model of vision and text says it there too."""
    text = changes.get("text_config", into.config.get("text_config"))
    is_inner = isinstance(text, dict) and "vocab_size" in text
    found: dict[str, object] = (
        {"text_config": {**text, "vocab_size": n_rows}} if isinstance(text, dict) and is_inner else {}
    )
    return found if is_inner and "vocab_size" not in into.config else {**found, "vocab_size": n_rows}


def as_listed(sources: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The same tensors with those that are quantized weights replaced by what the headers list of them."""
    encoded = {name: info for name, info in sources.items() if info.encoding is not None}
    return {**{name: info for name, info in sources.items() if name not in encoded}, **listed_tensors(encoded)}


def _unquantized(config: Mapping[str, object]) -> dict[str, object]:
    """What has to change in `config.json` for a model to be loaded as one that is not quantized."""
    changes: dict[str, object] = {field: None for field in QUANTIZATION_FIELDS if field in config}
    text = config.get("text_config")
    if isinstance(text, dict) and any(field in text for field in QUANTIZATION_FIELDS):
        changes["text_config"] = {key: value for key, value in text.items() if key not in QUANTIZATION_FIELDS}
    return changes


def _stored_as(info: TensorInfo, dtype: str | None) -> str:
    return dtype if dtype is not None and info.dtype in FLOAT_DTYPES else info.dtype


def _untangle(
    changes: dict[str, Change[TensorInfo]], into: Checkpoint
) -> tuple[dict[str, Change[TensorInfo]], dict[str, TensorInfo], bool]:
    """The changes of each tensor of the output, its source, and whether a tied head has to be set apart.

    A tied head and its embedding are one matrix. They stay so where the patch trained rows of it, or brings the same
    values for both; otherwise each goes its own way, as it does when PEFT runs the adapter unmerged.
    """
    sources = dict(into.infos)
    shared, stored = into.tied_embedding, into.head
    name = into.head_name if stored is None else stored.name
    if shared is None:
        return changes, sources, False
    embedding, head = changes.get(shared.name), changes.get(name)
    if embedding is None and head is None:
        return changes, sources, False
    if isinstance(embedding, RowValues) and head is None and into.rows_reach_head:
        return changes if stored is None else {**changes, name: embedding}, sources, False
    if isinstance(embedding, WholeValue) and isinstance(head, WholeValue) and same_bytes(embedding.values, head.values):
        kept = {other: change for other, change in changes.items() if other != name}
        return kept if stored is None else changes, sources, False
    return changes, {**sources, name: shared if stored is None else stored}, True
