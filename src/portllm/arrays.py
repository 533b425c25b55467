"""Dtypes and shapes of arrays in annotations, as jaxtyping writes them.

Tests check them. At run time nobody does, and importing jaxtyping takes as long as importing NumPy does, since it
brings a library of test doubles along: where it has not been imported already, each name stands for the array alone.
"""

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or "jaxtyping" in sys.modules:
    from jaxtyping import BFloat16, Bool, Float, Float32, Float64, Int32, Int64, Shaped, UInt8, UInt16
else:

    class _Array:
        def __class_getitem__(cls, array_and_shape: tuple[Any, str]) -> Any:  # noqa: ANN401
            return array_and_shape[0]

    BFloat16 = Bool = Float = Float32 = Float64 = Int32 = Int64 = Shaped = UInt8 = UInt16 = _Array

__all__ = ["BFloat16", "Bool", "Float", "Float32", "Float64", "Int32", "Int64", "Shaped", "UInt8", "UInt16"]
