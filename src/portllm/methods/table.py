"""The table of port methods. A method is one file here, one row in `METHODS`, one page of documentation.

A method is a pure function from a delta to the delta for the evolved base: no file, no clock, no global state. On an
evolved base equal to the base it returns an equal delta; its id records every parameter that changes its result.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from portllm.errors import UnknownMethodError
from portllm.methods.add import add
from portllm.patch.delta import LowRankDelta

PortFunction = Callable[[LowRankDelta[Any]], LowRankDelta[Any]]
"""What a method computes for one module; the delta it returns has factors of the kind of those it was given."""


class PortMethod(NamedTuple):
    """One row of the table.

    Attributes:
        id: Stands in `patch.json`; names the method and every parameter that changes its result.
        port: The function.
        summary: One line for people.
        reference: Paper and equation.
    """

    id: str
    port: PortFunction
    summary: str
    reference: str


METHODS: Mapping[str, PortMethod] = {
    method.id: method
    for method in (
        PortMethod(
            id="add",
            port=add,
            summary="add the old delta to the evolved weights, unchanged",
            reference="PortLLM, arXiv 2410.10870, eq. 6",
        ),
    )
}


def method_named(method_id: str) -> PortMethod:
    """The row of the table with this id.

    Raises:
        UnknownMethodError: There is none; the message lists those there are.

    Example:
        >>> method_named("add").reference
        'PortLLM, arXiv 2410.10870, eq. 6'
    """
    if method_id not in METHODS:
        raise UnknownMethodError(f"'{method_id}': is no port method. There are: {', '.join(METHODS)}.")
    return METHODS[method_id]
