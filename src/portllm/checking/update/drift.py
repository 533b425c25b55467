"""How far an evolved model moved from its base: every weight of both is read once, in blocks, as fast as they come.

Blocks are shared among threads, which read and compute side by side: reading, and numpy, leave Python's lock. What a
block is does not depend on the number of threads, and sums are added in the order of the blocks, so neither do they.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from portllm.arrays import Float32, Shaped
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import on_disk
from portllm.matching.tensor_pairs import TensorPair, pair_tensors
from portllm.measures.drift import DriftSums
from portllm.measures.drift_kernel import DriftKernel, widen
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.spans import SpanReader
from portllm.tensors.windows import load_values
from portllm.workers.threads import default_threads

BLOCK_ELEMENTS = 1 << 20
"""Elements of a weight that are read and measured at once."""

STORED: Mapping[str, str] = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "F64": "<f8"}
"""How numpy holds the dtypes that weights are stored in; bfloat16, which it does not have, as its bits."""

STRETCH = 8
"""Blocks of a weight that a thread takes one after the other: to hand over each for itself takes Python too long."""

WAITING = 4
"""Stretches for each thread that are under way or done and not yet added up."""

Stretch = tuple[TensorPair, Sequence[tuple[int, int]]]
"""A weight and some of its blocks, each with its first element and the one behind its last."""


@dataclass(frozen=True, slots=True)
class DriftReport:
    """Drift of each tensor that both models have in the same shape, and what was left out.

    Attributes:
        tensors: The sums of each compared tensor, by name.
        left_out: Tensors that only one model has, or that have another shape or no floating-point values.
    """

    tensors: Mapping[str, DriftSums]
    left_out: tuple[str, ...]

    @property
    def total(self) -> DriftSums:
        """The sums over all compared tensors."""
        return sum(self.tensors.values(), DriftSums())


@dataclass(frozen=True, slots=True)
class PairDrift:
    """What was measured of one weight.

    Attributes:
        sums: Over all elements.
        columns: The drift of the columns that were asked for, shape (rows, columns); None where none were.
    """

    sums: DriftSums
    columns: Float32[np.ndarray, "rows columns"] | None = None


def measure_drift(
    base: Checkpoint, evolved: Checkpoint, *, threads: int | None = None, progress: Progress = silent
) -> DriftReport:
    """Compare two models tensor by tensor, whatever the spelling of their names and the layout of their experts.

    Sums are float32 products over blocks, added in float64: within 1e-5 of float64 throughout. Of an embedding or head
    with another number of rows, the rows that both have are compared.

    Args:
        base: The earlier model; models of the hub are downloaded.
        evolved: The later one.
        threads: Blocks that are read and measured side by side; by default one for each processor. The result is the
            same for any number.
        progress: Progress callback (bytes read of both models).

    Raises:
        CheckpointError: A file cannot be read.
    """
    base, evolved = (on_disk(checkpoint, progress=progress) for checkpoint in (base, evolved))
    pairing = pair_tensors(base, evolved)
    drifts = measure_pairs(list(pairing.pairs.values()), threads=threads, progress=progress)
    left_out = {*pairing.added, *pairing.removed, *pairing.reshaped, *pairing.no_numbers}
    return DriftReport({name: drift.sums for name, drift in drifts.items()}, tuple(sorted(left_out)))


def measure_pairs(
    pairs: Sequence[TensorPair],
    *,
    columns: Mapping[str, Sequence[int]] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> dict[str, PairDrift]:
    """The drift of each pair, by name; of those in `columns`, also the drift of these columns."""
    threads = default_threads() if threads is None else threads
    wanted = {name: np.array(places, np.intp) for name, places in (columns or {}).items()}
    total = sum(pair.base.n_bytes + pair.evolved.n_bytes for pair in pairs)
    stretches = [stretch for pair in pairs for stretch in _stretches(pair)]
    done = 0
    sums: dict[str, DriftSums] = {pair.name: DriftSums() for pair in pairs}
    parts: dict[str, list[Float32[np.ndarray, "rows columns"]]] = {name: [] for name in wanted}
    own = threading.local()

    def measure(stretch: Stretch) -> list[PairDrift]:
        if not hasattr(own, "kernel"):
            own.kernel = DriftKernel()
            own.readers = tuple(opened.enter_context(SpanReader()) for _ in range(2))
        pair, blocks = stretch
        return [_measure(pair, start, stop, own.kernel, own.readers, wanted.get(pair.name)) for start, stop in blocks]

    with ExitStack() as opened, ThreadPoolExecutor(threads) as pool:
        for (pair, blocks), drifts in zip(stretches, _in_order(pool, measure, stretches, threads), strict=True):
            for drift in drifts:
                sums[pair.name] += drift.sums
                if drift.columns is not None:
                    parts[pair.name].append(drift.columns)
            n_elements = blocks[-1][1] - blocks[0][0]
            done += n_elements * (pair.base.n_bytes + pair.evolved.n_bytes) // max(1, pair.base.n_params)
            progress("drift", min(done, total), total, "bytes")
        if done < total:  # a tensor's bytes need not divide by its elements
            progress("drift", total, total, "bytes")
    return {
        name: PairDrift(found, np.concatenate(parts[name]) if parts.get(name) else None) for name, found in sums.items()
    }


def _measure(
    pair: TensorPair,
    start: int,
    stop: int,
    kernel: DriftKernel,
    readers: tuple[SpanReader, SpanReader],
    places: Shaped[np.ndarray, " columns"] | None,
) -> PairDrift:
    base, evolved = (
        _load(reader, info, start, stop) for reader, info in zip(readers, (pair.base, pair.evolved), strict=True)
    )
    sums = kernel.measure(base, evolved)
    if places is None:
        return PairDrift(sums)
    old, new = (_columns(values, pair.width, places) for values in (base, evolved))
    return PairDrift(sums, new - old)


def _load(reader: SpanReader, info: TensorInfo, start: int, stop: int) -> Shaped[np.ndarray, " n"]:
    """Elements `start` to `stop` of a tensor in row-major order, as `STORED`; good until the reader's next call."""
    if info.encoding is not None:
        return load_values(info, start, stop)
    first, last = (n_bytes_of(info.dtype, (place,)) for place in (start, stop))
    return np.frombuffer(reader.span(info, first, last), STORED[info.dtype])


def _columns(
    values: Shaped[np.ndarray, " n"], width: int, places: Shaped[np.ndarray, " columns"]
) -> Float32[np.ndarray, "rows columns"]:
    picked = np.take(values.reshape(-1, width), places, axis=1)  # and not [:, places], which keeps the lock
    wide = np.empty(picked.shape, np.float32)
    widen(picked, wide)
    return wide


def _stretches(pair: TensorPair) -> Iterator[Stretch]:
    """Blocks of about `BLOCK_ELEMENTS`, `STRETCH` at a time: whole rows, but for rows that are longer."""
    step = max(1, BLOCK_ELEMENTS // max(1, pair.width)) * pair.width
    blocks = [(at, min(at + step, pair.base.n_params)) for at in range(0, pair.base.n_params, max(1, step))]
    for first in range(0, len(blocks), STRETCH):
        yield pair, blocks[first : first + STRETCH]


def _in_order(
    pool: ThreadPoolExecutor,
    work: Callable[[Stretch], list[PairDrift]],
    stretches: Sequence[Stretch],
    threads: int,
) -> Iterator[list[PairDrift]]:
    """The results of `work` in the order of the stretches; no more of them wait than there is memory for."""
    waiting: deque[Future[list[PairDrift]]] = deque()
    try:
        for stretch in stretches:
            waiting.append(pool.submit(work, stretch))
            if len(waiting) >= WAITING * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()
