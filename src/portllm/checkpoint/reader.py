"""Open a model on disk: a folder (one file, or shards with an index), a single `.safetensors` file, or `builtin:NAME`.

Opening reads headers, the index and `config.json`; no byte of a tensor is read before it is asked for. What lives
here knows nothing of arithmetic: `portllm.checkpoint.tensors` turns bytes into arrays.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.builtin import builtin_folder
from portllm.checkpoint.header import Header, TensorInfo, parse_header, parse_header_length
from portllm.errors import CheckpointError, IndexFileError, MissingShardError, MissingTensorError, NotFoundError
from portllm.progress import Progress, silent

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
BUILTIN_PREFIX = "builtin:"
MAX_JSON_BYTES = 64_000_000

_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(@[\w./-]+)?$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, opened lazily.

    Attributes:
        name: What the user called it; stands in messages and in `patch.json`.
        folder: Its folder, or None for a single file given by itself.
        infos: Every tensor by name, sorted by name.
        config: `config.json`, or an empty mapping where there is none.
        metadata: String metadata of the first file's header.
    """

    name: str
    folder: Path | None
    infos: Mapping[str, TensorInfo]
    config: Mapping[str, object] = field(repr=False)
    metadata: Mapping[str, str] = field(repr=False)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold the tensors, sorted."""
        return tuple(sorted({info.file for info in self.infos.values()}))

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.n_bytes for info in self.infos.values())

    @property
    def n_params(self) -> int:
        """Elements of all tensors."""
        return sum(info.n_params for info in self.infos.values())

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
    """
    stop = info.n_bytes if stop is None else stop
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


def read_json(file: Path, *, error: type[CheckpointError] | type[Exception] = CheckpointError) -> dict[str, object]:
    """A JSON object from a file that nobody vouches for.

    Raises:
        error: The file is too large, is not JSON, or is not an object.
    """
    try:
        size = file.stat().st_size
        if size > MAX_JSON_BYTES:
            raise error(f"'{file}': has {size} bytes; at most {MAX_JSON_BYTES} are read.")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as problem:
        raise error(f"'{file}': cannot be read: {problem.strerror}.") from problem
    except (ValueError, RecursionError) as problem:
        raise error(f"'{file}': is not valid JSON ({problem}). Fetch or write it again.") from problem
    if not isinstance(value, dict):
        raise error(f"'{file}': must hold a JSON object, holds a {type(value).__name__}.")
    return value


def open_checkpoint(where: str | Path, *, progress: Progress = silent) -> Checkpoint:
    """Open a model lazily.

    Args:
        where: A folder, a single `.safetensors` file, or `builtin:NAME`.
        progress: Told of the one-time conversion of a built-in model.

    Raises:
        NotFoundError: There is no model at that place.
        HeaderError, IndexFileError, MissingShardError: Its files are damaged or incomplete.
    """
    name = str(where)
    if name.startswith(BUILTIN_PREFIX):
        return _open_folder(builtin_folder(name.removeprefix(BUILTIN_PREFIX), progress=progress), name=name)
    path = Path(where)
    if path.is_dir():
        return _open_folder(path, name=name)
    if path.is_file():
        return _open_file(path, name=name)
    hint = ""
    if _HUB_ID.match(name):
        hint = f" If this is a model of the Hugging Face Hub, fetch it first: hf download {name.split('@')[0]}."
    raise NotFoundError(
        f"'{name}': no such file or folder. Give a folder, a single .safetensors file or builtin:smollm2-135m.{hint}"
    )


def _open_file(path: Path, *, name: str) -> Checkpoint:
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"'{name}': only safetensors files are read, never pickle. Save the model with save_pretrained first."
        )
    if _SHARD_NAME.search(path.name):
        raise CheckpointError(f"'{name}': is one shard of a model. Give the folder that holds all of them.")
    header = read_header(path)
    return Checkpoint(name, None, _sorted(header.tensors), {}, header.metadata)


def _open_folder(folder: Path, *, name: str) -> Checkpoint:
    config = read_json(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    if (folder / SINGLE_FILE).is_file():
        header = read_header(folder / SINGLE_FILE)
        return Checkpoint(name, folder, _sorted(header.tensors), config, header.metadata)
    if (folder / INDEX_FILE).is_file():
        infos, metadata = _read_shards(folder)
        return Checkpoint(name, folder, infos, config, metadata)
    raise NotFoundError(f"'{name}': {_why_no_model(folder)}")


def _why_no_model(folder: Path) -> str:
    if (folder / "adapter_config.json").is_file():
        return "is an adapter, not a model. Give it as the patch, and the model it belongs to as the base."
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        return (
            "holds pickled weights, which are never read. Convert them once: "
            'python -c "from transformers import AutoModelForCausalLM as M; '
            "M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\"."
        )
    return f"holds neither {SINGLE_FILE} nor {INDEX_FILE}."


def _read_shards(folder: Path) -> tuple[Mapping[str, TensorInfo], Mapping[str, str]]:
    """Every tensor of a sharded folder; index and shards must name the same tensors."""
    index = folder / INDEX_FILE
    weight_map = read_json(index, error=IndexFileError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IndexFileError(f"'{index}': has no 'weight_map' from tensor names to files. Save the model again.")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise IndexFileError(
                f"'{index}': tensor '{tensor}' is said to be in {shard!r}, which is not the plain name of a "
                ".safetensors file beside the index."
            )
    shards = sorted(set(weight_map.values()))
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise MissingShardError(
            f"'{folder}': {len(missing)} of {len(shards)} shards are missing, first '{missing[0]}'. Fetch them again."
        )
    headers = {shard: read_header(folder / shard) for shard in shards}
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
    return _sorted(infos), headers[shards[0]].metadata


def _sorted(infos: Mapping[str, TensorInfo]) -> Mapping[str, TensorInfo]:
    return {name: infos[name] for name in sorted(infos)}
