"""Plain addition for what a patch holds whole: values, rows and DoRA magnitudes are re-based on the evolved weights.

A value that stands in the place of the base's is a delta in disguise, `Δ = V - W0`, and plain addition gives
`W1 + Δ`. A DoRA weight `m · (W + Δ) / |W + Δ|` is not additive; carried over is the factor `m / |W0 + Δ|` by which each
row is scaled, so that the evolved weight becomes that factor times `W1 + Δ`.

Source: PortLLM (arXiv 2410.10870, eq. 6) for the addition; DoRA (Liu et al., 2024, arXiv 2402.09353, eq. 5) for the
form of the weight. Keeping the factor is this project's choice: keeping `m` would undo what the update did to norms.
"""

import torch
from jaxtyping import Float
from torch import Tensor


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
