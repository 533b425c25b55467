"""Where a tensor's bytes lie: in a file on disk, or in one on a server that is read by ranges. Values, no reading."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class FileState:
    """What is another where a file was replaced, cut or written to."""

    device: int
    inode: int
    size: int
    mtime_ns: int


@dataclass(frozen=True, slots=True, order=True)
class LocalFile:
    """A file on this disk.

    Attributes:
        path: Where.
        state: As it was when it was opened, or None: it is this program's own, and may change.
        described_by: The small files that say what its tensors are: a configuration, an index, a record.
    """

    path: Path
    state: FileState | None = field(default=None, repr=False)
    described_by: tuple["LocalFile", ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Its name in its folder."""
        return self.path.name

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True, order=True)
class RemoteFile:
    """A file of the Hugging Face Hub at one commit, so that its content never changes.

    Attributes:
        url: Where ranges of it are asked for; holds the commit hash.
        name: Its name in the repository.
        size: Its bytes, as the hub lists them.
        etag: The hub's digest of its content: SHA-256 of a large file, the git hash of a small one.
        label: What messages call it, such as `org/name/model.safetensors`.
    """

    url: str
    name: str
    size: int
    etag: str
    label: str

    def __str__(self) -> str:
        return self.label


Source = LocalFile | RemoteFile
"""What holds a tensor's bytes; `portllm.tensors.bytes.read_bytes` reads either."""
