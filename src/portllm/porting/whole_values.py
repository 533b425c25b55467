"""Carry over what a patch holds whole; it reads those weights of base and evolved, block by block, and no others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.reading.spool import Spool
from portllm.checkpoint.reading.tensors import load, load_rows
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import NonFiniteError
from portllm.matching.token_rows import TokenMap, moved_config, runs, token_changes, with_token_factor
from portllm.methods.add_values import add_value, carry_magnitude
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta, RowValues, WholeValue
from portllm.patch.merge import add, delta_rows
from portllm.patch.patch import Patch

BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Rebased:
    """A patch on another base.

    Attributes:
        patch: Its new tensors lie in the spool.
        left_out: By tensor, tokens whose change was dropped, for the evolved model does not have them.
    """

    patch: Patch[TensorInfo]
    left_out: Mapping[str, tuple[str, ...]]


def rebase(
    patch: Patch[TensorInfo],
    *,
    base: Checkpoint,
    evolved: Checkpoint,
    tokens: TokenMap | None = None,
    spool: Spool,
) -> Rebased:
    """The patch with its values, rows and magnitudes re-based from one model on the other.

    Args:
        patch: It fits both models, but for the rows of their vocabularies.
        base: The model it belongs to.
        evolved: Where it is carried to.
        tokens: Which rows follow which tokens, where they are not the same in both.
        spool: Takes the new tensors.

    Raises:
        NonFiniteError: A value becomes infinite or not a number.
    """
    pairs = {name: (_tensor(name, base), _tensor(name, evolved)) for name in _whole_names(patch)}
    by_token = [] if tokens is None else token_changes(patch, base)
    left_out: dict[str, tuple[str, ...]] = {}
    values, rows, deltas = {}, {}, dict(patch.deltas)
    for name, whole in patch.values.items():
        if tokens is not None and name in by_token:
            values[name] = WholeValue(_move_value(name, whole.values, pairs[name], tokens, spool))
            left_out[name] = _lost_rows(whole.values, pairs[name][0], tokens)
        else:
            values[name] = WholeValue(_rebase_value(name, whole.values, pairs[name], spool))
    for name, old in patch.rows.items():
        moved = _rebase_rows(name, old, pairs[name], tokens if name in by_token else None, spool)
        if tokens is not None and name in by_token:
            left_out[name] = tuple(tokens.gone[row] for row in old.rows if row in tokens.gone)
        if moved.rows:
            rows[name] = moved
    if tokens is not None:
        for module in [module for module in deltas if module + WEIGHT in by_token]:
            deltas[module], left_out[module + WEIGHT] = _move_delta(module, deltas[module], tokens, spool)
    for module, delta in patch.deltas.items():
        if delta.magnitude is not None:
            magnitude = _rebase_magnitude(module, delta, delta.magnitude, pairs[module + WEIGHT], spool)
            deltas[module] = replace(deltas[module], magnitude=magnitude)
    config = patch.config if tokens is None else moved_config(patch.config, tokens)
    moved_patch = replace(patch, values=values, rows=rows, deltas=deltas, config=config)
    return Rebased(moved_patch, {name: lost for name, lost in left_out.items() if lost})


Pair = tuple[TensorInfo, TensorInfo]
"""The same tensor in base and evolved."""


def _whole_names(patch: Patch[TensorInfo]) -> list[str]:
    magnitudes = [module + WEIGHT for module, delta in patch.deltas.items() if delta.magnitude is not None]
    return [*patch.values, *patch.rows, *magnitudes]


def _tensor(name: str, checkpoint: Checkpoint) -> TensorInfo:
    return checkpoint.tensor(name) or checkpoint.info(name)


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


def _rebase_rows(
    name: str, rows: RowValues[TensorInfo], pair: Pair, tokens: TokenMap | None, spool: Spool
) -> RowValues[TensorInfo]:
    places = dict(zip(rows.rows, rows.rows, strict=True)) if tokens is None else tokens.places
    kept = [number for number, row in enumerate(rows.rows) if row in places]
    if not kept:
        return RowValues(rows.values, ())
    old = [rows.rows[number] for number in kept]
    new = [places[row] for row in old]
    moved = add_value(load(rows.values)[kept], _picked(pair[0], old), _picked(pair[1], new))
    return RowValues(spool.add(name, _finite(name, moved)), tuple(new))


def _picked(info: TensorInfo, rows: Sequence[int]) -> Tensor:
    return torch.cat([load_rows(info, row, row + 1) for row in rows])


def _move_value(name: str, values: TensorInfo, pair: Pair, tokens: TokenMap, spool: Spool) -> TensorInfo:
    """The evolved tensor, with what was learned of each token added to the row that the token has there."""
    step = max(1, BLOCK_ELEMENTS // max(1, values.n_params // values.shape[0]))
    shape = (len(tokens.rows), *values.shape[1:])
    with spool.writing(name, "F64" if values.dtype == "F64" else "F32", shape) as entry:
        for start in range(0, shape[0], step):
            wanted = tokens.rows[start : start + step]
            evolved = _matrix(pair[1], start, start + len(wanted))
            moved = evolved.to(torch.float64 if values.dtype == "F64" else torch.float32, copy=True)
            for first, last in runs(wanted):
                if wanted[first] >= 0:
                    tuned, base = (_matrix(i, wanted[first], wanted[last - 1] + 1) for i in (values, pair[0]))
                    moved[first:last] = add_value(tuned, base, evolved[first:last])
            entry.append_tensor(_finite(name, moved))
    return entry.info


def _lost_rows(values: TensorInfo, base: TensorInfo, tokens: TokenMap) -> tuple[str, ...]:
    """The tokens that are gone and whose rows were trained."""
    lost = []
    for row, token in tokens.gone.items():
        tuned, before = (load_rows(info, row, row + 1) for info in (values, base))
        if not tuned.double().equal(before.double()):
            lost.append(token)
    return tuple(lost)


def _move_delta(
    module: str, delta: LowRankDelta[TensorInfo], tokens: TokenMap, spool: Spool
) -> tuple[LowRankDelta[TensorInfo], tuple[str, ...]]:
    """The delta with the factor on the side of the tokens in their new order, zero for new ones; and what is lost."""
    by_row = load(delta.a).T if delta.is_embedding else load(delta.b)
    rows = torch.tensor(tokens.rows)
    moved = torch.where((rows >= 0)[:, None], by_row[rows.clamp(min=0)], torch.zeros((), dtype=by_row.dtype))
    lost = tuple(token for row, token in tokens.gone.items() if by_row[row].any())
    factor = spool.add(f"{module}.tokens", moved.T.contiguous() if delta.is_embedding else moved)
    return with_token_factor(delta, factor), lost


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
