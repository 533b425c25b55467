"""The table of port methods. A method is one file here, one row in `METHODS`, one page of documentation."""

from collections.abc import Mapping

from portllm.errors import UnknownMethodError
from portllm.methods.add import add, add_suits
from portllm.methods.contract import PortMethod

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
    )
}
"""By id, the cheapest first: `auto` takes the first one that suits."""


def method_named(method_id: str) -> PortMethod:
    """The row of the table with this id.

    Raises:
        UnknownMethodError: There is none; the message lists those there are.

    Example:
        >>> method_named("add").reference
        'PortLLM, arXiv 2410.10870, eq. 6'
    """
    if method_id not in METHODS:
        raise UnknownMethodError(f"unknown port method '{method_id}'; available: {', '.join(METHODS)}.")
    return METHODS[method_id]
