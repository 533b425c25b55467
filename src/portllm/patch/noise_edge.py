"""How much of a difference of two stored weights is rounding, and where in its spectrum that noise ends. Pure.

A number that was rounded to a storage dtype is off by up to half a step, and a step is known from its exponent: taken
as uniform, the error has the variance `step² / 12`. In the difference of two files both errors are present. What is
learned stands out of such noise as singular values above the noise's own largest, its edge.

For noise of one variance σ² the edge is `σ (√m + √n)`. Weights are not so even: rows and columns of larger values have
larger steps, and on the weights of real models that form is up to two times too low, so that noise passes for signal.
Here the variances of rows and columns are taken as they are.

Source: Marchenko and Pastur, 1967; for variances that are a product of a row's and a column's, the self-consistent
equations of Zhang, 2007, as in Couillet and Hachem, 2014 (https://doi.org/10.1142/S2010326314500160); the size of
fluctuations at the edge from Johnstone, 2001 (https://doi.org/10.1214/aos/1009210544).
"""

import math

import torch
from torch import Tensor

from portllm.arrays import Float, Float64
from portllm.linalg import working_dtype

FRACTION_BITS = {torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7}
LEAST_EXPONENT = {torch.float64: -1022, torch.float32: -126, torch.float16: -14, torch.bfloat16: -126}

EXPONENT = {torch.float64: (torch.int64, 0x7FF << 52), torch.float32: (torch.int32, 0xFF << 23)}
"""The integers of a working dtype's width, and where in them the exponent stands."""

TRACY_WIDOM_999 = 3.27
"""One largest singular value in a thousand lies farther out than this many units of its fluctuation."""

SEARCH_STEPS = 24
BISECTION_STEPS = 32
GOLDEN = (math.sqrt(5) - 1) / 2


def rounding_variance(stored: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
    """`step² / 12` of each number, with the step of its storage dtype at its exponent; float32 (float64 for float64).

    Numbers of float32 that all fit into bfloat16 were stored in that once, so its step is theirs.

    Example:
        >>> rounding_variance(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)) * 12 == torch.tensor([[2**-14, 2**-12]])
        tensor([[True, True]])
    """
    dtype = torch.bfloat16 if _is_bfloat16(stored) else stored.dtype
    working = stored.to(working_dtype(stored)).contiguous()
    # The exponent's bits alone are the power of two below a number.
    integers, exponent = EXPONENT[working.dtype]
    power = (working.view(integers) & exponent).view(working.dtype)
    power.clamp_(min=2.0 ** LEAST_EXPONENT[dtype])
    return power.square_().mul_(4.0 ** -FRACTION_BITS[dtype] / 12)


def noise_edge(rows: Float64[Tensor, " d_out"], columns: Float64[Tensor, " d_in"]) -> float:
    """The largest singular value that noise of these variances has in all but one of a thousand draws.

    With `v_ij = a_i b_j`, `b` summing to one, the edge `z` of the noise's spectrum is the least of
    `z² = f(x) / y` over `0 < x < 1 / max(a)`, where `f(x) = Σ a_i / (1 - a_i x)`, `g(y) = Σ b_j / (1 - b_j y)` and
    `y` solves `y g(y) = x f(x)`. With all variances equal it is `σ (√m + √n)`. What one draw may lie above it is
    taken from the Tracy-Widom law, at the number of rows and columns that carry the variance.

    Args:
        rows: Sum of the variances of each row.
        columns: Sum of the variances of each column.

    Returns:
        The edge; 0.0 where there is no noise.

    Example:
        >>> even = noise_edge(torch.full((300,), 700.0).double(), torch.full((700,), 300.0).double())
        >>> 1.0 < even / (300**0.5 + 700**0.5) < 1.02
        True
    """
    total = float(rows.sum().item())
    if not total > 0 or not math.isfinite(total):
        return 0.0
    a, b = rows / total, columns / total
    low, high = 0.0, 1 / float(a.max().item())
    left, right = high - GOLDEN * high, GOLDEN * high
    at_left, at_right = _edge_sq(a, b, left), _edge_sq(a, b, right)
    for _ in range(SEARCH_STEPS):
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - GOLDEN * (high - low)
            at_left = _edge_sq(a, b, left)
        else:
            low, left, at_left = left, right, at_right
            right = low + GOLDEN * (high - low)
            at_right = _edge_sq(a, b, right)
    return math.sqrt(min(at_left, at_right) * total) * (1 + _fluctuation(a, b))


def _edge_sq(a: Float64[Tensor, " d_out"], b: Float64[Tensor, " d_in"], x: float) -> float:
    """`f(x) / y` with the `y` that belongs to `x`."""
    f = float((a / (1 - a * x)).sum().item())
    low, high = 0.0, 1 / float(b.max().item())
    for _ in range(BISECTION_STEPS):
        middle = (low + high) / 2
        product = float((b * middle / (1 - b * middle)).sum().item())
        low, high = (middle, high) if product < x * f else (low, middle)
    return f / high


def _fluctuation(a: Float64[Tensor, " d_out"], b: Float64[Tensor, " d_in"]) -> float:
    """How far, as a share of the edge, a largest singular value lies above it in one draw of a thousand."""
    m, n = (math.sqrt(1 / float(shares.square().sum().item())) for shares in (a, b))
    return TRACY_WIDOM_999 / 2 * math.cbrt(1 / m + 1 / n) / (m + n)


def _is_bfloat16(stored: Float[Tensor, "rows d_in"]) -> bool:
    if stored.dtype != torch.float32:
        return False
    return not bool((stored.contiguous().view(torch.int32) & 0xFFFF).any().item())
