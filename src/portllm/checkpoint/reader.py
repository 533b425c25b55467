"""Open a model: a folder, a `.safetensors` or `.gguf` file, `builtin:NAME`, or a model of the Hugging Face Hub.

A folder holds one file, or shards with an index; a model of the hub is `org/name` or `org/name@revision`.
Opening reads headers, the index and `config.json`; no byte of a tensor is read before it is asked for:
`portllm.checkpoint.raw_files` reads them, `portllm.checkpoint.tensors` turns them into arrays. The network is touched
for a model of the hub only.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.bitsandbytes import joined
from portllm.checkpoint.builtin import builtin_folder
from portllm.checkpoint.encoding import schemes_of
from portllm.checkpoint.header import Header, TensorInfo
from portllm.checkpoint.raw_files import read_config, read_header, read_json, read_spans
from portllm.checkpoint.source import RemoteFile, Source
from portllm.checkpoint.unfinished import require_finished
from portllm.errors import CheckpointError, IndexFileError, MissingShardError, MissingTensorError, NotFoundError
from portllm.progress import Progress, silent

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GGUF_SUFFIX = ".gguf"
BUILTIN_PREFIX = "builtin:"
MAX_NAME_LENGTH = 250
"""Of a model of the hub, with its revision; a name there has 96 characters at most."""

_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<revision>@(?!.*\.\.)\w[\w./-]*)?")


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


def open_checkpoint(where: str | Path, *, progress: Progress = silent) -> Checkpoint:
    """Open a model lazily.

    Args:
        where: A folder, a `.safetensors` or `.gguf` file, `builtin:NAME`, or a model of the hub (`org/name` or
            `org/name@revision`), of which headers and small files are read.
        progress: Told of the one-time conversion of a built-in model.

    Raises:
        NotFoundError: There is no model at that place.
        HeaderError, IndexFileError, MissingShardError: Its files are damaged or incomplete.
        RemoteError: The hub cannot be reached, or denies access.
    """
    name = str(where)
    if name.startswith(BUILTIN_PREFIX):
        return open_folder(builtin_folder(name.removeprefix(BUILTIN_PREFIX), progress=progress), name=name)
    path = Path(where)
    if os.path.isdir(path):  # which is no error for a name that no system has, however long
        require_finished(path)
        return open_folder(path, name=name)
    if os.path.isfile(path):
        return _open_file(path, name=name)
    if names_hub(name):
        from portllm.checkpoint.hub import open_remote

        return open_remote(name)
    could_be = len(name) <= MAX_NAME_LENGTH and _HUB_ID.fullmatch(name)
    hint = f" For the model of the Hugging Face Hub, write {name}@main." if could_be else ""
    raise NotFoundError(
        f"'{name[:MAX_NAME_LENGTH]}': no such file or folder. Give a folder, a .safetensors or .gguf file, a model of "
        f"the Hugging Face Hub (org/name or org/name@revision) or builtin:smollm2-135m.{hint}"
    )


def on_disk(checkpoint: Checkpoint, *, progress: Progress = silent) -> Checkpoint:
    """The same model with its tensors on disk: one that stays on the hub is downloaded, any other is returned as it is.

    Raises:
        RemoteError: It cannot be downloaded.
    """
    if not checkpoint.is_remote:
        return checkpoint
    from portllm.checkpoint.hub import download

    return download(checkpoint, progress=progress)


def side_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """A small file beside a model's weights, such as `tokenizer.json`, on disk; None where the model has none.

    Raises:
        RemoteError: It is on the hub and cannot be fetched.
    """
    if checkpoint.is_remote:
        from portllm.checkpoint.hub import fetch_side_file

        return fetch_side_file(checkpoint, name)
    path = None if checkpoint.folder is None else checkpoint.folder / name
    return path if path is not None and path.is_file() else None


def names_hub(where: str | Path) -> bool:
    """Whether a name means a repository of the hub: `org/name@revision`, or `org/name` that can be no path.

    Where there is a folder `org`, `org/name` is a path, perhaps a mistyped one, and is not sent over the network.

    Example:
        >>> [names_hub(name) for name in ("org/name", "org/name@main", "models/m.safetensors", "./org/name")]
        [True, True, False, False]
    """
    match = _HUB_ID.fullmatch(str(where))
    if match is None or len(str(where)) > MAX_NAME_LENGTH:
        return False
    if os.path.exists(where) or str(where).endswith(".safetensors"):
        return False
    return match["revision"] is not None or not os.path.exists(Path(where).parent)


def _open_file(path: Path, *, name: str) -> Checkpoint:
    if path.suffix == GGUF_SUFFIX:
        return _open_gguf(path, name=name, folder=None)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"'{name}': only safetensors and GGUF files are read, never pickle. Save the model with save_pretrained "
            "first."
        )
    if _SHARD_NAME.search(path.name):
        raise CheckpointError(f"'{name}': is one shard of a model. Give the folder that holds all of them.")
    header = read_header(path)
    return Checkpoint(name, None, tensors_of(header.tensors), {}, header.metadata)


def open_folder(folder: Path, *, name: str, revision: str | None = None) -> Checkpoint:
    """Open the model in a folder under a name; arguments and errors otherwise as `open_checkpoint`."""
    config = read_config(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if (folder / SINGLE_FILE).is_file():
        header = read_header(folder / SINGLE_FILE)
        return Checkpoint(name, folder, tensors_of(header.tensors), config, header.metadata, revision)
    if (folder / INDEX_FILE).is_file():
        weight_map = read_weight_map(folder / INDEX_FILE)
        shards = require_shards(weight_map, where=str(folder), there=_files_in(folder))
        headers = {shard: read_header(folder / shard) for shard in shards}
        infos, metadata = join_shards(weight_map, headers, index=str(folder / INDEX_FILE))
        return Checkpoint(name, folder, infos, config, metadata, revision)
    files = [folder / file for file in _files_in(folder) if file.endswith(GGUF_SUFFIX)]
    if len(files) == 1:
        return _open_gguf(files[0], name=name, folder=folder)
    raise NotFoundError(f"'{name}': {why_no_model(_files_in(folder))}")


def _open_gguf(path: Path, *, name: str, folder: Path | None) -> Checkpoint:
    from portllm.checkpoint.gguf_tensors import open_gguf_model

    model = open_gguf_model(path)
    return Checkpoint(name, folder, model.infos, model.config, {})


def _files_in(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.is_file()]


def why_no_model(files: Iterable[str]) -> str:
    """What a folder or repository with these files is, when it is no model that can be read."""
    files = list(files)
    if "adapter_config.json" in files:
        return "is an adapter, not a model. Give it as the patch, and the model it belongs to as the base."
    if any(file.endswith(".bin") or Path(file).suffix.startswith(".pt") for file in files):
        return (
            "holds pickled weights, which are never read. Convert them once: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\"."
        )
    if several := sorted(file for file in files if file.endswith(GGUF_SUFFIX)):
        return f"holds {len(several)} GGUF files. Give one of them, such as '{several[0]}'."
    return f"holds neither {SINGLE_FILE} nor {INDEX_FILE}, nor one GGUF file."


def read_weight_map(index: Path) -> dict[str, str]:
    """Which shard holds which tensor, as an index file says.

    Raises:
        IndexFileError: It says nothing of the kind, or names something else than a file beside it.
    """
    weight_map = read_json(index, error=IndexFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"'{index}': has no 'weight_map' from tensor names to files. Save the model again.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise IndexFileError(
                f"'{index}': tensor '{tensor}' is said to be in {shard!r}, which is not the plain name of a "
                ".safetensors file beside the index."
            )
    return weight_map


def require_shards(weight_map: Mapping[str, str], *, where: str, there: Iterable[str]) -> list[str]:
    """The shards of an index, sorted.

    Raises:
        MissingShardError: Not all of them are among the files that are `there`.
    """
    shards = sorted(set(weight_map.values()))
    missing = sorted(set(shards) - set(there))
    if missing:
        raise MissingShardError(
            f"'{where}': {len(missing)} of {len(shards)} shards are missing, first '{missing[0]}'. Fetch them again."
        )
    return shards


def join_shards(
    weight_map: Mapping[str, str], headers: Mapping[str, Header], *, index: str
) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """Every tensor of a sharded model, and the first shard's metadata.

    Raises:
        IndexFileError: Index and shards do not name the same tensors.
    """
    infos: dict[str, TensorInfo] = {}
    for shard, header in headers.items():
        for tensor, info in header.tensors.items():
            if weight_map.get(tensor) != shard:
                raise IndexFileError(
                    f"'{index}': tensor '{tensor}' is in '{shard}', the index says {weight_map.get(tensor)!r}."
                )
            infos[tensor] = info
    unheld = sorted(set(weight_map) - set(infos))
    if unheld:
        raise IndexFileError(
            f"'{index}': {len(unheld)} tensors are in no shard, first '{unheld[0]}' (said to be in "
            f"'{weight_map[unheld[0]]}')."
        )
    return tensors_of(infos), next(iter(headers.values())).metadata


def tensors_of(infos: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    """The tensors of a model, sorted by name, from those that its files list: a 4-bit weight is several of these.

    Raises:
        CheckpointError: The parts of a 4-bit weight do not fit each other.
    """
    return joined({name: infos[name] for name in sorted(infos)}, read_spans)
