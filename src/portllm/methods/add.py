"""Plain addition: the evolved base takes the old delta as it is, `W1' = W1 + Δ`.

Source: PortLLM (arXiv 2410.10870, eq. 6). With the exact split `W1 + Δ1 = (W1 + Δ) + (Δ1 - Δ)`, where Δ1 is what
fine-tuning the evolved base again would give, the method drops the port residual `Δ1 - Δ`.
"""

from collections.abc import Mapping
from dataclasses import replace

from portllm.methods.contract import Inputs, Ported
from portllm.methods.values import Values
from portllm.patch.patch import Patch


def add(patch: Patch[Values], inputs: Inputs) -> Ported:
    """The patch whose deltas, added to the evolved weights, are the old ones.

    What is added already needs no weight of either base, and is not even read. What is held whole is carried by what it
    changed; see `portllm.methods.add_values`.
    """
    if patch.is_relative:
        return Ported(patch)
    from portllm.methods.add_values import carried_magnitude, carried_rows, carried_value  # they load torch

    deltas = {
        module: delta if delta.magnitude is None else carried_magnitude(module, delta, delta.magnitude, inputs)
        for module, delta in patch.deltas.items()
    }
    values = {name: carried_value(name, value, inputs) for name, value in patch.values.items()}
    rows = {name: carried_rows(name, old, inputs) for name, old in patch.rows.items()}
    return Ported(replace(patch, deltas=deltas, values=values, rows=rows))


def add_suits(answer: str, _evidence: Mapping[str, float]) -> str | None:
    """Addition is taken unless it is known to fail: where it holds, and where nobody has measured whether it does.

    Example:
        >>> add_suits("holds", {})
        'addition is known to hold'
        >>> add_suits("will not hold", {}) is None
        True
    """
    match answer:
        case "holds":
            return "addition is known to hold"
        case "holds aligned" | "uncertain":
            return "addition may hold; nothing measured rules it out"
        case _:
            return None
