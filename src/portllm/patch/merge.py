"""Add a delta to a weight, and measure what the storage dtype keeps of it. Pure: tensors in, tensors and sums out.

Source: the delta `s·B·A` is LoRA's (Hu et al., 2021, arXiv 2106.09685, eq. 3); adding an old delta to an evolved
weight is PortLLM's (arXiv 2410.10870, eq. 6). The measures are this project's.

The functions take a `Scratch` where a caller has many blocks to do: fresh memory for every value of every block costs
more than the arithmetic on it.
"""

import math

import torch
from jaxtyping import BFloat16, Float, Int32
from torch import Tensor

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

    def array(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of this shape, with whatever it held before."""
        size = math.prod(shape)
        held = self._held.get((name, dtype))
        if held is None or held.numel() < size:
            held = self._held[name, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size].view(shape)

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
    return torch.mm(b.to(dtype), a.to(dtype), out=product).mul_(scale)


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
    """The sums of one block of rows: each row's in float32 (float64 where a tensor is), over rows in float64.

    Example:
        >>> weight, delta = torch.ones(1, 2), torch.full((1, 2), 0.25)
        >>> round(measure_merge(weight, delta, weight + delta).kept_gain, 6)
        1.0
    """
    working = torch.promote_types(delta.dtype, torch.promote_types(weight.dtype, torch.float32))
    scratch = scratch or Scratch(delta.device.type)
    shape = tuple(delta.shape)
    before = scratch.wide("weight", weight, working)
    change = scratch.array("change", shape, working).copy_(merged).sub_(before)
    product = scratch.array("product", shape, working)
    sums = scratch.array("sums", (4, shape[0]), working)
    for row, left, right in ((0, delta, delta), (1, change, delta), (3, before, before)):
        torch.sum(torch.mul(left, right, out=product), dim=1, out=sums[row])
    lost = change.sub_(delta)
    torch.sum(torch.mul(lost, lost, out=product), dim=1, out=sums[2])
    return MergeSums(*sums.sum(dim=1, dtype=torch.float64).tolist())
