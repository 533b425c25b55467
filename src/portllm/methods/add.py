"""Plain addition: the evolved base takes the old delta as it is, `W1' = W1 + Δ`.

Source: PortLLM (arXiv 2410.10870, eq. 6). With the exact split `W1 + Δ1 = (W1 + Δ) + (Δ1 - Δ)`, where Δ1 is what
fine-tuning the evolved base again would give, the method drops the port residual `Δ1 - Δ`.
"""

from portllm.patch.delta import F, LowRankDelta


def add(delta: LowRankDelta[F]) -> LowRankDelta[F]:
    """The delta to add to the evolved weight: the old one, unchanged.

    It needs no weight of either base, so it works on factors that are still on disk.

    Example:
        >>> import torch
        >>> delta = LowRankDelta(a=torch.ones(1, 3), b=torch.ones(2, 1), scale=0.5)
        >>> add(delta) is delta
        True
    """
    return delta
