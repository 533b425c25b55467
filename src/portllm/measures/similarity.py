"""How alike the hidden states of two models are on the same inputs: linear CKA. Pure numpy.

    CKA(X, Y) = |XᵀY|² / (|XᵀX| |YᵀY|),    X, Y with each column's mean taken out; Frobenius norms

(Kornblith et al., 2019, arXiv 1905.00414). It is 1 for states that are equal up to a rotation and a scale. With fewer
inputs than the states are wide it is too high for unrelated states (own remark; Nguyen et al., 2021, arXiv 2010.15327,
give an estimate without that bias): compare values of equally many inputs.
"""

import numpy as np

from portllm.arrays import Float, Float64


def linear_cka(one: Float[np.ndarray, "inputs width"], other: Float[np.ndarray, "inputs other_width"]) -> float | None:
    """Linear CKA of the states of two models, a row an input.

    Returns:
        None where the states of one model are the same for all inputs.

    Example:
        >>> states = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> linear_cka(states, 3 * states[:, ::-1])
        1.0
    """
    x, y = (states.astype(np.float64) - states.mean(axis=0, dtype=np.float64) for states in (one, other))
    norms = np.sqrt(_product_square(x, x) * _product_square(y, y))
    return min(1.0, float(_product_square(x, y) / norms)) if norms > 0 else None


def _product_square(x: Float64[np.ndarray, "inputs width"], y: Float64[np.ndarray, "inputs other_width"]) -> float:
    """`|XᵀY|²`, by whichever of `XᵀY` and `<XXᵀ, YYᵀ>` is smaller."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return float(np.vdot(x @ x.T, y @ y.T))
    product = x.T @ y
    return float(np.vdot(product, product))
