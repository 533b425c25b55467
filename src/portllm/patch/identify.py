"""A model's identity as a patch's record keeps it."""

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint, fingerprint_in
from portllm.patch.record import ModelIdentity

COARSER = ("BF16", "F16")
"""The dtypes that a model of float32 is most often stored in besides."""


def identify(checkpoint: Checkpoint) -> ModelIdentity:
    """A checkpoint's identity, from its fingerprint; of one in float32, as it is stored and as it would be rounded."""
    is_wide = checkpoint.float_dtypes == {"F32"} and checkpoint.quantization is None
    rounded = {dtype: fingerprint_in(checkpoint, dtype) for dtype in COARSER} if is_wide else {}
    return ModelIdentity(
        checkpoint.name, fingerprint(checkpoint), None, checkpoint.revision, checkpoint.quantization, rounded
    )
