"""What a merge in place keeps, so that it can go on after a death and be taken back bit for bit.

In the model's folder:

    .portllm-undo/          the old bytes of every tensor that is overwritten, with their digests
    portllm-unfinished.json there as long as the weights may be neither the old ones nor the new

| found | what the weights are | what is done |
| --- | --- | --- |
| neither | as they were | |
| the mark alone | as they were: the old bytes were not yet kept | either command begins anew |
| both | anything between old and new | a merge writes all again, from the old bytes; an undo restores these |
| the old bytes alone | the new ones | they can be taken back |
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from portllm.checkpoint.folder import open_folder
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.unfinished import UNFINISHED_FILE
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.checkpoint.safetensors.names import SINGLE_FILE
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import CheckpointError, OutputBusyError, OutputError
from portllm.files.json_file import read_json
from portllm.files.seal import render_sealed, seal_problem
from portllm.files.staging import remove, sync_entries

UNDO_FOLDER = ".portllm-undo"
UNDO_FILE = "undo.json"


@dataclass(frozen=True, slots=True)
class Undo:
    """The old bytes of tensors that a merge overwrites.

    Attributes:
        plan: Digest of all that the new bytes depend on.
        digests: Of each old tensor's bytes, by name.
        manifest: What `portllm.json` said before, or None where there was none.
        tensors: Where the old bytes are.
    """

    plan: str
    digests: Mapping[str, str]
    manifest: str | None
    tensors: Mapping[str, TensorInfo]


def write_undo(folder: Path, *, plan: str, digests: Mapping[str, str], manifest: str | None) -> None:
    """Describe the old bytes that lie in an undo folder."""
    values = {"format": 1, "plan": plan, "digests": dict(digests), "manifest": manifest}
    (folder / UNDO_FILE).write_text(render_sealed(values), encoding="utf-8")


def read_undo(model: Path) -> Undo | None:
    """What can be taken back in a model's folder; None where nothing can.

    Raises:
        CheckpointError: What is kept there was damaged.
    """
    folder = model / UNDO_FOLDER
    if not folder.is_dir():
        return None
    values = read_json(folder / UNDO_FILE)
    tensors = read_header(folder / SINGLE_FILE).tensors
    match values:
        case {"format": 1, "plan": str(plan), "digests": dict(digests), "manifest": str() | None as manifest} if (
            seal_problem(values) is None and set(digests) == set(tensors)
        ):
            return Undo(plan, digests, manifest, tensors)
        case _:
            raise CheckpointError(
                f"'{folder}': does not hold what a merge in place keeps, or was changed by hand. Fetch the model again."
            )


def original(model: Path, undo: Undo | None, *, name: str) -> Checkpoint:
    """The model as it was before: what may have been overwritten is read from where its old bytes are kept."""
    there = open_folder(model, name=name)
    kept = {} if undo is None else undo.tensors
    for tensor, info in kept.items():
        now = there.info(tensor)
        if (now.dtype, now.shape) != (info.dtype, info.shape):
            raise CheckpointError(f"'{model}': '{tensor}' is not of the model that '{UNDO_FOLDER}' was kept for.")
    return replace(there, infos={tensor: kept.get(tensor, info) for tensor, info in there.infos.items()})


def mark(model: Path, doing: str) -> None:
    """Say that the weights are about to be overwritten; on the disk when this returns."""
    part = model / f"{UNFINISHED_FILE}.part"
    with open(part, "w", encoding="utf-8") as file:
        file.write(json.dumps({"unfinished": doing}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.replace(model / UNFINISHED_FILE)
    sync_entries(model)


def unmark(model: Path) -> None:
    """Say that the weights are whole."""
    (model / UNFINISHED_FILE).unlink(missing_ok=True)
    sync_entries(model)


def forget(model: Path) -> None:
    """Give up the old bytes, in one step."""
    gone = model / f"{UNDO_FOLDER}.gone"
    remove(gone)
    if (model / UNDO_FOLDER).is_dir():
        (model / UNDO_FOLDER).rename(gone)
    sync_entries(model)
    remove(gone)


@contextmanager
def alone(model: Path) -> Iterator[None]:
    """Keep other merges in place away from a folder while the block runs.

    Raises:
        OutputBusyError: There is one.
        OutputError: There is no such folder.
    """
    try:
        descriptor = os.open(model, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"'{model}': is no folder that can be opened: {error.strerror}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise OutputBusyError(f"'{model}': another run is writing there. Wait for its end.") from error
    finally:
        os.close(descriptor)
