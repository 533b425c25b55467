"""Carry over what a patch holds whole; it reads those weights of base and evolved, block by block, and no others."""

from dataclasses import replace

import torch
from torch import Tensor

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.reader import Checkpoint
from portllm.checkpoint.tensors import load, load_rows
from portllm.errors import NonFiniteError
from portllm.methods.add_values import add_value, carry_magnitude
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta, RowValues, WholeValue
from portllm.patch.merge import add, delta_rows
from portllm.patch.patch import Patch
from portllm.pipeline.fit import tensor_of
from portllm.pipeline.spool import Spool

BLOCK_ELEMENTS = 1 << 22


def rebase(patch: Patch[TensorInfo], *, base: Checkpoint, evolved: Checkpoint, spool: Spool) -> Patch[TensorInfo]:
    """The patch with its values, rows and magnitudes re-based from one model on the other.

    Args:
        patch: It fits both models.
        base: The model it belongs to.
        evolved: Where it is carried to.
        spool: Takes the new tensors.

    Raises:
        NonFiniteError: A value becomes infinite or not a number.
    """
    pairs = {name: (_tensor(name, base), _tensor(name, evolved)) for name in _whole_names(patch)}
    values = {
        name: WholeValue(_rebase_value(name, whole.values, pairs[name], spool)) for name, whole in patch.values.items()
    }
    rows = {name: _rebase_rows(name, rows, pairs[name], spool) for name, rows in patch.rows.items()}
    deltas = dict(patch.deltas)
    for module, delta in patch.deltas.items():
        if delta.magnitude is not None:
            magnitude = _rebase_magnitude(module, delta, delta.magnitude, pairs[module + WEIGHT], spool)
            deltas[module] = replace(delta, magnitude=magnitude)
    return replace(patch, values=values, rows=rows, deltas=deltas)


Pair = tuple[TensorInfo, TensorInfo]
"""The same tensor in base and evolved."""


def _whole_names(patch: Patch[TensorInfo]) -> list[str]:
    magnitudes = [module + WEIGHT for module, delta in patch.deltas.items() if delta.magnitude is not None]
    return [*patch.values, *patch.rows, *magnitudes]


def _tensor(name: str, checkpoint: Checkpoint) -> TensorInfo:
    found = tensor_of(name, checkpoint)
    return checkpoint.info(name) if found is None else found


def _rebase_value(name: str, values: TensorInfo, pair: Pair, spool: Spool) -> TensorInfo:
    rows = values.shape[0] if values.shape else 1
    step = max(1, BLOCK_ELEMENTS // max(1, values.n_params // max(1, rows)))
    with spool.writing(name, "F64" if values.dtype == "F64" else "F32", values.shape) as entry:
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            tuned, base, evolved = (_matrix(info, start, stop) for info in (values, *pair))
            moved = _finite(name, add_value(tuned, base, evolved))
            entry.append_tensor(moved if values.dtype == "F64" else moved.float())
    return entry.info


def _rebase_rows(name: str, rows: RowValues[TensorInfo], pair: Pair, spool: Spool) -> RowValues[TensorInfo]:
    base, evolved = (torch.cat([load_rows(info, row, row + 1) for row in rows.rows]) for info in pair)
    moved = _finite(name, add_value(load(rows.values), base, evolved))
    return RowValues(spool.add(name, moved), rows.rows)


def _rebase_magnitude(
    module: str, delta: LowRankDelta[TensorInfo], magnitude: TensorInfo, pair: Pair, spool: Spool
) -> TensorInfo:
    a, b, factors = load(delta.a), load(delta.b), load(magnitude)
    step = len(b) if delta.transposed else max(1, BLOCK_ELEMENTS // max(1, a.shape[1]))
    parts = []
    for start in range(0, len(b), step):
        stop = min(start + step, len(b))
        change = delta_rows(b[start:stop], a, scale=delta.scale)
        base, evolved = (add(_output_rows(info, delta, start, stop), change) for info in pair)
        if not evolved.any(dim=1).all():  # PEFT would divide by their norm
            raise NonFiniteError(
                f"'{module}': a row of the evolved weight and the delta together is zero, and DoRA scales rows to a "
                "length. Train the adapter without DoRA, or leave this module out."
            )
        parts.append(carry_magnitude(factors[start:stop], base, evolved))
    return spool.add(f"{module}.magnitude", _finite(module, torch.cat(parts)))


def _output_rows(info: TensorInfo, delta: LowRankDelta[TensorInfo], start: int, stop: int) -> Tensor:
    return load(info).T if delta.transposed else load_rows(info, start, stop)


def _matrix(info: TensorInfo, start: int, stop: int) -> Tensor:
    return load_rows(info, start, stop).reshape(stop - start, -1)


def _finite(name: str, values: Tensor) -> Tensor:
    if not values.isfinite().all():
        raise NonFiniteError(
            f"'{name}': re-based on the evolved model it holds an infinity or NaN. Look for one in the patch and in "
            "both models, and for rows of zeros under a DoRA magnitude."
        )
    return values
