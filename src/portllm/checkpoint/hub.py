"""Models of the Hugging Face Hub, by `org/name` or `org/name@revision`.

A revision is resolved once to a commit hash, and everything is read at that commit. Small files come through
huggingface_hub's cache. Weights are not downloaded: their headers and slices are read by ranges
(`portllm.tensors.ranges`), unless the cache has them whole or `download` is called. Pickled weights and code are never
fetched.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from huggingface_hub import is_offline_mode

from portllm.checkpoint.folder import open_folder, why_no_model
from portllm.checkpoint.hub_repository import cached, fetch, look_up, not_cached
from portllm.checkpoint.model.checkpoint import CONFIG_FILE, SIDE_SUFFIXES, Checkpoint
from portllm.checkpoint.safetensors.folder import join_shards, read_weight_map, require_shards, tensors_of
from portllm.checkpoint.safetensors.header import Header, parse_header, parse_header_length
from portllm.checkpoint.safetensors.names import INDEX_FILE, SINGLE_FILE
from portllm.errors import NotFoundError, RemoteError
from portllm.files.json_file import read_config
from portllm.files.source import RemoteFile
from portllm.progress import Progress, silent
from portllm.tensors.ranges import concurrently, read_range

HEADER_GUESS_BYTES = 100_000
"""Read at the start of a file in one request: its length and, for most files, the whole header."""

SIDE_NAMES = ("LICENSE", "NOTICE", "USE_POLICY.md")
"""What is fetched besides weights and `SIDE_SUFFIXES`: terms; never pickled weights or code."""

HEADER_BYTES_PER_TENSOR = 256
"""A generous guess, to read the header of a small shard without reading far into its tensors."""


def open_remote(name: str) -> Checkpoint:
    """Open a model of the hub; from the cache where it is whole there, else by ranges.

    Raises:
        NotFoundError: There is no such model; offline: it is not whole in the cache.
        HeaderError, IndexFileError, MissingShardError: Its files are damaged or incomplete.
        RemoteError: The hub cannot be reached, or denies access.
    """
    repository = look_up(name)
    files = repository.files
    if SINGLE_FILE not in files and INDEX_FILE not in files:
        raise (
            not_cached(name, repository.asked)
            if is_offline_mode()
            else NotFoundError(f"'{name}': {why_no_model(files)}")
        )
    config = read_config(fetch(repository, [CONFIG_FILE]) / CONFIG_FILE) if CONFIG_FILE in files else {}
    weight_map: Mapping[str, str] = {}
    shards = [SINGLE_FILE]
    if SINGLE_FILE not in files:
        index = fetch(repository, [INDEX_FILE]) / INDEX_FILE
        weight_map = read_weight_map(index)
        shards = require_shards(weight_map, where=name, there=files)
    folder = cached(repository, shards)
    if folder is not None:
        return open_folder(folder, name=name, revision=repository.revision)
    if is_offline_mode():
        raise not_cached(name, repository.asked)
    held = list(weight_map.values())
    guesses = {shard: 4096 + HEADER_BYTES_PER_TENSOR * held.count(shard) for shard in shards} if held else {}

    headers = dict(
        zip(
            shards,
            concurrently(
                lambda shard: read_remote_header(
                    files[shard], guess=min(HEADER_GUESS_BYTES, guesses.get(shard, HEADER_GUESS_BYTES))
                ),
                shards,
            ),
            strict=True,
        )
    )
    if held:
        infos, metadata = join_shards(weight_map, headers, config, index=f"{name}/{INDEX_FILE}")
    else:
        header = headers[SINGLE_FILE]
        infos, metadata = tensors_of(header.tensors, config), header.metadata
    return Checkpoint(name, None, infos, config, metadata, repository.revision)


def download(checkpoint: Checkpoint, *, progress: Progress = silent) -> Checkpoint:
    """Weights, configuration and tokenizer of a model that stays on the hub, in the cache of huggingface_hub.

    Files that the cache has are not fetched again.

    Raises:
        RemoteError: A file cannot be fetched, or is not the one that was opened.
    """
    repository = replace(look_up(f"{checkpoint.name.partition('@')[0]}@{checkpoint.revision}"), name=checkpoint.name)
    weights = [file.name for file in checkpoint.files if isinstance(file, RemoteFile)]
    side = [name for name in repository.files if name.endswith(SIDE_SUFFIXES) or name.startswith(SIDE_NAMES)]
    other_index = [name for name in side if name.endswith(".index.json") and name != INDEX_FILE]
    folder = fetch(repository, sorted({*weights, *side} - {*other_index}), progress=progress)
    local = open_folder(folder, name=checkpoint.name, revision=checkpoint.revision)
    layout = [(info.name, info.dtype, info.shape) for info in checkpoint.infos.values()]
    if layout != [(info.name, info.dtype, info.shape) for info in local.infos.values()]:
        raise RemoteError(
            f"'{folder}': does not contain the same tensors as {checkpoint.name} on the Hub. Delete it and run again."
        )
    return local


def fetch_side_file(checkpoint: Checkpoint, name: str) -> Path | None:
    """A small file of a model that stays on the hub; see `portllm.checkpoint.open.side_file`."""
    repository = look_up(f"{checkpoint.name.partition('@')[0]}@{checkpoint.revision}")
    return fetch(repository, [name]) / name if name in repository.files else None


def read_remote_header(file: RemoteFile, *, guess: int = HEADER_GUESS_BYTES) -> Header:
    """The header of a safetensors file, in one request where it is not longer than `guess` bytes.

    Raises:
        HeaderError: It breaks a rule of the format.
        RemoteError: It cannot be read.
    """
    head = read_range(file, 0, min(max(8, guess), file.size))
    end = 8 + parse_header_length(head, file=file, file_bytes=file.size)
    if end > len(head):
        head += read_range(file, len(head), end)
    return parse_header(head[8:end], file=file, file_bytes=file.size)
