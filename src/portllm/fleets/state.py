"""What became of a fleet's cells, in one JSON file beside their outputs: the next run does only what is missing."""

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from portllm import __version__
from portllm.errors import FleetFileError
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
        values = json.loads(text)
        if isinstance(values, dict) and seal_problem(values) is None and values["format"] == FORMAT:
            return {values["folder"]: _row(values) for values in values["cells"]}
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise FleetFileError(
        f"'{place}': is corrupt or was written by another version, so it is unknown which outputs are complete. "
        "Delete it, and run with --overwrite."
    )


def row_to_json(row: FleetRow) -> dict[str, object]:
    """A row as JSON values."""
    return asdict(row)


def _row(values: Mapping[str, Any]) -> FleetRow:
    return FleetRow(**{**values, "attempts": tuple(values["attempts"])})


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
        cells = [row_to_json(row) for _, row in sorted(self._rows.items())]
        write_text(self._place, render_sealed({"format": FORMAT, "program": __version__, "cells": cells}))
        ended = time.monotonic()
        self._next = ended + (ended - began) / SHARE_OF_TIME
