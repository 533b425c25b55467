"""A command's result in a model card, if that is asked for: refused before any work, written at the end."""

from collections.abc import Sequence
from pathlib import Path

from portllm.cli.terminal import say
from portllm.patch.card import add_result, check_card


class Cards:
    """The cards of what was measured.

    Args:
        folders: Of patches and merged models.
        wanted: What `--card` says.

    Raises:
        CheckpointError: A folder has no card that a result can be added to.
    """

    def __init__(self, folders: Sequence[str | Path | None], *, wanted: bool) -> None:
        self._folders = [Path(folder) for folder in folders if folder is not None] if wanted else []
        for folder in self._folders:
            check_card(folder)

    def add(self, command: str, found: str) -> None:
        """Add a result, and say where."""
        for folder in self._folders:
            say(f"card {add_result(folder, command, found)}", err=True)
