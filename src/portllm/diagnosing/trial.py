"""Whether what is installed works: load it, and compute."""

from collections.abc import Iterator
from dataclasses import dataclass

from portllm.errors import PortLLMError

SIZE = 64
BF16_UNIT_ROUNDOFF = 2**-8


@dataclass(frozen=True, slots=True)
class Trial:
    """One thing that was tried.

    Attributes:
        name: What.
        works: Whether it did.
        finding: Its version, or what went wrong.
    """

    name: str
    works: bool
    finding: str


def try_all(*, live: bool) -> Iterator[Trial]:
    """Load torch, compute on each device that it finds, and load transformers and peft.

    Args:
        live: Whether these two are installed; what is not there need not work.
    """
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of the system that it is linked to may be missing
        yield Trial("torch", works=False, finding=f"cannot be loaded: {error}.")
        return
    yield Trial("torch", works=True, finding=torch.__version__)
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        yield _compute(device)
    if not live:
        return
    try:
        from portllm.foreign import transformers
    except PortLLMError as error:
        yield Trial("transformers and peft", works=False, finding=str(error))
    else:
        yield Trial("transformers and peft", works=True, finding=f"transformers {transformers.__version__}")


def _compute(device: str) -> Trial:
    """A product of integers, which is exact in bfloat16 up to its own rounding."""
    import torch

    name = device if device == "cpu" else f"{device}, {torch.cuda.get_device_name(device)}"
    left = torch.arange(SIZE * SIZE, dtype=torch.float64).reshape(SIZE, SIZE) % 7 - 3
    try:
        product = (left.to(device, torch.bfloat16) @ left.T.to(device, torch.bfloat16)).cpu().double()
    except RuntimeError as error:
        return Trial(name, works=False, finding=f"cannot compute: {str(error).splitlines()[0]}")
    exact = left @ left.T
    if bool(((product - exact).abs() <= BF16_UNIT_ROUNDOFF * exact.abs()).all()):
        return Trial(name, works=True, finding="computes")
    return Trial(
        name, works=False, finding="a product in bfloat16 is wrong; a newer driver or build of torch may help."
    )
