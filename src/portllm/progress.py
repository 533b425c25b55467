"""Progress reporting by callback, so that the library itself never prints."""

from collections.abc import Callable
from typing import Literal

Unit = Literal["bytes", "steps", "rows", "tensors", "cells"]

Progress = Callable[[str, int, int, Unit], None]
"""Called as `progress(label, done, total, unit)`; `done == total` ends the work named by `label`."""


def silent(label: str, done: int, total: int, unit: Unit) -> None:
    """The `Progress` of a caller who does not want to know."""
    del label, done, total, unit
