"""A model's identity as a patch's record keeps it."""

from msgspec import structs

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint, fingerprints_in
from portllm.patch.record import ModelIdentity

COARSER = ("BF16", "F16")
"""The dtypes that a model of float32 is most often stored in besides."""


def identify(checkpoint: Checkpoint) -> ModelIdentity:
    """A checkpoint's identity, from its fingerprint."""
    return ModelIdentity(checkpoint.name, fingerprint(checkpoint), None, checkpoint.revision, checkpoint.quantization)


def identity_of_base(checkpoint: Checkpoint, identity: ModelIdentity) -> ModelIdentity:
    """An identity as the record of a patch keeps that of its base: of one in float32, also as it would be rounded."""
    is_wide = checkpoint.float_dtypes == {"F32"} and checkpoint.quantization is None
    rounded = fingerprints_in(checkpoint, COARSER) if is_wide else {}
    return structs.replace(identity, rounded=rounded)
