"""Add a delta to a weight, and measure what the storage dtype keeps of it. Pure: tensors in, tensors and sums out.

Source: the delta `s·B·A` is LoRA's (Hu et al., 2021, arXiv 2106.09685, eq. 3); adding an old delta to an evolved
weight is PortLLM's (arXiv 2410.10870, eq. 6). The measures are this project's.

The functions take a `Scratch` where a caller has many blocks to do: fresh memory for every value of every block costs
more than the arithmetic on it.
"""

import math

import torch
from torch import Tensor

from portllm.arrays import BFloat16, Float, Int32
from portllm.patch.rounding import MergeSums


class Scratch:
    """Memory for the values of one block, used again for the next. One thread, one scratch.

    What it gave out under a name is overwritten when that name is asked for again.

    Example:
        >>> scratch = Scratch()
        >>> first = scratch.array("sum", (2, 3), torch.float32)
        >>> scratch.array("sum", (3, 1), torch.float32).data_ptr() == first.data_ptr()
        True
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._held: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[str, torch.dtype], Tensor] = {}

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of this shape, with whatever it held before."""
        view = self._views.get((name, dtype))
        if view is None or view.shape != shape:
            size = math.prod(shape)
            held = self._held.get((name, dtype))
            if held is None or held.numel() < size:
                held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
            view = self._views[name, dtype] = held[:size].view(shape)
        return view

    def wide(self, name: str, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The same values in `dtype`, on this device; the tensor itself where it is so already."""
        if values.dtype == dtype and values.device.type == self.device:
            return values
        return self.array(name, tuple(values.shape), dtype).copy_(values)


def delta_rows(
    b: Float[Tensor, "rows rank"],
    a: Float[Tensor, "rank d_in"],
    *,
    scale: float,
    scratch: Scratch | None = None,
) -> Float[Tensor, "rows d_in"]:
    """Rows of the delta `scale · B A`, for the same rows of B, in float32 (float64 where a factor is).

    Example:
        >>> delta_rows(torch.tensor([[1.0], [2.0]]), torch.tensor([[3.0, 4.0]]), scale=0.5)
        tensor([[1.5000, 2.0000],
                [3.0000, 4.0000]])
    """
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    product = (scratch or Scratch(b.device.type)).array("delta", (b.shape[0], a.shape[1]), dtype)
    torch.mm(b.to(dtype), a.to(dtype), out=product)
    return product if scale == 1.0 else product.mul_(scale)


def fold_scale(
    b: Float[Tensor, "d_out rank"], a: Float[Tensor, "rank d_in"], scale: float
) -> tuple[Float[Tensor, "d_out rank"], float]:
    """B and the scale, or `scale · B` and 1 where `delta_rows` gives the same bits for both.

    A power of two commutes with every rounding but that of a number which is too small or too large for all its bits.
    None is too large where the greatest sum is not. None is too small where the smallest last bits of both factors have
    a product that is a number: all products and sums are multiples of it.

    Example:
        >>> fold_scale(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 2.0)
        (tensor([[2.]]), 1.0)
        >>> fold_scale(torch.tensor([[1.0]]), torch.tensor([[3.0]]), 0.7)
        (tensor([[1.]]), 0.7)
    """
    if math.frexp(scale)[0] != 0.5 or {b.dtype, a.dtype} != {torch.float32}:  # no power of two, or wider sums
        return b, scale
    number = torch.finfo(torch.float32)
    sizes = [factor.abs() for factor in (b, a)]
    greatest = [size.max().item() for size in sizes]
    greatest_sum = math.prod(greatest) * b.shape[1] * max(1.0, scale)
    if not math.isfinite(greatest_sum):
        return b, scale
    last_bits = [number.eps / 2 * size.masked_fill_(size == 0, number.max).min().item() for size in sizes]
    smallest = min(math.prod(last_bits) * min(1.0, scale), last_bits[0] * scale)
    is_exact = greatest_sum < number.max / 2 and greatest[0] * scale < number.max and smallest >= 2.0**-149
    return (b * scale, 1.0) if is_exact else (b, scale)


def add(
    weight: Float[Tensor, "rows d_in"], delta: Float[Tensor, "rows d_in"], *, scratch: Scratch | None = None
) -> Float[Tensor, "rows d_in"]:
    """The sum `W + Δ` in float32 (float64 where either is), before it is rounded to a storage dtype."""
    working = torch.float64 if torch.float64 in (weight.dtype, delta.dtype) else torch.float32
    scratch = scratch or Scratch(delta.device.type)
    left, right = scratch.wide("weight", weight, working), scratch.wide("wide delta", delta, working)
    return torch.add(left, right, out=scratch.array("sum", tuple(delta.shape), working))


def renormalize(exact: Float[Tensor, "rows d_in"], magnitude: Float[Tensor, " rows"]) -> Float[Tensor, "rows d_in"]:
    """DoRA's weight `m · V / |V|`, row by row, of the sum `V = W + Δ`.

    Source: DoRA (Liu et al., 2024, arXiv 2402.09353, eq. 5).

    Example:
        >>> renormalize(torch.tensor([[3.0, 4.0]]), torch.tensor([10.0]))
        tensor([[6., 8.]])
    """
    norms: Tensor = torch.linalg.vector_norm(exact, dim=1)
    factors: Tensor = magnitude.to(exact.dtype) / norms
    return factors[:, None] * exact


def round_nearest(
    exact: Float[Tensor, "rows d_in"], *, dtype: torch.dtype, scratch: Scratch | None = None
) -> Float[Tensor, "rows d_in"]:
    """`Q(V)`: rounded once, to nearest even, to `dtype`.

    Example:
        >>> weight = torch.tensor([[1.0]], dtype=torch.bfloat16)
        >>> round_nearest(add(weight, torch.tensor([[0.01]])), dtype=torch.bfloat16)
        tensor([[1.0078]], dtype=torch.bfloat16)
    """
    return (scratch or Scratch(exact.device.type)).wide("rounded", exact, dtype)


def round_stochastic(
    exact: Float[Tensor, "rows d_in"], *, noise: Int32[Tensor, "rows d_in"]
) -> BFloat16[Tensor, "rows d_in"]:
    """`Q(V)` in bfloat16, rounded up or down with the probability that keeps the expected value exact.

    `noise`, uniform in [0, 2^16), is added to the half of the float32 bits that bfloat16 drops before they are cut off,
    so a value a quarter of the way to the next one goes there once in four times.

    Source: stochastic rounding as in Croci et al., 2022 (https://doi.org/10.1098/rsos.211631), mode 1.

    Example:
        >>> exact = torch.full((1, 4), 1.0 + 2.0**-9)
        >>> round_stochastic(exact, noise=torch.tensor([[0, 49151, 49152, 65535]], dtype=torch.int32))
        tensor([[1.0000, 1.0000, 1.0078, 1.0078]], dtype=torch.bfloat16)
    """
    bits = exact.float().view(torch.int32)
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)


def measure_merge(
    weight: Float[Tensor, "rows d_in"],
    delta: Float[Tensor, "rows d_in"],
    merged: Float[Tensor, "rows d_in"],
    *,
    scratch: Scratch | None = None,
) -> MergeSums:
    """The sums of one block of rows, each a dot product in float32 (float64 where a tensor is).

    Error: the terms are formed element by element, so nothing is lost where the change is small beside the weight. A
    dot product of n terms in k lanes errs by at most (n/k + k)·2^-24 of the sum of the terms' sizes; the tests hold the
    measures to 1e-5 of float64.

    Example:
        >>> weight, delta = torch.ones(1, 2), torch.full((1, 2), 0.25)
        >>> round(measure_merge(weight, delta, weight + delta).kept_gain, 6)
        1.0
    """
    working = torch.promote_types(delta.dtype, torch.promote_types(weight.dtype, torch.float32))
    scratch = scratch or Scratch(delta.device.type)
    before, added = scratch.wide("weight", weight, working).reshape(-1), delta.reshape(-1)
    # The exact sum is not needed any more when it was rounded to something else than itself.
    room = "change" if merged.dtype == working else "sum"
    change = scratch.array(room, tuple(delta.shape), working).copy_(merged).reshape(-1).sub_(before)
    gain, delta_sq = torch.dot(change, added), torch.dot(added, added)
    lost = change.sub_(added)
    sums = torch.stack((delta_sq, gain, torch.dot(lost, lost), torch.dot(before, before)))
    return MergeSums(*sums.tolist())
