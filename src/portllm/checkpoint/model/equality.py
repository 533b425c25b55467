"""Do two stored tensors hold the same numbers? By samples, for whoever plans; by every byte, for whoever runs.

A plan reads headers and samples. What it takes for equal by these, the run that depends on it compares whole, by
`require_equal`, before its output gets its name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import numpy as np

from portllm.errors import Refusal, refuse
from portllm.files.source import LocalFile
from portllm.progress import Progress, silent
from portllm.tensors.bytes import read_bytes, read_spans
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.numbers import decode_floats
from portllm.tensors.rounding import round_to

BLOCK_ELEMENTS = 1 << 23
NOTHING: Mapping[str, str] = MappingProxyType({})
WINDOWS = 16
WINDOW_ELEMENTS = 4096
WIDENED = ("BF16", "F16", "F32")
"""Dtypes whose numbers are compared where they are not stored in the same one: float32 holds each of them."""

TRAINING_DTYPES = ("BF16", "F16")
"""What a model is loaded in for training where that is not the dtype of its file."""


@dataclass(frozen=True, slots=True)
class TakenForEqual:
    """Two tensors that a plan takes for equal, by samples.

    Attributes:
        left: The one.
        right: The other.
        otherwise: Why there can be no output where they differ after all.
        rounded: Whether `left` may hold the numbers of `right` as a training run had loaded them.
    """

    left: TensorInfo
    right: TensorInfo
    otherwise: Refusal
    rounded: bool = False


def require_equal(
    taken: Iterable[TakenForEqual], *, known: Mapping[str, str] = NOTHING, progress: Progress = silent
) -> None:
    """Compare whole what a plan takes for equal. Of a model that stays on the hub, samples are all there is.

    Args:
        taken: What to compare.
        known: Digests of tensors of one model that has been read, by name; what they show to be equal is not read.
        progress: Progress callback (bytes compared).

    Raises:
        PlanRefusedError: Two tensors differ where no sample lies.
        CheckpointError: A file cannot be read.
    """
    here = [pair for pair in taken if isinstance(pair.left.file, LocalFile) and isinstance(pair.right.file, LocalFile)]
    done, total = 0, sum(pair.left.n_bytes + pair.right.n_bytes for pair in here)
    refusals = []
    for pair in here:
        equal = is_rounded_copy if pair.rounded else partial(same_values, known=known)
        if not equal(pair.left, pair.right):
            refusals.append(pair.otherwise)
        done += pair.left.n_bytes + pair.right.n_bytes
        progress(f"compare: {pair.left.name}", done, total, "bytes")
    refuse(refusals)


def stored_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, TensorInfo]]:
    """Every tensor with bytes of its own, by name: what decoding needs besides a tensor follows it."""
    for name, info in infos.items():
        yield name, info
        for suffix, part in info.parts:
            yield name + suffix, part


def listed_tensors(infos: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors as the headers list them, by name: what a quantized weight is made of stands there one by one."""
    stored = (part if part.listed is None else part.listed for _, part in stored_tensors(infos))
    return {info.name: info for info in sorted(stored, key=lambda info: info.name)}


def are_stored_alike(
    left: TensorInfo, right: TensorInfo, left_digests: Mapping[str, str], right_digests: Mapping[str, str]
) -> bool:
    """Whether two tensors are known to hold the same values, by the digests of all their bytes."""
    sides = [
        [
            (suffix, part.stored_as, part.shape, digests.get(part.stored_name))
            for suffix, part in stored_tensors({"": info})
        ]
        for info, digests in ((left, left_digests), (right, right_digests))
    ]
    return sides[0] == sides[1] and all(digest is not None for *_, digest in sides[0])


def same_bytes(left: TensorInfo, right: TensorInfo) -> bool:
    """Whether two tensors are stored alike and equal, byte for byte. Reads both whole."""
    return _stored_alike(left, right, _all_equal) and _all_equal(left, right)


def same_values(left: TensorInfo, right: TensorInfo, *, known: Mapping[str, str] = NOTHING) -> bool:
    """Whether two tensors hold the same numbers; a float32 copy of a bfloat16 tensor does.

    Reads both whole, unless `known` digests, by name, show that they are stored alike.
    """
    return are_stored_alike(left, right, known, known) or _same(left, right, _all_equal)


def look_same(left: TensorInfo, right: TensorInfo) -> bool:
    """As `same_values`, by windows that lie evenly over the whole of both tensors."""
    return _same(left, right, _windows_equal)


def is_rounded_copy(copy: TensorInfo, weight: TensorInfo) -> bool:
    """As `same_values`, also where the copy was taken of a model that had been loaded in a training dtype."""
    return any(_same(copy, weight, partial(_all_equal, rounded=dtype)) for dtype in (None, *TRAINING_DTYPES))


def looks_like_copy(copy: TensorInfo, weight: TensorInfo) -> bool:
    """As `is_rounded_copy`, by windows as for `look_same`."""
    return any(_same(copy, weight, partial(_windows_equal, rounded=dtype)) for dtype in (None, *TRAINING_DTYPES))


Equal = Callable[[TensorInfo, TensorInfo], bool]


def _same(left: TensorInfo, right: TensorInfo, equal: Equal) -> bool:
    widened = left.encoding is None is right.encoding and left.dtype in WIDENED and right.dtype in WIDENED
    comparable = _stored_alike(left, right, equal) or (widened and left.shape == right.shape)
    return comparable and equal(left, right)


def _stored_alike(left: TensorInfo, right: TensorInfo, equal: Equal) -> bool:
    kinds = ((info.stored_as, info.shape, info.encoding, info.n_bytes) for info in (left, right))
    if next(kinds) != next(kinds) or len(left.parts) != len(right.parts):
        return False
    return all(
        mine[0] == theirs[0] and _stored_alike(mine[1], theirs[1], equal) and equal(mine[1], theirs[1])
        for mine, theirs in zip(left.parts, right.parts, strict=True)
    )


def _all_equal(left: TensorInfo, right: TensorInfo, *, rounded: str | None = None) -> bool:
    size = left.n_params if left.encoding is None else left.n_bytes
    spans = ((start, min(start + BLOCK_ELEMENTS, size)) for start in range(0, size, BLOCK_ELEMENTS))
    return all(
        _numbers_equal(
            read_bytes(left, *_places(left, *span)), left, read_bytes(right, *_places(right, *span)), right, rounded
        )
        for span in spans
    )


def _windows_equal(left: TensorInfo, right: TensorInfo, *, rounded: str | None = None) -> bool:
    size = left.n_params if left.encoding is None else left.n_bytes
    last = max(0, size - WINDOW_ELEMENTS)
    starts = sorted({last * number // (WINDOWS - 1) for number in range(WINDOWS)})
    spans = [(start, min(start + WINDOW_ELEMENTS, size)) for start in starts]
    parts = read_spans([(info, *_places(info, *span)) for span in spans for info in (left, right)])
    return all(_numbers_equal(mine, left, theirs, right, rounded) for mine, theirs in zip(parts, parts, strict=True))


def _places(info: TensorInfo, start: int, stop: int) -> tuple[int, int]:
    """Which bytes hold some elements; of an encoded tensor, bytes themselves are counted."""
    if info.encoding is not None:
        return start, stop
    return n_bytes_of(info.dtype, (start,)), n_bytes_of(info.dtype, (stop,))


def _numbers_equal(mine: bytes, left: TensorInfo, theirs: bytes, right: TensorInfo, rounded: str | None) -> bool:
    """Whether bytes of `left` hold the numbers of those of `right`, rounded to a dtype where one is named."""
    if left.encoding is not None or (rounded is None and left.dtype == right.dtype):
        return mine == theirs
    numbers, wanted = decode_floats(mine, left.dtype), decode_floats(theirs, right.dtype)
    return np.array_equal(numbers, wanted if rounded is None else round_to(wanted, rounded))
