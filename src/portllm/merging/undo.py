"""What a merge in place keeps, so that it can go on after a death and be taken back bit for bit.

In the model's folder:

    .portllm-undo/          the old bytes of every tensor that is overwritten, with their digests
    portllm-unfinished.json there as long as the weights may be neither the old ones nor the new
    .portllm-undo.gone      for a moment, the old bytes that are given up

| found | what the weights are | what is done |
| --- | --- | --- |
| neither | as they were | |
| the mark alone | as they were: the old bytes were not yet kept | either command begins anew |
| both | anything between old and new | a merge writes all again, from the old bytes; an undo restores these |
| the old bytes alone | the new ones | they can be taken back |

All of this may come with a folder from a stranger. It is believed as far as it harms nobody: what is written and
removed are files of the folder itself (`portllm.files.own_files`), and the old bytes must be of this model's
tensors.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from portllm.checkpoint.folder import open_folder
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.unfinished import UNFINISHED_FILE
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.checkpoint.safetensors.names import SINGLE_FILE
from portllm.errors import CheckpointError, OutputBusyError, OutputError
from portllm.files.json_file import read_json
from portllm.files.output_folder import sweep
from portllm.files.own_files import Held, is_own_file, opened, part_of, remove_file, remove_folder, write_within
from portllm.files.record import Blake3, Recorded, decode_sealed, write_sealed
from portllm.files.seal import seal_problem
from portllm.tensors.info import TensorInfo

UNDO_FOLDER = ".portllm-undo"
UNDO_FILE = "undo.json"
_GONE = f"{UNDO_FOLDER}.gone"
_WRITTEN = (UNFINISHED_FILE, "portllm.json")


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


class _Kept(Recorded, frozen=True, tag_field="format", tag=1):
    """What `undo.json` says; attributes as of `Undo`."""

    plan: str
    digests: Mapping[str, Blake3]
    manifest: str | None


def write_undo(folder: Path, *, plan: str, digests: Mapping[str, str], manifest: str | None) -> None:
    """Describe the old bytes that lie in an undo folder."""
    write_sealed(folder / UNDO_FILE, _Kept(plan, digests, manifest))


def read_undo(model: Path) -> Undo | None:
    """What can be taken back in a model's folder; None where nothing can.

    Raises:
        CheckpointError: What is kept there was damaged, or is not what a merge in place keeps.
    """
    folder = model / UNDO_FOLDER
    if not os.path.lexists(folder):
        return None
    if folder.is_symlink() or not all(is_own_file(folder / name) for name in (UNDO_FILE, SINGLE_FILE)):
        raise CheckpointError(
            f"'{folder}': is not the undo data of an in-place merge, is incomplete, or is a link. Download the "
            "model again."
        )
    values = read_json(folder / UNDO_FILE)
    tensors = read_header(folder / SINGLE_FILE).tensors
    try:
        kept = decode_sealed(_Kept, values)
    except ValueError as error:
        raise CheckpointError(f"'{folder / UNDO_FILE}': {error}. Download the model again.") from error
    problem = seal_problem(values)
    if problem is None and kept.digests.keys() != tensors.keys():
        problem = f"lists other tensors than {SINGLE_FILE} beside it contains"
    if problem is not None:
        raise CheckpointError(f"'{folder / UNDO_FILE}': {problem}. Download the model again.")
    return Undo(kept.plan, kept.digests, kept.manifest, tensors)


def original(model: Path, undo: Undo | None, *, name: str) -> Checkpoint:
    """The model as it was before: what may have been overwritten is read from where its old bytes are kept.

    Raises:
        CheckpointError: The old bytes are not of this model's tensors.
    """
    there = open_folder(model, name=name)
    kept = {} if undo is None else undo.tensors
    for tensor, info in kept.items():
        now = there.infos.get(tensor)
        if now is None or (now.dtype, now.shape) != (info.dtype, info.shape):
            raise CheckpointError(
                f"'{model}': '{tensor}' does not belong to the model that '{UNDO_FOLDER}' was saved for."
            )
    return replace(there, infos={tensor: kept.get(tensor, info) for tensor, info in there.infos.items()})


def mark(held: Held, doing: str) -> None:
    """Say that the weights are about to be overwritten; on the disk when this returns."""
    write_within(held, UNFINISHED_FILE, json.dumps({"unfinished": doing}) + "\n")
    held.sync()


def unmark(held: Held) -> None:
    """Say that the weights are whole."""
    remove_file(held, UNFINISHED_FILE)
    held.sync()


def forget(held: Held) -> None:
    """Give up the old bytes, in one step."""
    with contextlib.suppress(FileNotFoundError):
        os.rename(UNDO_FOLDER, _GONE, src_dir_fd=held.descriptor, dst_dir_fd=held.descriptor)
    held.sync()
    remove_folder(held, _GONE, (UNDO_FILE, SINGLE_FILE))


@contextlib.contextmanager
def alone(model: Path) -> Iterator[Held]:
    """Keep other merges in place away from a folder while the block runs; what dead ones left half-done is removed.

    Yields:
        The folder, to write into no other.

    Raises:
        OutputBusyError: There is one.
        OutputError: There is no such folder, it cannot be written to, or something else lies where these files lie.
    """
    with contextlib.ExitStack() as stack:
        try:
            held = stack.enter_context(opened(model))
        except OSError as error:
            raise OutputError(f"'{model}': cannot be opened as a folder: {error.strerror}.") from error
        try:
            fcntl.flock(held.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputBusyError(f"'{model}': another run is writing there. Wait for it to finish.") from error
        try:
            remove_folder(held, _GONE, (UNDO_FILE, SINGLE_FILE))
            sweep(model / UNDO_FOLDER)
            for name in _WRITTEN:
                remove_file(held, part_of(name))
            yield held
        except OSError as error:
            raise OutputError(f"'{model}': cannot be written to: {error.strerror or error}.") from error
