"""A checkpoint: named tensors in files, and the configuration beside them."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.tensor.encoding import schemes_of
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import MissingTensorError
from portllm.files.source import RemoteFile, Source

CONFIG_FILE = "config.json"


MAX_NAME_LENGTH = 250
"""Of a model of the hub, with its revision; a name there has 96 characters at most."""


HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<revision>@(?!.*\.\.)\w[\w./-]*)?")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk or on the hub, opened lazily.

    Attributes:
        name: What the user called it; stands in messages and in `patch.json`.
        folder: Its folder, or None for a single file given by itself and for a model that stays on the hub.
        infos: Every tensor by name, sorted by name.
        config: `config.json`, or an empty mapping where there is none.
        metadata: String metadata of the first file's header.
        revision: The commit hash of a model of the hub, else None.
    """

    name: str
    folder: Path | None
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, object] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)
    revision: str | None = None

    def __repr__(self) -> str:
        return f"Checkpoint({self.name!r}, {len(self.infos)} tensors, {self.n_params:,} numbers)"

    @property
    def files(self) -> tuple[Source, ...]:
        """The files that hold the tensors, sorted."""
        return tuple(sorted({info.file for info in self._stored}, key=str))

    @property
    def is_remote(self) -> bool:
        """Whether its tensors are read over the network; `portllm.checkpoint.hub.download` brings them here."""
        return any(isinstance(file, RemoteFile) for file in self.files)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info in self._stored)

    @property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return sum(info.n_params for info in self.infos.values())

    @property
    def quantization(self) -> str | None:
        """How its weights are quantized, such as `nf4-double` or `Q4_K, Q6_K`; None where its bytes are its values."""
        return schemes_of(info.encoding for info in self.infos.values())

    @property
    def _stored(self) -> Iterator[TensorInfo]:
        for info in self.infos.values():
            yield info
            yield from (part for _, part in info.parts)

    def info(self, name: str) -> TensorInfo:
        """One tensor's description.

        Raises:
            MissingTensorError: There is no such tensor; the message names the nearest ones.
        """
        if name not in self.infos:
            tail = name.rsplit(".", 2)[-2:]
            near = [other for other in self.infos if other.endswith(".".join(tail))][:3]
            hint = f" Names that end alike: {', '.join(near)}." if near else ""
            raise MissingTensorError(f"'{name}': not among the {len(self.infos)} tensors of {self.name}.{hint}")
        return self.infos[name]


def names_hub(where: str | Path) -> bool:
    """Whether a name means a repository of the hub: `org/name@revision`, or `org/name` that can be no path.

    Where there is a folder `org`, `org/name` is a path, perhaps a mistyped one, and is not sent over the network.

    Example:
        >>> [names_hub(name) for name in ("org/name", "org/name@main", "models/m.safetensors", "./org/name")]
        [True, True, False, False]
    """
    match = HUB_ID.fullmatch(str(where))
    if match is None or len(str(where)) > MAX_NAME_LENGTH:
        return False
    if os.path.exists(where) or str(where).endswith(".safetensors"):
        return False
    return match["revision"] is not None or not os.path.exists(Path(where).parent)
