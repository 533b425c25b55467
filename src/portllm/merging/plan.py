"""Decide before reading: what a merge would do, and every reason not to, from headers alone.

A plan is a value. It can be printed, compared and tested without weights; running it is another module's job, and a
plan with refusals does not run.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import listed_tensors, same_bytes
from portllm.checkpoint.safetensors.writer import Entry, Shard, lay_out
from portllm.checkpoint.tensor.info import FLOAT_DTYPES, TensorInfo
from portllm.errors import Refusal, UnsupportedDtypeError
from portllm.files.source import Source
from portllm.matching.compatibility import (
    altered_copies,
    base_mismatch,
    changes_on,
    mismatches,
    oriented,
    unmergeable,
)
from portllm.matching.quantized_base import Fitted, fitted_of, misnamed, quantization_of
from portllm.merging.options import AS_IT_IS, MergeOptions
from portllm.patch.adapter_folder import files_of
from portllm.patch.delta import Change, RowValues, WholeValue
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity

QUANTIZATION_FIELDS = ("quantization_config", "compression_config")
"""Of `config.json`: how transformers loads the weights."""


@dataclass(frozen=True, slots=True)
class MergeStep:
    """One tensor of the output: `source`'s values, and what the patch does to them.

    Attributes:
        entry: The tensor to write.
        source: The tensor to read.
        change: What the patch does, or None for a tensor that it does not touch.
    """

    entry: Entry
    source: TensorInfo
    change: Change[TensorInfo] | None

    @property
    def is_copy(self) -> bool:
        """Whether the stored bytes are those of the output."""
        return self.change is None and self.source.stored_as == self.entry.dtype


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

    Raises:
        UnsupportedDtypeError: The dtype is not one that weights are stored in.
    """
    dtype = options.dtype
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UnsupportedDtypeError(f"unknown dtype {dtype!r}; expected one of {', '.join(FLOAT_DTYPES)}.")
    identity = identify(into)
    patch = oriented(patch, into)
    refusals = list(mismatches(patch, into))
    if quantized_base is None:
        refusals += base_mismatch(
            patch, identity, model=into, option="--into", allow_other_base=options.allow_other_base
        )
    else:
        refusals += misnamed(patch, into, quantized_base)
    refusals += altered_copies(patch, into)
    on_model = changes_on(patch, into)
    refusals += unmergeable(on_model, into, dtype=dtype)
    notes = []
    if patch.record is None:
        notes.append(f"{patch.name} has no patch.json: {into.name} is assumed to be its base.")
    fitted = None if into.quantization is not None else fitted_of(patch, into, quantized_base)
    if (scheme := quantization_of(patch)) is not None and into.quantization is None:
        measured = "the report shows how much" if fitted else "the difference is not measured"
        notes.append(f"the patch was trained on {scheme} weights, which differ from {into.name}: {measured}.")
    changes, sources, unties = _untangle(on_model, into)
    config_changes: dict[str, object] = {}
    if unties:
        config_changes["tie_word_embeddings"] = False
        text = into.config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:  # a model of vision and text says it there too
            config_changes["text_config"] = {**text, "tie_word_embeddings": False}
        notes.append("the patch unties head and embedding: the output has a separate head.")
    if into.quantization is not None and dtype is None:
        notes.append(f"what the patch does not change stays quantized as in {into.name} ({into.quantization}).")
        sources = as_listed(sources)
    elif into.quantization is not None:
        config_changes |= _unquantized({**into.config, **config_changes})
        notes.append(f"the output contains the dequantized weights of {into.name} with the patch added.")
    if dtype is not None:
        config_changes["dtype"] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    steps = {
        name: MergeStep(Entry(name, _stored_as(info, dtype), info.shape), info, changes.get(name))
        for name, info in sorted(sources.items())
    }
    shards = lay_out({name: step.entry for name, step in steps.items()}, shard_bytes=options.shard_bytes)
    return MergePlan(
        patch, into, identity, options, steps, shards, config_changes, tuple(notes), tuple(sorted(refusals)), fitted
    )


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
    if isinstance(embedding, RowValues) and head is None:
        return changes if stored is None else {**changes, name: embedding}, sources, False
    if isinstance(embedding, WholeValue) and isinstance(head, WholeValue) and same_bytes(embedding.values, head.values):
        kept = {other: change for other, change in changes.items() if other != name}
        return kept if stored is None else changes, sources, False
    return changes, {**sources, name: shared if stored is None else stored}, True
