"""Where a tensor's bytes lie: in a file on disk, or in one on a server that is read by ranges. Values, no reading."""

from dataclasses import dataclass
from pathlib import Path


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


Source = Path | RemoteFile
"""What holds a tensor's bytes; `portllm.checkpoint.reading.bytes.read_bytes` reads either."""
