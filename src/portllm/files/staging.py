"""Where an output is prepared and how it takes its place, so that a run may die at any moment.

An output `NAME` has up to three siblings while it is made:

    .NAME.part      the folder that is being written
    .NAME.journal   whose plan the part belongs to and which of its files are finished; locked by the run
    .NAME.old       what is replaced, for a moment, on file systems that cannot exchange two folders in one step

The kernel drops the lock when a run dies, and the next run to the same output begins with what it finds:

| found | what happened | what is done |
| --- | --- | --- |
| a part, and `NAME` is what the journal describes | it died after the exchange | the part, now the old, is removed |
| a part with a journal of the same plan | it died while it wrote | finished files are checked and kept |
| a part with a journal of another plan | the same, or another command | the part is removed |
| `.NAME.old` and no `NAME` | it died between two renames | the old output gets its name back; then as above |
| `.NAME.old`, and `NAME` is what the journal describes | it died before it removed the old output | that is removed |
| anything else under these names | it is not this program's | the run is refused |

A folder is told from another by its inode. What is kept of a part is checked first, and a link in it never is.
"""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import stat
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from blake3 import blake3

from portllm.errors import OutputError
from portllm.files.json_text import parse_json
from portllm.files.own_files import is_own_file, open_locked

FORMAT = 1
"""Version of the journal's layout; a part of another version is nobody's."""

MOST_SYNCED = 16
"""Files that are brought to the disk side by side."""

_WITHOUT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux


@dataclass(frozen=True, slots=True)
class Place:
    """An output's name and those of its siblings.

    Example:
        >>> Place(Path("models/out")).part.as_posix()
        'models/.out.part'
    """

    final: Path

    @property
    def part(self) -> Path:
        """What is being written."""
        return self.final.with_name(f".{self.final.name}.part")

    @property
    def journal(self) -> Path:
        """What is known about the part."""
        return self.final.with_name(f".{self.final.name}.journal")

    @property
    def old(self) -> Path:
        """What is being replaced."""
        return self.final.with_name(f".{self.final.name}.old")

    def settle(self, inode: int | None) -> None:
        """Bring the names in order after a run that died; the output it replaced is back, or the new one is whole.

        Args:
            inode: Of the folder that the dead run wrote, or None.

        Raises:
            OutputError: Somebody made a folder of the output's name in the meantime, or the old output is none.
        """
        if os.path.lexists(self.old):
            if _is_folder(self.old) and not os.path.lexists(self.final):
                self.old.rename(self.final)
            elif _is_folder(self.final, inode) and not os.path.lexists(self.part):
                remove(self.old)
            else:
                raise OutputError(
                    f"'{self.final}': was created while an interrupted run's old output was at '{self.old}', or "
                    "someone else put that there. Delete the one that you do not want."
                )
        if _is_folder(self.final, inode):
            remove(self.part)

    def clear(self, inode: int | None) -> None:
        """Remove the part that a run left which died; arguments as for `settle`.

        Raises:
            OutputError: What lies there is not known to be one.
        """
        with contextlib.suppress(OSError):
            self.part.rmdir()  # empty: it died before it could note that the part is its own
        if _is_folder(self.part, inode):
            remove(self.part)
        elif os.path.lexists(self.part):
            raise OutputError(
                f"'{self.part}': is where the output is prepared, but it was not created by a run of this "
                "program. Find out who created it; then delete it, or choose another path."
            )

    def take(self) -> None:
        """Give the part the output's name, in one step where the file system can; what was there is removed."""
        _sync_each(self.part)
        if not os.path.lexists(self.final):
            self.part.rename(self.final)
        elif not exchange(self.part, self.final):
            self.final.rename(self.old)
            self.part.rename(self.final)
        sync(self.final.parent)
        remove(self.old)
        remove(self.part)


class Journal:
    """A file of lines that a dead run leaves readable, locked against other runs as long as it is open.

    Each line is a JSON object behind its digest, and is on the disk before the next one is written; a line that was cut
    off is dropped. The first says whose plan it is, each other that a file of the part is finished.

    Attributes:
        inode: Of the part that it describes, or None.
        plan: Digest of the plan, or None where it cannot be resumed.
        finished: What was noted about each finished file.
    """

    def __init__(self, path: Path, *, wait: bool = False) -> None:
        """Open and lock it.

        Args:
            path: The file; it is made where it is missing.
            wait: For another run that holds it, to its end.

        Raises:
            OutputBusyError: Another run holds it, and `wait` is False.
            OSError: It cannot be made.
        """
        self._path = path
        self._descriptor = open_locked(path, wait=wait)
        self.inode: int | None = None
        self.plan: str | None = None
        self.finished: dict[str, Mapping[str, object]] = {}
        self._read()

    def begin(self, part: Path, plan: str | None) -> None:
        """Forget all, and describe a new part."""
        self.inode, self.plan, self.finished = part.lstat().st_ino, plan, {}
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        self._append({"format": FORMAT, "folder": self.inode, "plan": plan})

    def finish(self, file: str, facts: Mapping[str, object]) -> None:
        """Note that a file of the part is whole and on the disk."""
        self.finished[file] = facts
        self._append({"file": file, "facts": facts})

    def remove(self) -> None:
        """Delete it, still locked: who waits for the name makes a new one."""
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Give up the lock."""
        os.close(self._descriptor)

    def _append(self, value: Mapping[str, object]) -> None:
        text = json.dumps(value)
        line = memoryview(f"{_line_digest(text)} {text}\n".encode())
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def _read(self) -> None:
        whole = 0
        with open(self._descriptor, "rb", closefd=False) as stream:
            for number, line in enumerate(stream):
                value = _parse_line(line)
                if value is None or (number == 0 and value.get("format") != FORMAT):
                    break
                whole += len(line)
                self._take_in(value)
        os.ftruncate(self._descriptor, whole)
        os.lseek(self._descriptor, whole, os.SEEK_SET)

    def _take_in(self, value: Mapping[str, object]) -> None:
        match value:
            case {"format": _, "folder": int(inode), "plan": str() | None as plan}:
                self.inode, self.plan = inode, plan
            case {"file": str(file), "facts": dict(facts)}:
                self.finished[file] = facts


@dataclass(frozen=True, slots=True)
class Staged:
    """A folder that is being written.

    Attributes:
        folder: Where.
        finished: What an earlier run of the same plan noted about files it finished; they are yet to be checked.
    """

    folder: Path
    finished: Mapping[str, Mapping[str, object]]
    _journal: Journal = field(repr=False)

    def keep(self, files: Collection[str]) -> None:
        """Remove everything but these files."""
        for entry in self.folder.iterdir():
            if entry.name not in files or not is_own_file(entry):
                remove(entry)

    def finish(self, file: str, facts: Mapping[str, object]) -> None:
        """Note for a later run, should this one die, that a file is whole and on the disk."""
        self._journal.finish(file, facts)


def begin(place: Place, journal: Journal, plan: str | None) -> Staged:
    """A folder to write into: what a dead run of the same plan left, or a fresh one."""
    if plan is not None and journal.plan == plan and _is_folder(place.part, journal.inode):
        finished = {file: facts for file, facts in journal.finished.items() if is_own_file(place.part / file)}
        return Staged(place.part, finished, journal)
    place.clear(journal.inode)
    place.part.mkdir()
    try:
        journal.begin(place.part, plan)
    except OSError:
        remove(place.part)
        raise
    return Staged(place.part, {}, journal)


def exchange(first: Path, second: Path) -> bool:
    """Swap the names of two folders in one step; False, with nothing done, where the system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # not Linux, or an old C library
        return False
    if rename(_HERE, os.fsencode(first), _HERE, os.fsencode(second), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _WITHOUT_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there; what cannot be deleted stays for the next run."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _line_digest(text: str) -> str:
    return blake3(text.encode()).hexdigest(8)


def _parse_line(line: bytes) -> Mapping[str, object] | None:
    digest, _, text = line.decode("utf-8", "replace").removesuffix("\n").partition(" ")
    if not line.endswith(b"\n") or digest != _line_digest(text):
        return None
    try:
        value = parse_json(text.encode())
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _is_folder(path: Path, *inode: int | None) -> bool:
    """Whether there is a folder, no link, and where an inode is given that one."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(facts.st_mode) and inode in ((), (facts.st_ino,))


def _sync_each(folder: Path) -> None:
    """Bring a folder's files and list of names to the disk before anything points to them.

    Side by side, so that they share a commit of the file system's own journal: one after the other, each waits for one.
    """
    with ThreadPoolExecutor(MOST_SYNCED) as pool:
        for _ in pool.map(sync, [folder, *(entry for entry in folder.rglob("*") if entry.is_file())]):
            pass


def sync(path: Path) -> None:
    """Bring a file's bytes, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
