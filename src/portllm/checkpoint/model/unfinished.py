"""A model whose weights are being overwritten is not opened: half of it may be another one."""

import os
from pathlib import Path

from portllm.errors import CheckpointError

UNFINISHED_FILE = "portllm-unfinished.json"


def require_finished(folder: Path) -> None:
    """Raise CheckpointError where a merge in place, or its undoing, is going on or was interrupted."""
    if os.path.exists(folder / UNFINISHED_FILE):
        raise CheckpointError(
            f"'{folder}': a merge in place is going on there, or was interrupted. If none runs, finish it with the "
            f"same command, or take it back: portllm merge --undo {folder}"
        )
