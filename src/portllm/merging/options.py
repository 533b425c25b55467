"""Merge options as one value, which plans take and carry."""

from dataclasses import dataclass

from portllm.checkpoint.safetensors.writer import DEFAULT_SHARD_BYTES
from portllm.merging.rounding_modes import NEAREST, Rounding
from portllm.tensors.info import float_dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Merge options, the same for all patches of one run.

    Attributes:
        dtype: Storage dtype of the output: `F32`, `BF16`, `F16`, `F64`, or torch's name of one; None to keep each
            tensor's.
        rounding: How sums are rounded to the storage dtype.
        device: Device for the sums, `cpu` or `cuda`; bytes are guaranteed to equal PEFT's on the CPU only.
        shard_bytes: Maximum size of an output shard.
        allow_other_base: Accept a model other than the one the patch was made on.
        tokenizer: Whose tokenizer and chat template the output gets where they differ, `base` or `patch`; None for the
            patch's, unless its tokenizer contradicts the model's.

    Raises:
        UnsupportedDtypeError: The dtype is not one that weights are stored in.
    """

    dtype: str | None = None
    rounding: Rounding = NEAREST
    device: str = "cpu"
    shard_bytes: int = DEFAULT_SHARD_BYTES
    allow_other_base: bool = False
    tokenizer: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            object.__setattr__(self, "dtype", float_dtype(self.dtype))


AS_IT_IS = MergeOptions()
"""Each tensor's own dtype, rounded to nearest, on the CPU."""
