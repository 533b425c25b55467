"""The manifest of a merge: `portllm.json` beside the weights records what they are and what rounding lost.

The same merge gives the same bytes: no time, no host, no thread count stands in it; measures have six digits. It is
sealed and names every other file of the folder, so that `verify` finds any byte that changed.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec

from portllm.checkpoint.model.side_files import HEAD_FILE
from portllm.files.json_text import parse_json
from portllm.files.record import END, Blake3, Recorded, decode_sealed, encode
from portllm.files.seal import digest_file, seal_of, seal_problem
from portllm.measures.quantization_gap import QuantizationGap
from portllm.notebook import ShownInNotebook
from portllm.patch.adapter_folder import CARD_FILE
from portllm.patch.record import ModelIdentity, PatchRecord
from portllm.patch.rounding import MergeSums

MANIFEST_FILE = "portllm.json"

PlainName: TypeAlias = Annotated[
    str, msgspec.Meta(pattern=r"^(?!\.\.?$)[^/]+" + END, description="the name of a file in the same folder")
]


@dataclass(frozen=True, slots=True)
class MergeReport(ShownInNotebook):
    """Report of a merge.

    Attributes:
        output: The new model.
        into: The model that the patch was added to.
        patch: The record of the patch, or None for an adapter without one.
        dtype: Storage dtypes of the changed tensors.
        rounding: `nearest`, or `stochastic` and its seed.
        device: Where the sums were computed, `cpu` or `cuda`.
        tensors: The measures of each changed tensor, by name.
        n_copied: Tensors that the patch does not touch.
        n_bytes: Bytes of tensors written.
        files: blake3 digest of each file beside the weights, the manifest itself left out.
        quantization: What the merge adds beside a patch that was fitted to quantized weights; None for another.
        headers: For a merge in place, blake3 digest of the header that each file of weights has kept; else empty.
    """

    output: ModelIdentity
    into: ModelIdentity
    patch: PatchRecord | None
    dtype: tuple[str, ...]
    rounding: str
    device: str
    tensors: Mapping[str, MergeSums]
    n_copied: int
    n_bytes: int
    files: Mapping[str, str] = field(default_factory=dict)
    quantization: QuantizationGap | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        changed = f"{len(self.tensors)} tensors changed, kept_gain={self.total.kept_gain:.4f}"
        return f"MergeReport({self.output.name!r}, into={self.into.name!r}, {changed})"

    @property
    def total(self) -> MergeSums:
        """The sums over all changed tensors."""
        return sum(self.tensors.values(), MergeSums())

    @property
    def worst(self) -> str | None:
        """The changed tensor that keeps the least of its gain, or None where nothing changed."""
        return min(self.tensors, key=lambda name: self.tensors[name].kept_gain, default=None)


def report_to_json(report: MergeReport, *, program: str) -> dict[str, object]:
    """The manifest's content, sealed."""
    values: dict[str, object] = {
        "program": program,
        "output": encode(report.output),
        "into": encode(report.into),
        "patch": None if report.patch is None else encode(report.patch),
        "dtype": list(report.dtype),
        "rounding": report.rounding,
        "device": report.device,
        "tensors_changed": len(report.tensors),
        "tensors_copied": report.n_copied,
        "bytes": report.n_bytes,
        "total": _measures(report.total),
        "worst": report.worst,
        "tensors": {name: _measures(sums) for name, sums in sorted(report.tensors.items())},
        "files": dict(sorted(report.files.items())),
        **({} if report.quantization is None else {"quantization": _gap_to_json(report.quantization)}),
        "merged_in_place": bool(report.headers),
        "headers": dict(sorted(report.headers.items())),
    }
    return {**values, "seal": seal_of(values)}


class Manifest(Recorded, frozen=True, forbid_unknown_fields=False):
    """What of a manifest can be verified.

    Attributes:
        output: The model that was written.
        into: The model that the patch was added to.
        files: blake3 digest of each file beside the weights.
        headers: blake3 digest of the header of each file of weights that was overwritten in place.
    """

    output: ModelIdentity
    into: ModelIdentity
    files: Mapping[PlainName, Blake3]
    headers: Mapping[PlainName, Blake3] = msgspec.field(default_factory=dict)


def digest_side_files(folder: Path) -> dict[str, str]:
    """The digest of each file in a folder, but for weights, the manifest, and the card, which people write to."""
    return {
        file.name: digest_file(file)
        for file in sorted(folder.iterdir())
        if file.is_file()
        and (file.suffix != ".safetensors" or file.name == HEAD_FILE)
        and file.name not in (MANIFEST_FILE, CARD_FILE)
    }


def render_manifest(report: MergeReport, *, program: str) -> str:
    """The text of `portllm.json`."""
    return json.dumps(report_to_json(report, program=program), indent=2, ensure_ascii=False) + "\n"


def is_manifest(text: str) -> bool:
    """Whether a text is that of a manifest, with a seal that fits.

    Example:
        >>> is_manifest("alias ls=rm")
        False
    """
    try:
        values = parse_json(text.encode())
        if not isinstance(values, dict):
            return False
        decode_sealed(Manifest, values)
    except ValueError:
        return False
    return seal_problem(values) is None


def _gap_to_json(gap: QuantizationGap) -> dict[str, object]:
    return {
        "scheme": gap.scheme,
        "source": gap.source,
        "ratio": _six_digits(gap.total.ratio),
        "worst": gap.worst,
        "tensors": {name: _six_digits(sums.ratio) for name, sums in sorted(gap.tensors.items())},
    }


def _measures(sums: MergeSums) -> dict[str, float | None]:
    return {
        "kept_gain": _six_digits(sums.kept_gain),
        "rounding_loss": _six_digits(sums.rounding_loss),
        "relative_size": _six_digits(sums.relative_size),
    }


def _six_digits(value: float) -> float | None:
    # JSON has no infinity; a delta on a weight of zero has no relative size.
    return float(f"{value:.6g}") if math.isfinite(value) else None
