"""A model whose weights are being overwritten is not opened: half of it may be another one."""

import os
from pathlib import Path

from portllm.errors import CheckpointError

UNFINISHED_FILE = "portllm-unfinished.json"


def require_finished(folder: Path) -> None:
    """Raise CheckpointError where a merge in place, or its undoing, is going on or was interrupted."""
    if os.path.lexists(folder / UNFINISHED_FILE):
        raise CheckpointError(
            f"'{folder}': holds the mark '{UNFINISHED_FILE}': a merge in place is going on there, or was interrupted, "
            "and its weights may be half of two models. If you merged there, the same command finishes it, and --undo "
            "takes it back. If you have the folder from somebody else, so you have the mark: fetch the model again."
        )
