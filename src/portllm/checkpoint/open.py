"""Open a model: a folder, a `.safetensors` or `.gguf` file, `builtin:NAME`, or a Hugging Face Hub id.

A folder holds one file, or shards with an index; a model of the hub is `org/name` or `org/name@revision`.
Opening reads headers, the index and `config.json`; no byte of a tensor is read before it is asked for:
`reading.bytes` reads them, `reading.tensors` turns them into arrays. The network is touched
for a model of the hub only.
"""

import os
from pathlib import Path

from portllm.checkpoint.builtin import builtin_folder
from portllm.checkpoint.folder import open_folder, open_gguf, why_no_model_file
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.hub_names import HUB_ID, MAX_NAME_LENGTH, names_hub
from portllm.checkpoint.model.unfinished import require_finished
from portllm.checkpoint.safetensors.folder import tensors_of
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX
from portllm.errors import CheckpointError, NotFoundError
from portllm.files.json_text import is_utf8
from portllm.files.near_names import did_you_mean
from portllm.progress import Progress, silent

BUILTIN_PREFIX = "builtin:"

ModelLike = str | Path | Checkpoint
"""A model, or where it is."""


def open_checkpoint(where: ModelLike, *, progress: Progress = silent) -> Checkpoint:
    """Open a model lazily; only headers and small files are read.

    Args:
        where: A folder, a `.safetensors` or `.gguf` file, `builtin:NAME`, or a model of the hub (`org/name` or
            `org/name@revision`), of which headers and small files are read. A checkpoint is returned as it is.
        progress: Progress callback (one-time conversion of a built-in model).

    Raises:
        NotFoundError: There is no model at that place.
        HeaderError, IndexFileError, MissingShardError: Its files are corrupt or incomplete.
        RemoteError: The Hub cannot be reached, or denies access.
    """
    if isinstance(where, Checkpoint):
        return where
    name = str(where)
    if not is_utf8(name):
        raise NotFoundError(f"{name!r}: is not valid UTF-8, so no record can name it. Rename the folder.")
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
    could_be = len(name) <= MAX_NAME_LENGTH and HUB_ID.fullmatch(name)
    hint = f" For the model on the Hugging Face Hub, write {name}@main." if could_be else ""
    raise NotFoundError(
        f"'{name[:MAX_NAME_LENGTH]}': no such file or folder. Pass a folder, a .safetensors or .gguf file, a "
        f"Hugging Face Hub id (org/name or org/name@revision) or builtin:smollm2-135m.{hint}{did_you_mean(name)}"
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


def _open_file(path: Path, *, name: str) -> Checkpoint:
    if path.suffix == GGUF_SUFFIX:
        return open_gguf(path, name=name, folder=None)
    if (problem := why_no_model_file(path, folder=Path(name).parent)) is not None:
        raise CheckpointError(f"'{name}': {problem}")
    header = read_header(path)
    return Checkpoint(name, None, tensors_of(header.tensors, {}), {}, header.metadata)
