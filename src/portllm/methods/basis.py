"""The factors of a patch in the basis of another model, from what both models make of the same tokens. Pure.

A patch adds `B A x` to the output y of a module. Where the evolved model computes with other units (in another order,
rotated, or learned anew), A and B mean nothing there. Both models read the same tokens, without the patch; with the
inputs X0, X1 and the outputs Y0, Y1 of a module in both, a row a token, wanted are

    A1 = argmin |X1 A1' - X0 A'|² + λ |A1|²,        which reads in the evolved model what A reads in the base;
    B1 = Y1' C,  C = argmin |Y0' C - B|² + λ |C|²,  which writes there what B writes here.

C says of which tokens' outputs B is made. It is the ridge regression M of Y1 on Y0, applied to B, without the matrix M.
Where the one model is the other in another basis, and the tokens span its inputs and outputs, `B1 A1` is the patch in
that basis, exactly. Y may be anything that the change of basis takes along with the outputs.

Source: this project, docs/methods/transport.md. Ridge regression: Hoerl and Kennard (1970), Technometrics 12(1).
"""

import torch
from torch import Tensor

from portllm.arrays import Float, Float64

RHO = 1e-9
"""Ridge, as a share of the mean square of what is regressed on: no more than what keeps float32 states from being read
as directions of their own."""


def input_factor(
    a: Float[Tensor, "r d0"], before: Float[Tensor, "tokens d0"], after: Float[Tensor, "tokens d1"]
) -> tuple[Float64[Tensor, "r d1"], float]:
    """A1: what reads in the evolved model what A reads in the base.

    Tokens count alike, however large their inputs are: the first of a text may be many times larger than all others.

    Args:
        a: Of the base.
        before: Inputs of the module in the base.
        after: Inputs of the same tokens in the evolved model.

    Returns:
        A1, and the share, by norm, of what A reads of these tokens that A1 does not read.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]])
        >>> input_factor(torch.tensor([[3.0, 5.0]]), x, x.flip(1))[0].round(decimals=4)
        tensor([[5., 3.]], dtype=torch.float64)
    """
    size = _sizes(after)
    rows, wanted = after.double() / size, before.double() / size @ a.double().T
    found = _least(rows, wanted)
    return found.T, _share(wanted - rows @ found, wanted)


def output_factor(
    b: Float[Tensor, "d0 r"], before: Float[Tensor, "tokens d0"], after: Float[Tensor, "tokens d1"]
) -> tuple[Float64[Tensor, "d1 r"], float]:
    """B1: what writes in the evolved model what B writes in the base.

    Args:
        b: Of the base.
        before: Outputs of the module in the base.
        after: Outputs of the same tokens in the evolved model.

    Returns:
        B1, and the share of B, by norm, that is made of no outputs of these tokens and so is left out.

    Example:
        >>> y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 2.0]])
        >>> output_factor(torch.tensor([[3.0], [5.0]]), y, y.flip(1))[0].round(decimals=4)
        tensor([[5.],
                [3.]], dtype=torch.float64)
    """
    size = _sizes(before)
    old, new = before.double() / size, after.double() / size
    of_tokens = _least(old.T, b.double())
    made: Tensor = new.T @ of_tokens
    return made, _share(b.double() - old.T @ of_tokens, b)


def _sizes(rows: Float[Tensor, "tokens d"]) -> Float64[Tensor, "tokens 1"]:
    sizes: Tensor = rows.double().norm(dim=1, keepdim=True)
    return sizes.clamp(min=torch.finfo(torch.float64).tiny)


def _share(part: Float[Tensor, "n k"], of: Float[Tensor, "n k"]) -> float:
    return float(part.double().norm() / of.double().norm().clamp(min=torch.finfo(torch.float64).tiny))


def _least(rows: Float64[Tensor, "n d"], wanted: Float64[Tensor, "n k"]) -> Float64[Tensor, "d k"]:
    """`argmin |rows m - wanted|² + λ|m|²` by whichever of `rows' rows` and `rows rows'` is smaller."""
    is_tall = len(rows) >= rows.shape[1]
    products = rows.T @ rows if is_tall else rows @ rows.T
    ridge = (RHO * products.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
    factor = torch.linalg.cholesky(products + ridge * torch.eye(len(products), dtype=products.dtype))
    solved: Tensor = torch.cholesky_solve(rows.T @ wanted if is_tall else wanted, factor)
    found: Tensor = solved if is_tall else rows.T @ solved
    return found
