"""How a study's file says by what a patch is ported: a method, and on how many prompts, if not on all."""

import re
from dataclasses import dataclass
from typing import Self

from portllm.methods.contract import Need
from portllm.methods.table import METHODS
from portllm.study.parts.rivals import DISTILLED, RIVALS

KNOWN = (*METHODS, *RIVALS, DISTILLED)
"""Methods of a study."""

_TEXT = re.compile(r"(?P<method>[^@]+)(@(?P<drawn>drawn-)?(?P<count>[1-9][0-9]*))?")


@dataclass(frozen=True, slots=True)
class PortedBy:
    """A method of a study, and what it reads.

    Attributes:
        method: One of `KNOWN`.
        n_prompts: How many of the task's prompts it reads, from the first on; None for all.
        is_drawn: Whether the old specialist draws so many in their place.
    """

    method: str
    n_prompts: int | None = None
    is_drawn: bool = False

    @classmethod
    def read(cls, text: str) -> Self:
        """What a study's file says.

        Example:
            >>> PortedBy.read("align@drawn-64")
            PortedBy(method='align', n_prompts=64, is_drawn=True)

        Raises:
            ValueError: It says something else, with what is expected.
        """
        found = _TEXT.fullmatch(text)
        if found is None or found["method"] not in KNOWN:
            raise ValueError(f"unknown port method '{text}'; available: {', '.join(KNOWN)}")
        count = int(found["count"]) if found["count"] else None
        by = cls(found["method"], count, found["drawn"] is not None)
        if by.n_prompts is not None and not by._runs_in_step:
            raise ValueError(f"'{text}': '{by.method}' does not port on prompts; write '{by.method}'")
        return by

    @property
    def reads_prompts(self) -> bool:
        """Whether models are run on prompts of the task, or on drawn ones.

        Example:
            >>> PortedBy("align").reads_prompts, PortedBy("truncated").reads_prompts
            (True, False)
        """
        return self.method == DISTILLED or self._runs_in_step

    @property
    def _runs_in_step(self) -> bool:
        """Whether it is a port method that runs models."""
        return self.method != DISTILLED and Need.STREAMS in ({**METHODS, **RIVALS}[self.method]).needs
