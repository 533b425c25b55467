"""Decide before reading: what a port or a merge would do, and every reason not to, from headers alone.

A plan is a value. It can be printed, compared and tested without weights; running it is another module's job, and a
plan with refusals does not run.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from portllm.checkpoint.equality import same_bytes
from portllm.checkpoint.header import FLOAT_DTYPES, TensorInfo
from portllm.checkpoint.reader import Checkpoint
from portllm.checkpoint.source import Source
from portllm.checkpoint.ties import HEAD, stored_head, tied_embedding
from portllm.checkpoint.vocabulary import read_vocabulary
from portllm.checkpoint.writer import DEFAULT_SHARD_BYTES, Entry, Shard, lay_out
from portllm.errors import PlanRefusedError, Refusal, UnsupportedDtypeError
from portllm.methods.table import PortMethod, method_named
from portllm.patch.adapter_folder import files_of
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import Change, RowValues, WholeValue
from portllm.patch.patch import Patch
from portllm.patch.record import Choice, ModelIdentity
from portllm.pipeline.fit import (
    altered_copies,
    base_mismatch,
    changes_on,
    misfits,
    oriented,
    tie_mismatch,
    unmergeable,
)
from portllm.pipeline.fitted import Fitted, fitted_of, misnamed, quantization_of
from portllm.pipeline.token_rows import TokenMap, following, token_changes, unmovable
from portllm.pipeline.update import Update, identify

QUANTIZATION_FIELD = "quantization_config"
"""Of `config.json`: how transformers loads the weights."""


@dataclass(frozen=True, slots=True)
class PortPlan:
    """A patch about to be carried to an evolved model.

    Attributes:
        patch: The patch as it is.
        method: How it is carried.
        source: The base it belongs to.
        target: The evolved model.
        base: The base, where it is given; its weights are read for what the patch holds whole.
        evolved: The evolved model, opened.
        tokens: Where tokens have other rows in the evolved model and the patch changes such rows; else None.
        evidence: What was measured from the fingerprints' samples, and by `check` where the method was chosen by it.
        refusals: Every reason not to run.
        choice: Why this method, where it was chosen; None where it was named.
    """

    patch: Patch[TensorInfo]
    method: PortMethod
    source: ModelIdentity
    target: ModelIdentity
    base: Checkpoint | None
    evolved: Checkpoint
    tokens: TokenMap | None
    evidence: Mapping[str, float]
    refusals: tuple[Refusal, ...]
    choice: Choice | None = None

    @property
    def files(self) -> tuple[Source, ...]:
        """What is read; the output lies elsewhere."""
        return (*files_of(self.patch), *self.evolved.files, *(() if self.base is None else self.base.files))


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
    steps: Mapping[str, MergeStep]
    shards: tuple[Shard, ...]
    config_changes: Mapping[str, object]
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]
    fitted: Fitted | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of tensors that the run writes."""
        return sum(step.entry.n_bytes for step in self.steps.values())

    @property
    def n_changed(self) -> int:
        """Tensors that the patch changes."""
        return sum(step.change is not None for step in self.steps.values())


def refuse(refusals: Sequence[Refusal]) -> None:
    """Raise PlanRefusedError with all of the refusals, if there are any."""
    if refusals:
        raise PlanRefusedError(tuple(refusals))


def plan_port(
    patch: Patch[TensorInfo],
    *,
    evolved: Checkpoint,
    base: Checkpoint | None = None,
    method: str = "add",
    allow_other_base: bool = False,
) -> PortPlan:
    """Plan to carry a patch to an evolved model.

    Args:
        patch: What to carry.
        evolved: Where to.
        base: The model it belongs to. Needed where the patch does not say; checked where it does.
        method: A row of `METHODS`.
        allow_other_base: Take `base` for the patch's base though its fingerprint says otherwise.

    Raises:
        UnknownMethodError: There is no such method.
    """
    return plan_port_on(patch, Update(base, evolved), method=method, allow_other_base=allow_other_base)


def plan_port_on(
    patch: Patch[TensorInfo], update: Update, *, method: str = "add", allow_other_base: bool = False
) -> PortPlan:
    """As `plan_port`, where several patches go through one update: what does not depend on the patch is read once."""
    chosen = method_named(method)
    base, evolved = update.base, update.evolved
    patch = oriented(patch, evolved)
    target = update.target
    by_token = token_changes(patch, evolved if base is None else base)
    tokens = update.tokens if by_token else None
    refusals = list(update.misfits(patch if tokens is None else following(patch, by_token, tokens)))
    refusals += () if tokens is None else unmovable(patch, by_token)
    given = update.source
    source = patch.record.base if patch.record else given
    if base is not None and given is not None:
        refusals += base_mismatch(patch, given, model=base, option="--base", allow_other_base=allow_other_base)
        refusals += altered_copies(patch, base)
        refusals += () if patch.is_relative else misfits(patch, base)
        refusals += tie_mismatch(patch, base, evolved)
        source = given
    elif not patch.is_relative:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} holds values that stand in the place of the base's (saved modules, biases, token rows "
                "or DoRA magnitudes). They are carried over by what they changed: name the base with --base.",
            )
        )
    elif by_token and read_vocabulary(evolved) is not None:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} changes {by_token[0]}, whose rows belong to tokens. They follow their tokens from the "
                "base's tokenizer to the evolved model's: name the base with --base.",
            )
        )
    if source is None:
        source = target
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} has no patch.json, so the model it belongs to is not known. Name it with --base, or "
                f"write it down once: portllm capture --adapter {patch.name} --base BASE -o PATCH.",
            )
        )
    evidence = _sampled_drift(patch, update) if base is not None and not refusals else {}
    return PortPlan(patch, chosen, source, target, base, evolved, tokens, evidence, tuple(sorted(refusals)))


def plan_merge(
    patch: Patch[TensorInfo],
    *,
    into: Checkpoint,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    quantized_base: Checkpoint | None = None,
    allow_other_base: bool = False,
) -> MergePlan:
    """Plan to add a patch to a model's weights.

    Args:
        patch: What to add.
        into: The model that it belongs to.
        dtype: Storage dtype of every floating-point tensor of the output, or None to keep each one's.
        shard_bytes: Size above which the output is split.
        quantized_base: The quantized model that the patch belongs to, where `into` is what that was made from.
        allow_other_base: Go on though the patch belongs to another model.

    Raises:
        UnsupportedDtypeError: `dtype` is not one that weights are stored in.
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UnsupportedDtypeError(f"dtype {dtype!r}: weights are stored as {', '.join(FLOAT_DTYPES)}.")
    identity = identify(into)
    patch = oriented(patch, into)
    refusals = list(misfits(patch, into))
    if quantized_base is None:
        refusals += base_mismatch(patch, identity, model=into, option="--into", allow_other_base=allow_other_base)
    else:
        refusals += misnamed(patch, into, quantized_base)
    refusals += altered_copies(patch, into)
    refusals += unmergeable(into, dtype=dtype)
    notes = []
    if patch.record is None:
        notes.append(f"{patch.name} has no patch.json: {into.name} is taken for its base because you name it.")
    fitted = None if into.quantization is not None else fitted_of(patch, into, quantized_base)
    if (scheme := quantization_of(patch)) is not None and into.quantization is None:
        measured = "the report says how large that is" if fitted else "how large that is, is not measured"
        notes.append(f"the patch was fitted to {scheme} weights, and {into.name} differs from them: {measured}.")
    changes, sources, unties = _untangle(changes_on(patch, into), into)
    config_changes: dict[str, object] = {}
    if unties:
        config_changes["tie_word_embeddings"] = False
        text = into.config.get("text_config")
        if isinstance(text, dict) and "tie_word_embeddings" in text:  # a model of vision and text says it there too
            config_changes["text_config"] = {**text, "tie_word_embeddings": False}
        notes.append("the patch sets head and embedding apart, which were tied: the output has a head of its own.")
    if into.quantization is not None:
        config_changes[QUANTIZATION_FIELD] = None
        notes.append(f"the output holds the values that the weights of {into.name} stand for, with the patch in them.")
    if dtype is not None:
        config_changes["dtype"] = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype]
    steps = {
        name: MergeStep(Entry(name, _stored_as(info, dtype), info.shape), info, changes.get(name))
        for name, info in sorted(sources.items())
    }
    shards = lay_out({name: step.entry for name, step in steps.items()}, shard_bytes=shard_bytes)
    return MergePlan(
        patch, into, identity, steps, shards, config_changes, tuple(notes), tuple(sorted(refusals)), fitted
    )


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
    shared, stored = tied_embedding(into), stored_head(into)
    name = HEAD if stored is None else stored.name
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


def _sampled_drift(patch: Patch[TensorInfo], update: Update) -> dict[str, float]:
    """Drift of the patched weights, estimated from the windows that the fingerprints read."""
    sums = update.window_sums([module + WEIGHT for module in patch.deltas])
    if not sums.base_sq or not math.isfinite(sums.drift_sq):
        return {}
    return {"sampled_drift": float(f"{sums.relative:.3g}"), "sampled_cosine": float(f"{sums.cosine:.6g}")}
