"""A model's identity as a patch's record keeps it."""

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint
from portllm.patch.record import ModelIdentity


def identify(checkpoint: Checkpoint) -> ModelIdentity:
    """A checkpoint's identity, from its fingerprint."""
    return ModelIdentity(checkpoint.name, fingerprint(checkpoint), None, checkpoint.revision, checkpoint.quantization)
