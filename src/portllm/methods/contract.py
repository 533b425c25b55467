"""What a port method is: what it asks for, what it is given, what it gives.

A method is a pure function of a patch and its inputs: no file, no clock, no chance but through a parameter that its id
records. It sees the whole patch, since what is done to one layer may depend on what was done to those before it, and
gives the patch for the evolved model: the same modules and tensors, each with the shape and the scale it had. Tensors
are `Values`, read when asked for; what a method passes on as it is goes to the new file byte for byte.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from portllm.methods.values import Values
from portllm.patch.patch import Patch


class Need(StrEnum):
    """What a method asks for beside the patch."""

    WEIGHTS = "weights"
    """The weights of what the patch changes, in the base that it belongs to and in the evolved model."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a method is given beside the patch: what it declared, and nothing else.

    Rows that stand for tokens are those of the evolved model, on both sides; a token that the base lacks has zeros
    there.

    Attributes:
        base: With `Need.WEIGHTS`, by the name that the patch has for a tensor, its values in the base.
        evolved: Likewise in the evolved model, in the same shape: (experts, d_out, d_in) for the experts of a layer.
    """

    base: Mapping[str, Values] = field(default_factory=dict)
    evolved: Mapping[str, Values] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Ported:
    """What a method gives.

    Attributes:
        patch: The patch of the evolved model.
        evidence: What was measured on the way, finite numbers by name; goes into `patch.json`.
    """

    patch: Patch[Values]
    evidence: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PortMethod:
    """One row of the table.

    Attributes:
        id: Stands in `patch.json`; names the method and every parameter that changes its result.
        port: The function.
        suits: Why the method is known to carry a patch, given the answer of `check` and the numbers that it rests on;
            None where it is not known to.
        summary: One line for people.
        reference: Paper and equation.
        needs: What it asks for, whatever the patch.
    """

    id: str
    port: Callable[[Patch[Values], Inputs], Ported]
    suits: Callable[[str, Mapping[str, float]], str | None]
    summary: str
    reference: str
    needs: frozenset[Need] = frozenset()

    def needs_for(self, patch: Patch[Any]) -> frozenset[Need]:
        """What carrying this patch takes: what it holds whole is no delta without the weights that it stands for."""
        return self.needs if patch.is_relative else self.needs | {Need.WEIGHTS}
