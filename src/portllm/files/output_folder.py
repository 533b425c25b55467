"""Output folders: written beside their final name, renamed when whole, resumed where a run died."""

import contextlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from portllm.errors import OutputError, OutputExistsError, Refusal
from portllm.files.input_file import require_unchanged
from portllm.files.source import LocalFile, Source
from portllm.files.staging import Journal, Place, Staged, begin, remove
from portllm.show.printable import is_utf8


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
        raise OutputError(f"{str(final)!r}: is not UTF-8, and no record could name it. Choose another name.")
    check_apart(final, inputs)
    check_free(final, overwrite=overwrite)
    place = Place(final if final.name not in ("", "..") else final.resolve())
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
                    f"'{final}': could not be written: {error.strerror or error}. Nothing was left there."
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
        if not place.part.is_dir():
            journal.remove()
        journal.close()


def check_free(final: Path, *, overwrite: bool) -> None:
    """Raise OutputExistsError if something is at `final` that may not be replaced."""
    if os.path.lexists(final) and not overwrite:
        raise OutputExistsError(
            f"'{final}': is there already. Choose another place, or pass --overwrite to replace it."
        )
    if os.path.lexists(final) and not final.is_dir():
        raise OutputExistsError(f"'{final}': is a file; the output is a folder. Choose another place.")


def check_apart(final: Path, inputs: Iterable[Source]) -> None:
    """Raise OutputError if a file that is read lies in the folder `final`, which `--overwrite` would replace whole.

    The same goes for the siblings that a run writes to before the output takes its name.
    """
    place = Place(final.resolve())
    places = (place.final, place.part, place.old) if place.final.name else (place.final,)
    for file in inputs:
        if not isinstance(file, LocalFile):
            continue
        # A file may be a link out of its folder, as in the cache of the Hugging Face Hub; neither end may be lost.
        ends = (file.path.parent.resolve() / file.path.name, file.path.resolve())
        if any(place in end.parents for end in ends for place in places):
            raise OutputError(f"'{final}': holds '{file}', which is read for the output. Write to another folder.")


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
        found = f"{needed:,} bytes are to be written, '{parent}' has {max(0, free):,} free."
        return (Refusal(str(final), f"{found} Make room, or write to another disk."),)

    def promise(self, final: Path, n_bytes: int) -> None:
        """Set room aside for an output."""
        self._promised[_existing_parent(final).stat().st_dev] += _missing_bytes(final, n_bytes)


def _missing_bytes(final: Path, n_bytes: int) -> int:
    """What is left to write of an output of so many bytes."""
    part = Place(final.resolve()).part
    return n_bytes - sum(file.stat().st_size for file in part.glob("*") if file.is_file())


def _existing_parent(final: Path) -> Path:
    return next(folder for folder in final.absolute().parents if folder.is_dir())
