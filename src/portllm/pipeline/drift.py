"""How far an evolved model moved from its base: both are read once, tensor by tensor, in blocks."""

from collections.abc import Mapping
from dataclasses import dataclass

from portllm.assess.drift import DriftSums
from portllm.assess.drift import measure_drift as measure_block
from portllm.checkpoint.header import FLOAT_DTYPES
from portllm.checkpoint.identity import own_tensors
from portllm.checkpoint.reader import Checkpoint
from portllm.checkpoint.sample import load_values
from portllm.progress import Progress, silent

BLOCK_ELEMENTS = 1 << 22


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


def measure_drift(base: Checkpoint, evolved: Checkpoint, *, progress: Progress = silent) -> DriftReport:
    """Compare two models tensor by tensor.

    Raises:
        CheckpointError: A file cannot be read.
    """
    before, after = own_tensors(base), own_tensors(evolved)
    compared = [
        name
        for name, info in before.items()
        if name in after and after[name].shape == info.shape and {info.dtype, after[name].dtype} <= set(FLOAT_DTYPES)
    ]
    total = sum(before[name].n_params for name in compared)
    done = 0
    sums: dict[str, DriftSums] = {}
    for name in compared:
        sums[name] = DriftSums()
        for start in range(0, before[name].n_params, BLOCK_ELEMENTS):
            stop = min(start + BLOCK_ELEMENTS, before[name].n_params)
            blocks = [load_values(info, start, stop) for info in (before[name], after[name])]
            sums[name] += measure_block(*blocks)
            done += stop - start
            progress("drift", 4 * done, 4 * total, "bytes")
    return DriftReport(sums, tuple(sorted((set(before) | set(after)) - set(compared))))
