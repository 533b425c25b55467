"""Open a model: a folder, a `.safetensors` or `.gguf` file, `builtin:NAME`, or a model of the Hugging Face Hub.

A folder holds one file, or shards with an index; a model of the hub is `org/name` or `org/name@revision`.
Opening reads headers, the index and `config.json`; no byte of a tensor is read before it is asked for. What lives
here knows nothing of arithmetic: `portllm.checkpoint.tensors` turns bytes into arrays. The network is touched for a
model of the hub only.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.bitsandbytes import joined
from portllm.checkpoint.builtin import builtin_folder
from portllm.checkpoint.encoding import schemes_of
from portllm.checkpoint.header import Header, TensorInfo, parse_header, parse_header_length
from portllm.checkpoint.json_text import parse_json
from portllm.checkpoint.source import RemoteFile, Source
from portllm.checkpoint.unfinished import require_finished
from portllm.errors import CheckpointError, IndexFileError, MissingShardError, MissingTensorError, NotFoundError
from portllm.progress import Progress, silent

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
GGUF_SUFFIX = ".gguf"
BUILTIN_PREFIX = "builtin:"
MAX_JSON_BYTES = 64_000_000

_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<revision>@(?!.*\.\.)\w[\w./-]*)?")
_BATCH = 512


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


def read_bytes(info: TensorInfo, start: int = 0, stop: int | None = None) -> bytes:
    """Bytes `start` to `stop` of one tensor, counted from its first byte.

    Raises:
        CheckpointError: The file is gone or became shorter since it was opened.
        RemoteError: A file on a server cannot be read.
    """
    stop = info.n_bytes if stop is None else stop
    if isinstance(info.file, RemoteFile):
        from portllm.checkpoint.remote import read_range  # loads an HTTP client, which few runs need

        return read_range(info.file, info.start + start, info.start + stop)
    try:
        with open(info.file, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), stop - start, info.start + start)
            while len(data) < stop - start:  # one call returns at most 2 GiB, and may return less
                more = os.pread(file.fileno(), stop - start - len(data), info.start + start + len(data))
                if not more:
                    raise CheckpointError(
                        f"'{info.name}': '{info.file}' ended at {len(data)} of {stop - start} bytes; "
                        "it changed while it was read. Run again when nothing writes to it."
                    )
                data += more
    except OSError as error:
        raise CheckpointError(f"'{info.name}': cannot read '{info.file}': {error.strerror}.") from error
    return data


def read_spans(spans: Sequence[tuple[TensorInfo, int, int]]) -> Iterator[bytes]:
    """What `read_bytes` gives for each tensor, start and stop, in order; slices of remote files are read side by side.

    Errors as `read_bytes`.
    """
    for first in range(0, len(spans), _BATCH):
        batch = spans[first : first + _BATCH]
        if any(isinstance(info.file, RemoteFile) for info, _, _ in batch):
            from portllm.checkpoint.remote import concurrently

            yield from concurrently(lambda span: read_bytes(*span), batch)
        else:
            yield from (read_bytes(*span) for span in batch)


def read_header(file: Path) -> Header:
    """The header of one safetensors file.

    Raises:
        HeaderError: It breaks a rule of the format.
        CheckpointError: The file cannot be read.
    """
    try:
        file_bytes = file.stat().st_size
        with open(file, "rb") as stream:
            length = parse_header_length(stream.read(8), file=file, file_bytes=file_bytes)
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"'{file}': cannot be read: {error.strerror}.") from error
    return parse_header(text, file=file, file_bytes=file_bytes)


def read_json(
    file: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError, infinities: bool = False
) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for; `infinities` as for `json_text.parse_json`.

    Raises:
        error: The file is none (a pipe could be waited for forever), is too large, is not
            JSON that every reader reads alike, or is not an object.
    """
    try:
        if file.exists() and not file.is_file():
            raise error(f"'{file}': is not a file. Fetch or write it again.")
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            text = stream.read(min(size, MAX_JSON_BYTES) + 1)  # as much room is made as is asked for
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    if len(text) > MAX_JSON_BYTES:
        raise error(f"'{file}': has {size} bytes; at most {MAX_JSON_BYTES} are read.")
    try:
        value = parse_json(text, infinities=infinities)
    except ValueError as problem:
        raise error(f"'{file}': is not valid JSON ({problem}). Fetch or write it again.") from problem
    if not isinstance(value, dict):
        raise error(f"'{file}': must hold a JSON object, holds a {type(value).__name__}.")
    return value


def read_config(file: Path) -> dict[str, object]:
    """A model's `config.json`, in which transformers writes infinities as Python does.

    Raises:
        CheckpointError: As `read_json`.
    """
    return read_json(file, infinities=True)


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
    if path.is_dir():
        require_finished(path)
        return open_folder(path, name=name)
    if path.is_file():
        return _open_file(path, name=name)
    if names_hub(name):
        from portllm.checkpoint.hub import open_remote

        return open_remote(name)
    hint = f" For the model of the Hugging Face Hub, write {name}@main." if _HUB_ID.fullmatch(name) else ""
    raise NotFoundError(
        f"'{name}': no such file or folder. Give a folder, a .safetensors or .gguf file, a model of the Hugging Face "
        f"Hub (org/name or org/name@revision) or builtin:smollm2-135m.{hint}"
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
    if match is None or Path(where).exists() or str(where).endswith(".safetensors"):
        return False
    return match["revision"] is not None or not Path(where).parent.exists()


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
