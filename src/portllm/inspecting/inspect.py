"""Describe a checkpoint, an adapter or a patch from headers and the fingerprint's sample alone."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.hub_names import names_hub
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import ModelLike, on_disk, open_checkpoint
from portllm.files.record import encode
from portllm.patch.adapter_folder import CONFIG_FILE, PatchLike, open_adapter, stored_tensors
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import ExpertsDelta, LowRankDelta
from portllm.patch.nothing import why_nothing
from portllm.patch.patch import Patch
from portllm.patch.record import PatchRecord
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """Summary of a checkpoint.

    Attributes:
        name: As given.
        revision: The commit hash of a model of the Hugging Face Hub, else None.
        architecture: From `config.json`; None without one.
        family: The id of its family, None where that is not known.
        fingerprint: Its identity.
        digest: Over all bytes, where it was asked for.
        n_params: Elements of all tensors.
        n_bytes: Bytes of all tensors.
        n_tensors: How many there are.
        files: How many files hold them.
        quantization: How its weights are quantized, or None.
        dtypes: Number of tensors of each dtype or storage type.
        modules: Number of linear modules of each name and shape.
        tied_head: Whether embedding and head are one matrix.
    """

    name: str
    revision: str | None
    architecture: str | None
    family: str | None
    fingerprint: str
    digest: str | None
    n_params: int
    n_bytes: int
    n_tensors: int
    files: int
    quantization: str | None
    dtypes: Mapping[str, int]
    modules: Mapping[str, int]
    tied_head: bool

    def __repr__(self) -> str:
        return f"CheckpointSummary({self.name!r}, {self.n_tensors} tensors, {self.n_params:,} numbers)"


@dataclass(frozen=True, slots=True)
class PatchSummary:
    """Summary of an adapter or patch.

    Attributes:
        name: As given.
        revision: The commit hash of an adapter of the Hugging Face Hub, else None.
        n_modules: Modules it changes.
        modules: Number of changed modules of each name.
        ranks: Number of modules of each rank.
        scales: Number of modules of each scale.
        n_params: Numbers in all factors.
        n_bytes: Bytes of all factors.
        whole: Modules that it holds whole: saved modules, trained biases.
        token_rows: By module, how many rows of tokens were trained.
        copies: Tensors of which it contains copies, of the base's weights or of a base with other rows.
        beside: What lies beside the adapter and goes along: tokenizer, chat template, value head.
        nothing: Why it changes nothing; None where it does.
        changed_base: How PEFT changed the base when training began (`pissa`, ...), else None.
        base_name: What PEFT's configuration calls the base.
        base_revision: Which revision of it PEFT's configuration names, or None.
        record: The content of `patch.json`, or None.
    """

    name: str
    revision: str | None
    n_modules: int
    modules: Mapping[str, int]
    ranks: Mapping[int, int]
    scales: Mapping[float, int]
    n_params: int
    n_bytes: int
    whole: tuple[str, ...]
    token_rows: Mapping[str, int]
    copies: tuple[str, ...]
    beside: tuple[str, ...]
    nothing: str | None
    changed_base: str | None
    base_name: str | None
    base_revision: str | None
    record: PatchRecord | None

    def __repr__(self) -> str:
        return f"PatchSummary({self.name!r}, {self.n_modules} modules, {self.n_params:,} numbers)"


def inspect(
    where: ModelLike | PatchLike, *, with_digest: bool = False, progress: Progress = silent
) -> CheckpointSummary | PatchSummary:
    """Describe a checkpoint, an adapter or a patch.

    Args:
        where: A model as for `open_checkpoint`, or an adapter or patch.
        with_digest: Read all of a checkpoint's bytes for its digest.
        progress: Progress callback (bytes read for the digest).

    Raises:
        PortLLMError: There is no such thing at that path, or it is corrupt.
    """
    if isinstance(where, Patch) or (not isinstance(where, Checkpoint) and _is_patch(where)):
        return summarize_patch(where)
    return summarize_checkpoint(where, with_digest=with_digest, progress=progress)


def _is_patch(where: str | Path) -> bool:
    if not names_hub(where):
        return (Path(where) / CONFIG_FILE).is_file()
    from portllm.checkpoint.hub_repository import look_up

    return CONFIG_FILE in look_up(str(where)).files


def summarize_checkpoint(
    where: ModelLike, *, with_digest: bool = False, progress: Progress = silent
) -> CheckpointSummary:
    """Describe a checkpoint; see `inspect`."""
    checkpoint = open_checkpoint(where, progress=progress)
    if with_digest:
        checkpoint = on_disk(checkpoint, progress=progress)
    architectures = checkpoint.config.get("architectures")
    kinds = Counter(
        f"{module.rsplit('.', 1)[-1]} {info.shape[0]}x{info.shape[1]}" for module, info in checkpoint.linear.items()
    )
    return CheckpointSummary(
        name=checkpoint.name,
        revision=checkpoint.revision,
        architecture=str(architectures[0]) if isinstance(architectures, list) and architectures else None,
        family=None if checkpoint.family is None else checkpoint.family.id,
        fingerprint=fingerprint(checkpoint),
        digest=digest(checkpoint, progress=progress) if with_digest else None,
        n_params=checkpoint.n_params,
        n_bytes=checkpoint.n_bytes,
        n_tensors=len(checkpoint.infos),
        files=len(checkpoint.files),
        quantization=checkpoint.quantization if checkpoint.is_quantized else None,
        dtypes=dict(
            Counter(info.encoding.scheme if info.encoding else info.dtype for info in checkpoint.infos.values())
        ),
        modules=dict(kinds),
        tied_head=checkpoint.tied_embedding is not None,
    )


def summarize_patch(where: PatchLike) -> PatchSummary:
    """Describe an adapter or patch; see `inspect`."""
    patch = open_adapter(where)
    deltas: dict[str, LowRankDelta[TensorInfo] | ExpertsDelta[TensorInfo]] = {**patch.deltas, **patch.experts}
    base_name, base_revision = (patch.config.fields.get(key) for key in ("base_model_name_or_path", "revision"))
    return PatchSummary(
        name=patch.name,
        revision=patch.revision,
        n_modules=len(deltas),
        modules=dict(Counter(module.rsplit(".", 1)[-1] for module in deltas)),
        ranks=dict(sorted(Counter(delta.rank for delta in deltas.values()).items())),
        scales=dict(sorted(Counter(delta.scale for delta in deltas.values()).items())),
        n_params=patch.n_params,
        n_bytes=sum(info.n_bytes for info in stored_tensors(patch).values()),
        whole=tuple(dict.fromkeys(name.rpartition(".")[0] for name in patch.values)),
        token_rows={name.removesuffix(WEIGHT): len(rows.rows) for name, rows in patch.rows.items()},
        copies=tuple(patch.base_copies),
        beside=tuple(patch.beside),
        nothing=why_nothing(patch),
        changed_base=patch.config.changed_base,
        base_name=str(base_name) if base_name else None,
        base_revision=str(base_revision) if base_revision else None,
        record=patch.record,
    )


def summary_to_json(summary: CheckpointSummary | PatchSummary) -> dict[str, object]:
    """A summary as JSON values."""
    values: dict[str, object] = {name: getattr(summary, name) for name in summary.__slots__}
    if isinstance(summary, PatchSummary):
        values["kind"] = "patch" if summary.record else "adapter"
        values["record"] = None if summary.record is None else encode(summary.record)
    else:
        values["kind"] = "checkpoint"
    return values
