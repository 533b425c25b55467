"""Sums over the parts of a whole."""

from typing import Self


class Sums:
    """A dataclass with slots of sums: those over two parts are those of each, added field by field."""

    __slots__: tuple[str, ...] = ()

    def __add__(self, other: Self) -> Self:
        return type(self)(*[getattr(self, name) + getattr(other, name) for name in self.__slots__])
