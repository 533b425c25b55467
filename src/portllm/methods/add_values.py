"""Plain addition for what a patch holds whole: values, rows and DoRA magnitudes are re-based on the evolved weights.

A value that stands in the place of the base's is a delta in disguise, `Δ = V - W0`, and plain addition gives
`W1 + Δ`. A DoRA weight `m · (W + Δ) / |W + Δ|` is not additive; carried over is the factor `m / |W0 + Δ|` by which each
row is scaled, so that the evolved weight becomes that factor times `W1 + Δ`.

Source: PortLLM (arXiv 2410.10870, eq. 6) for the addition; DoRA (Liu et al., 2024, arXiv 2402.09353, eq. 5) for the
form of the weight. Keeping the factor is this project's choice: keeping `m` would undo what the update did to norms.
"""

from dataclasses import replace

import torch
from torch import Tensor

from portllm.arrays import Float
from portllm.errors import NonFiniteError
from portllm.methods.contract import Inputs
from portllm.methods.values import Computed, Values, blocks, take_rows, whole
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta, RowValues, WholeValue
from portllm.patch.merge import add, delta_rows


def add_value(
    tuned: Float[Tensor, "rows d"], base: Float[Tensor, "rows d"], evolved: Float[Tensor, "rows d"]
) -> Float[Tensor, "rows d"]:
    """`W1 + Δ` with `Δ = V - W0`, as `V + (W1 - W0)`: where nothing drifted it is `V` itself, bit for bit.

    In float32 (float64 where a tensor is).

    Example:
        >>> add_value(torch.tensor([[3.0]]), torch.tensor([[1.0]]), torch.tensor([[1.5]]))
        tensor([[3.5000]])
    """
    dtype = torch.float64 if torch.float64 in (tuned.dtype, base.dtype, evolved.dtype) else torch.float32
    return tuned.to(dtype) + (evolved.to(dtype) - base.to(dtype))


def carry_magnitude(
    magnitude: Float[Tensor, " rows"], base: Float[Tensor, "rows d"], evolved: Float[Tensor, "rows d"]
) -> Float[Tensor, " rows"]:
    """`m · |W1 + Δ| / |W0 + Δ|`, row by row, of the sums of weight and delta in both models.

    Example:
        >>> carry_magnitude(torch.tensor([2.0]), torch.tensor([[3.0, 4.0]]), torch.tensor([[6.0, 8.0]]))
        tensor([4.])
    """
    before: Tensor = torch.linalg.vector_norm(base, dim=1)
    after: Tensor = torch.linalg.vector_norm(evolved, dim=1)
    return magnitude.to(after.dtype) * (after / before)


def carried_value(name: str, value: WholeValue[Values], inputs: Inputs) -> WholeValue[Values]:
    """A tensor that is held whole, re-based; as wide as it was, and no narrower than float32."""
    return WholeValue(_rebased(name, value.values, inputs.base[name], inputs.evolved[name]))


def carried_rows(name: str, rows: RowValues[Values], inputs: Inputs) -> RowValues[Values]:
    """Some rows of an embedding, re-based on the same rows of the evolved model's."""
    base, evolved = (take_rows(side[name], rows.rows) for side in (inputs.base, inputs.evolved))
    return RowValues(_rebased(name, rows.values, base, evolved), rows.rows)


def _rebased(name: str, values: Values, base: Values, evolved: Values) -> Computed:
    def rows(start: int, stop: int) -> Tensor:
        tuned, before, after = (side.rows(start, stop).reshape(stop - start, -1) for side in (values, base, evolved))
        moved = add_value(tuned, before, after)
        return moved if tuned.dtype == torch.float64 else moved.float()

    return Computed(name, tuple(values.shape), rows)


def carried_magnitude(
    module: str, delta: LowRankDelta[Values], magnitude: Values, inputs: Inputs
) -> LowRankDelta[Values]:
    """A DoRA whose magnitudes scale the rows of the evolved weight as they scaled those of the base.

    Raises:
        NonFiniteError: When the rows are asked for: one of them, weight and delta together, is zero.
    """
    sides = [side[module + WEIGHT] for side in (inputs.base, inputs.evolved)]

    def rows(start: int, stop: int) -> Tensor:
        a, b, factors = (whole(values) for values in (delta.a, delta.b, magnitude))
        if delta.transposed:
            weights = [whole(side).T for side in sides]
            return _carried(module, factors, *(add(weight, delta_rows(b, a, scale=delta.scale)) for weight in weights))[
                start:stop
            ]
        parts = []
        for first, last in blocks(stop - start, a.shape[1]):
            change = delta_rows(b[start + first : start + last], a, scale=delta.scale)
            sums = (add(side.rows(start + first, start + last), change) for side in sides)
            parts.append(_carried(module, factors[start + first : start + last], *sums))
        return torch.cat(parts)

    return replace(delta, magnitude=Computed(f"{module}.magnitude", tuple(magnitude.shape), rows))


def _carried(module: str, magnitude: Tensor, base: Tensor, evolved: Tensor) -> Tensor:
    if not evolved.any(dim=1).all():  # PEFT would divide by their norm
        raise NonFiniteError(
            f"'{module}': a row of the evolved weight plus the delta is zero, and DoRA cannot rescale it. Train "
            "the adapter without DoRA, or leave this module out."
        )
    return carry_magnitude(magnitude, base, evolved)
