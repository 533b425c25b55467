"""The identity of what a piece of work wrote, taken from the files themselves."""

from pathlib import Path

from blake3 import blake3

from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import digest_tensors, load_patch


def patch_identity(folder: Path) -> str:
    """A digest over a patch's tensors.

    Raises:
        PatchError: There is none.
    """
    return blake3(repr(sorted(digest_tensors(load_patch(folder)).items())).encode()).hexdigest()


def checkpoint_identity(folder: Path) -> str:
    """A checkpoint's fingerprint.

    Raises:
        CheckpointError: There is none.
    """
    return fingerprint(open_checkpoint(folder))
