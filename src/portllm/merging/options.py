"""How a patch is merged, as one value: what plans are made with, and what they say."""

from dataclasses import dataclass

from portllm.checkpoint.safetensors.writer import DEFAULT_SHARD_BYTES
from portllm.merging.rounding_modes import NEAREST, Rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """How a patch is merged; the same for all patches of one run.

    Attributes:
        dtype: Storage dtype of the output (`F32`, `BF16`, `F16`, `F64`), or None to keep each tensor's.
        rounding: How the sum is brought to the storage dtype.
        device: Where the arithmetic is done, `cpu` or `cuda`; bytes are promised to equal PEFT's on the CPU only.
        shard_bytes: Size above which the output is split into shards.
        allow_other_base: Go on though the patch belongs to another model.
    """

    dtype: str | None = None
    rounding: Rounding = NEAREST
    device: str = "cpu"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    allow_other_base: bool = False


AS_IT_IS = MergeOptions()
"""Each tensor's own dtype, rounded to nearest, on the CPU."""
