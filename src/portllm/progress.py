"""How long work tells its caller how far it is: a callback, so that the library itself never prints."""

from typing import Literal, Protocol

Unit = Literal["bytes", "steps", "rows", "tensors"]


class Progress(Protocol):
    """Called with the amount done so far; `done == total` ends the work named by `label`."""

    def __call__(self, label: str, done: int, total: int, unit: Unit) -> None: ...


def silent(label: str, done: int, total: int, unit: Unit) -> None:
    """The `Progress` of a caller who does not want to know."""
    del label, done, total, unit
