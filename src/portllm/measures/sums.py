"""Sums over the parts of a whole."""

from dataclasses import fields
from typing import Self


class Sums:
    """A dataclass of sums: those over two parts are those of each, added field by field."""

    __slots__ = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))  # type: ignore[arg-type]
