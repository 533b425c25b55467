"""What became of a fleet's cells, in one JSON file beside their outputs: the next run does only what is missing."""

import time
from collections.abc import Iterable

from portllm import __version__
from portllm.errors import FleetFileError
from portllm.files.json_text import parse_json
from portllm.files.record import Recorded, decode_sealed, encode
from portllm.files.seal import render_sealed, seal_problem
from portllm.fleets.plan import FORMAT, FleetRow
from portllm.fleets.storage import join, read_text, write_text

STATE_FILE = "fleet.json"
SHARE_OF_TIME = 0.05
"""At most this part of the time goes into writing the state, however slow its storage is."""


def read_state(output: str) -> dict[str, FleetRow]:
    """What earlier runs noted, by cell; empty where there was none.

    Raises:
        FleetFileError: The file is damaged, or another version's.
        StorageError: It cannot be read.
    """
    place = join(output, STATE_FILE)
    text = read_text(place)
    if text is None:
        return {}
    try:
        values = parse_json(text.encode())
        if not isinstance(values, dict):
            raise ValueError("it is not a JSON object")
        if problem := seal_problem(values):
            raise ValueError(problem)
        return {row.folder: row for row in decode_sealed(_Fleet, values).cells}
    except ValueError as error:
        raise FleetFileError(
            f"'{place}': is corrupt or was written by another version, so it is unknown which outputs are "
            f"complete ({error}). Delete it, and run with --overwrite."
        ) from error


class _Fleet(Recorded, frozen=True, tag_field="format", tag=FORMAT):
    """What the file says."""

    program: str
    cells: tuple[FleetRow, ...]


class State:
    """The file while a run goes on: written at the beginning, now and then, and at the end."""

    def __init__(self, output: str, rows: Iterable[FleetRow]) -> None:
        self._place = join(output, STATE_FILE)
        self._rows = {row.folder: row for row in rows}
        self._next = 0.0
        self.write()

    def note(self, row: FleetRow) -> None:
        """What became of a cell; on the disk soon."""
        self._rows[row.folder] = row
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write the file whole."""
        began = time.monotonic()
        cells = tuple(row for _, row in sorted(self._rows.items()))
        write_text(self._place, render_sealed(encode(_Fleet(__version__, cells))))
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE_OF_TIME
