"""What a device, and the dtype that a model computes in, may be called; nothing here needs torch."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]

Dtype = Literal["auto", "float32"]
"""`auto` is the dtype that a model is stored in, where the processor computes in it."""
