"""A model whose weights are being overwritten is not opened: half of it may be another one."""

import os
from pathlib import Path

from portllm.errors import CheckpointError

UNFINISHED_FILE = "portllm-unfinished.json"


def require_finished(folder: Path) -> None:
    """Raise CheckpointError where a merge in place, or its undoing, is going on or was interrupted."""
    if os.path.lexists(folder / UNFINISHED_FILE):
        raise CheckpointError(
            f"'{folder}': contains '{UNFINISHED_FILE}': an in-place merge is running there or was interrupted, "
            "and its weights may be a mixture of two models. If you started the merge, run the same command "
            "again to finish it, or use --undo. If you got the folder from someone else, download the model "
            "again."
        )
