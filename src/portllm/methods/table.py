"""The table of port methods. A method is one file here, one row in `METHODS`, one page of documentation."""

from collections.abc import Mapping
from typing import Any

from portllm.errors import UnknownMethodError
from portllm.methods.add import add, add_suits
from portllm.methods.contract import Inputs, Need, Ported, PortMethod
from portllm.methods.values import Values
from portllm.patch.patch import Patch


def _align(patch: Patch[Values], inputs: Inputs) -> Ported:
    from portllm.methods.align import align  # loads torch

    return align(patch, inputs)


def _transport(patch: Patch[Values], inputs: Inputs) -> Ported:
    from portllm.methods.transport import transport  # loads torch

    return transport(patch, inputs)


def _no_factors(patch: Patch[Any]) -> str | None:
    """Why a patch is not made of factors with an input and an output of their own."""
    if not patch.is_plain_lora or patch.resized or any(delta.is_embedding for delta in patch.deltas.values()):
        return (
            "changes more than the weights of linear modules by A and B (embeddings, DoRA magnitudes, biases, experts "
            "or whole tensors), and what these would be in another basis is not known"
        )
    return None


METHODS: Mapping[str, PortMethod] = {
    method.id: method
    for method in (
        PortMethod(
            id="add",
            port=add,
            suits=add_suits,
            summary="add the old delta to the evolved weights, unchanged",
            reference="PortLLM, arXiv 2410.10870, eq. 6",
        ),
        PortMethod(
            id="align",
            port=_align,
            summary="undo the update on prompts, and fit the patch to what is left",
            reference="this project, docs/methods/align.md",
            needs=frozenset({Need.STREAMS}),
        ),
        PortMethod(
            id="transport",
            port=_transport,
            summary="take A and B to a model whose units are others, by what both models make of the same text",
            reference="this project, docs/methods/transport.md",
            needs=frozenset({Need.PAIRS, Need.STREAMS}),
            refuses=_no_factors,
        ),
    )
}
"""By id, the cheapest first: `auto` takes the first one that suits."""


def method_named(method_id: str, *, has_prompts: bool = True) -> PortMethod:
    """The row of the table with this id.

    Args:
        method_id: The id.
        has_prompts: Whether there are prompts for a method that runs models.

    Raises:
        UnknownMethodError: There is none, or it needs prompts; the message lists those there are.

    Example:
        >>> method_named("add").reference
        'PortLLM, arXiv 2410.10870, eq. 6'
    """
    usable = [name for name, method in METHODS.items() if has_prompts or Need.STREAMS not in method.needs]
    if method_id not in METHODS:
        raise UnknownMethodError(f"unknown port method '{method_id}'; available: {', '.join(usable)}.")
    if method_id not in usable:
        raise UnknownMethodError(
            f"port method '{method_id}' needs prompts, which only 'portllm port' takes (--text); available here: "
            f"{', '.join(usable)}."
        )
    return METHODS[method_id]
