"""What a device may be called; nothing here needs torch."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
