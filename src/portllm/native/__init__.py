"""Loops in C for the longest streams of the program, where they were built and the processor can run them.

`kernels` is the compiled module, or None: then torch and numpy give the same bytes, and sums that differ by rounding,
slower. Pure: buffers in, numbers out.
"""

from importlib import import_module
from types import ModuleType


def _load() -> ModuleType | None:
    try:
        found = import_module("portllm.native.kernels")
    except ImportError:  # there was no compiler for it
        return None
    return found if found.variants() else None


kernels = _load()
