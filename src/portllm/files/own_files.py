"""What this program changes in a folder that may be a stranger's: its own files, and nothing that a link leads to.

The path to a folder is the user's, and may lead through links of theirs. What lies in the folder may be anybody's: a
link there, or a file that has a second name elsewhere (a hard link), would carry a write to a place that nobody named.
So wherever something may lie already,

- names are taken relative to the folder, which is opened once;
- a file is written under a name of its own and renamed, which replaces a link and does not follow it;
- a file that is opened to be changed is a regular file with one name;
- a folder is removed if it holds what this program puts there, and no more.

Two paths are told apart by what they lead to (device and inode), not by how they are spelled: through links, bind
mounts and names in other letters they may lead to one folder.
"""

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import OutputBusyError, OutputError

_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_NO_FILE = (errno.ELOOP, errno.EMLINK, errno.EISDIR, errno.ENXIO)
"""What the systems say of a link, a folder and a pipe that are opened as a file."""


@dataclass(frozen=True, slots=True)
class Held:
    """A folder that is open.

    Attributes:
        path: What the user calls it.
        descriptor: What names in it are relative to.
    """

    path: Path
    descriptor: int

    def sync(self) -> None:
        """Bring its list of names to the disk."""
        os.fsync(self.descriptor)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[Held]:
    """Hold a folder open.

    Raises:
        OSError: There is none.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield Held(folder, descriptor)
    finally:
        os.close(descriptor)


def is_own_file(path: Path) -> bool:
    """Whether this is a regular file with one name, and no link."""
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_nlink == 1


def open_own(held: Held, name: str, flags: int) -> int:
    """A descriptor of a file that may be changed.

    Raises:
        OutputError: It is a link, no regular file, or has a second name.
        OSError: It cannot be opened.
    """
    try:
        flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o666, dir_fd=held.descriptor)
    except OSError as error:
        if error.errno in _NO_FILE:
            raise _alien(held.path / name) from error
        raise
    facts = os.fstat(descriptor)
    if stat.S_ISREG(facts.st_mode) and facts.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise _alien(held.path / name)


def open_locked(path: Path, *, wait: bool) -> int:
    """A descriptor of a file, made where it is missing, that nobody else on this machine has open in this way.

    Args:
        path: The file.
        wait: For another run that holds it, to its end.

    Raises:
        OutputBusyError: Another run holds it, and `wait` is False.
        OutputError, OSError: As `open_own`.
    """
    with opened(path.parent) as folder:
        return _open_locked(folder, path.name, wait=wait)


def _open_locked(held: Held, name: str, *, wait: bool) -> int:
    how = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
    while True:
        descriptor = open_own(held, name, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(descriptor, how)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OutputBusyError(
                f"'{held.path / name}': is locked by another run that writes the same output. Wait for that run "
                "to finish, or choose another path."
            ) from error
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:  # such network file systems are written to all the same
                os.close(descriptor)
                raise
        # Who held the lock may have finished and deleted the file after it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(name, dir_fd=held.descriptor, follow_symlinks=False)):
                return descriptor
        os.close(descriptor)


@contextlib.contextmanager
def locked_folder(folder: Path, file: str) -> Iterator[None]:
    """Keep other runs on this machine from writing to a folder, which is made where it is missing.

    Raises:
        OutputBusyError: Another run writes there.
        OutputError: It cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(folder / file, wait=False)
    except OSError as error:
        raise OutputError(f"'{folder}': cannot be written to: {error.strerror}.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def part_of(name: str) -> str:
    """What a file is called while it is written."""
    return f".{name}.part"


def write_text(file: Path, text: str, *, is_kept: bool = True) -> None:
    """Write a small file whole or not at all; what was there, a link too, is replaced.

    Args:
        file: Where.
        text: What it is to hold.
        is_kept: Wait until it is on the disk; what can be made again need not outlive a power failure.

    Raises:
        OutputError: What is to be written first is not this program's.
        OSError: It cannot be written.
    """
    with opened(file.parent) as folder:
        write_within(folder, file.name, text, is_kept=is_kept)


def write_within(held: Held, name: str, text: str, *, is_kept: bool = True) -> None:
    """As `write_text`, in a folder that is open; two runs that write one file wait for each other."""
    part = part_of(name)
    descriptor = _open_locked(held, part, wait=True)
    try:
        os.ftruncate(descriptor, 0)
        with open(descriptor, "w", encoding="utf-8", newline="\n", closefd=False) as stream:
            stream.write(text)
        if is_kept:
            os.fsync(descriptor)
        os.rename(part, name, src_dir_fd=held.descriptor, dst_dir_fd=held.descriptor)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(part, dir_fd=held.descriptor)
        raise
    finally:
        os.close(descriptor)


def remove_file(held: Held, name: str) -> None:
    """Remove a file, or a link and not what it leads to, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=held.descriptor)


def remove_folder(held: Held, name: str, files: Collection[str]) -> None:
    """Remove a folder, if it is there, that holds no other files than these.

    Raises:
        OutputError: It is another one.
        OSError: It cannot be removed.
    """
    try:
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=held.descriptor)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _alien(held.path / name) from error
    try:
        if not set(os.listdir(folder)) <= set(files):
            raise _alien(held.path / name)
        for file in os.listdir(folder):
            os.unlink(file, dir_fd=folder)
    finally:
        os.close(folder)
    os.rmdir(name, dir_fd=held.descriptor)


def require_real(root: Path, *names: str) -> None:
    """See to it that no folder on the way from `root` down these names is a link.

    Raises:
        OutputError: One is.
    """
    folder = root
    for name in names:
        folder = folder / name
        if folder.is_symlink():
            raise _alien(folder)


def inode_of(path: Path) -> tuple[int, int] | None:
    """What a path leads to, as device and inode; None where there is nothing."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_dev, facts.st_ino


def holds(outer: Path, inner: Path) -> bool:
    """Whether a folder, which may be yet to be made, is the other one or would hold it."""
    (outer_parent, outer_names), (inner_parent, inner_names) = _whereabouts(outer), _whereabouts(inner)
    if not outer_names:
        return any(inode_of(folder) == outer_parent for folder in _with_parents(inner))
    return inner_parent == outer_parent and inner_names[: len(outer_names)] == outer_names


def ignores_case(folder: Path) -> bool:
    """Whether names in other letters are the same to the file system that a folder, or its parent to be, lies on."""
    there = next((above for above in _with_parents(folder) if above.exists()), folder)
    other = there.with_name(there.name.swapcase()) if there.name else there
    return other != there and inode_of(other) == inode_of(there)


def _whereabouts(path: Path) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The nearest folder on the way to a path that is there, and the names from it on."""
    parents = _with_parents(path)
    there = next((folder for folder in parents if folder.exists()), parents[-1])
    names = parents[0].relative_to(there).parts
    return inode_of(there), tuple(name.casefold() for name in names) if names and ignores_case(there) else names


def _with_parents(path: Path) -> tuple[Path, ...]:
    real = Path(os.path.realpath(path))
    return (real, *real.parents)


def _alien(path: Path) -> OutputError:
    return OutputError(
        f"'{path}': is a link, has a second hard link, or is not what this program writes there, so nothing is "
        "written or removed through it. Find out who created it; then delete it, or choose another path."
    )
