"""Output folders: written beside their final name, renamed when whole, resumed where a run died."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from portllm.errors import OutputError, OutputExistsError, Refusal
from portllm.files.input_file import require_unchanged
from portllm.files.json_text import is_utf8
from portllm.files.own_files import inode_of
from portllm.files.source import LocalFile, Source
from portllm.files.staging import Journal, Place, Staged, begin, remove

OUTPUT_FILES = ("patch.json", "portllm.json", "certificate.json", "check.json", "config.json", "export.json")
"""One of these, or a file of weights, lies in every folder that this program writes whole."""


@contextlib.contextmanager
def staged_folder(final: Path, *, overwrite: bool, inputs: Iterable[Source] = (), wait: bool = False) -> Iterator[Path]:
    """A fresh folder beside `final` that takes its name when the block ends, and vanishes if the block fails.

    What a run that died left there is removed, and what it was about to replace gets its name back.

    Args:
        final: The folder to be.
        overwrite: Replace what is there; it stays whole until the new folder is.
        inputs: What is read for it. It lies elsewhere, and is the same at the end as when it was opened.
        wait: For another run that writes there, to its end.

    Raises:
        OutputExistsError: `final` exists and `overwrite` is False.
        OutputBusyError: Another run writes there, and `wait` is False.
        OutputError: The parent folder is missing or cannot be written, or an input lies in `final`.
        InputChangedError: An input changed while it was read.
    """
    with resumable_folder(final, overwrite=overwrite, plan=None, inputs=inputs, wait=wait) as staged:
        yield staged.folder


@contextlib.contextmanager
def resumable_folder(
    final: Path, *, overwrite: bool, plan: str | None, inputs: Iterable[Source] = (), wait: bool = False
) -> Iterator[Staged]:
    """As `staged_folder`, but what a run that was interrupted or died has finished stays for the next of the same plan.

    Args:
        final: The folder to be.
        overwrite: Replace what is there; it stays whole until the new folder is.
        plan: Digest of all that the output depends on, or None: nothing is ever kept.
        inputs: As for `staged_folder`.
        wait: For another run that writes there, to its end.

    Raises:
        OutputExistsError, OutputBusyError, OutputError, InputChangedError: As `staged_folder`.
    """
    inputs = tuple(inputs)
    if not is_utf8(final.name):
        raise OutputError(f"{str(final)!r}: is not valid UTF-8, so no record can name it. Choose another name.")
    check_apart(final, inputs)
    check_free(final, overwrite=overwrite)
    place = _place_of(final)
    with _journal(place, wait=wait) as journal:
        try:
            place.settle(journal.inode)
            check_free(final, overwrite=overwrite)
            staged = begin(place, journal, plan)
        except OSError as error:
            raise OutputError(f"'{final}': cannot write into '{final.parent}': {error.strerror}.") from error
        try:
            yield staged
            check_free(final, overwrite=overwrite)
            require_unchanged(inputs)
            place.take()
        except BaseException as error:
            place.settle(journal.inode)
            if not (plan is not None and journal.finished and isinstance(error, KeyboardInterrupt | SystemExit)):
                remove(place.part)
            if isinstance(error, OSError):
                raise OutputError(
                    f"'{final}': could not be written: {error.strerror or error}. Nothing was left behind."
                ) from error
            raise


@contextlib.contextmanager
def _journal(place: Place, *, wait: bool) -> Iterator[Journal]:
    """The journal of a place, locked; it is deleted at the end unless it describes a part that stays."""
    try:
        place.final.parent.mkdir(parents=True, exist_ok=True)
        journal = Journal(place.journal, wait=wait)
    except OSError as error:
        raise OutputError(f"'{place.final}': cannot write into '{place.final.parent}': {error.strerror}.") from error
    try:
        yield journal
    finally:
        if journal.inode is None or not os.path.lexists(place.part):
            journal.remove()
        journal.close()


def check_free(final: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if something is at `final` that may not be replaced.

    What `overwrite` replaces is an empty folder or one as outputs are, and never the folder that one is in, or one
    above it. A link is replaced itself.
    """
    if not os.path.lexists(final):
        return
    if (there := inode_of(final)) is not None and there in map(inode_of, _here()):
        raise OutputExistsError(
            f"'{final}': is the current folder or a parent of it. Choose a folder for the output alone."
        )
    if not overwrite:
        raise OutputExistsError(f"'{final}': already exists. Choose another path, or pass --overwrite to replace it.")
    if not final.is_dir():
        raise OutputExistsError(f"'{final}': is a file; the output is a folder. Choose another path.")
    if not final.is_symlink() and (odd := _no_output(final)):
        raise OutputExistsError(
            f"'{final}': {odd}, so it was not written by this program and is not replaced. Choose another path, "
            "or delete it first."
        )


def _here() -> tuple[Path, ...]:
    try:
        here = Path.cwd()
    except OSError:  # it was deleted
        return ()
    return (here, *here.parents)


def _no_output(folder: Path) -> str | None:
    """What shows that a folder was not written as an output, or None."""
    entries = sorted(folder.iterdir())
    inner = next((entry.name for entry in entries if entry.is_dir()), None)
    if inner is not None:
        return f"contains the folder '{inner}'"
    if entries and not any(entry.name in OUTPUT_FILES or entry.suffix == ".safetensors" for entry in entries):
        return f"contains '{entries[0].name}' and neither weights nor a record of this program"
    return None


def check_apart(final: Path, inputs: Iterable[Source]) -> None:
    """Raise OutputError if a file that is read lies in the folder `final`, which `--overwrite` would replace whole.

    The same goes for the siblings that a run writes to before the output takes its name. Folders are compared by what
    they are, not by their names: one may be reached through links and bind mounts.
    """
    place = _place_of(Path(os.path.realpath(final.parent), final.name))
    taken = {inode_of(folder) for folder in (place.final, place.part, place.old)} - {None}
    # A file may be a link out of its folder, as in the cache of the Hugging Face Hub; neither end may be lost.
    files = [file.path for file in inputs if isinstance(file, LocalFile)] if taken else []
    read = {end: file for file in files for end in (file.parent.resolve(), file.resolve().parent)}
    for folder, file in read.items():
        if any(inode_of(above) in taken for above in (folder, *folder.parents)):
            raise OutputError(f"'{final}': contains '{file}', which is an input. Write to another folder.")


def sweep(final: Path) -> None:
    """Remove what a run that died left beside an output which is not to be made now.

    Raises:
        OutputBusyError, OutputError: As `staged_folder`.
    """
    place = _place_of(final)
    if os.path.lexists(place.journal):
        with _journal(place, wait=False) as journal:
            place.settle(journal.inode)
            place.clear(journal.inode)


def _place_of(final: Path) -> Place:
    named = final if final.name not in ("", "..") else Path(os.path.realpath(final))
    if not named.name:
        raise OutputExistsError(f"'{final}': is the root folder. Choose a folder for the output alone.")
    return Place(named)


class Room:
    """What disks have free, less what is promised to outputs that are yet to be written."""

    def __init__(self) -> None:
        self._promised: Counter[int] = Counter()

    def refusals(self, final: Path, n_bytes: int) -> tuple[Refusal, ...]:
        """Why an output of so many bytes cannot be written: the disk has no room for it.

        What an interrupted run has written already does not count again; what is replaced stays until the end, and
        does.
        """
        parent = _existing_parent(final)
        needed = _missing_bytes(final, n_bytes)
        free = shutil.disk_usage(parent).free - self._promised[parent.stat().st_dev]
        if needed <= free:
            return ()
        found = f"needs {needed:,} bytes, but '{parent}' has {max(0, free):,} free."
        return (Refusal(str(final), f"{found} Free some space, or write to another disk."),)

    def promise(self, final: Path, n_bytes: int) -> None:
        """Set room aside for an output."""
        self._promised[_existing_parent(final).stat().st_dev] += _missing_bytes(final, n_bytes)


def _missing_bytes(final: Path, n_bytes: int) -> int:
    """What is left to write of an output of so many bytes."""
    part = _place_of(final).part
    return n_bytes - sum(file.stat().st_size for file in part.glob("*") if file.is_file())


def _existing_parent(final: Path) -> Path:
    absolute = final.absolute()
    return next(folder for folder in (*absolute.parents, absolute) if folder.is_dir())
