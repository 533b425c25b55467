"""A model's folder, opened by what lies in it."""

import os
from collections.abc import Iterable
from pathlib import Path

from portllm.checkpoint.model.checkpoint import CONFIG_FILE, SIDE_SUFFIXES, Checkpoint
from portllm.checkpoint.model.unfinished import UNFINISHED_FILE
from portllm.checkpoint.safetensors.folder import join_shards, read_weight_map, require_shards, tensors_of
from portllm.checkpoint.safetensors.header_file import describing, read_header
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX, INDEX_FILE, SINGLE_FILE
from portllm.errors import NotFoundError
from portllm.files.json_file import read_config


def open_folder(folder: Path, *, name: str, revision: str | None = None) -> Checkpoint:
    """Open the model in a folder under a name; arguments and errors otherwise as `open_checkpoint`."""
    there = _files_in(folder)
    described_by = describing(
        folder / file for file in there if file.endswith(SIDE_SUFFIXES) and file != UNFINISHED_FILE
    )
    config = read_config(folder / CONFIG_FILE) if CONFIG_FILE in there else {}
    if SINGLE_FILE in there:
        header = read_header(folder / SINGLE_FILE, described_by=described_by)
        return Checkpoint(name, folder, tensors_of(header.tensors, config), config, header.metadata, revision)
    if INDEX_FILE in there:
        weight_map = read_weight_map(folder / INDEX_FILE)
        shards = require_shards(weight_map, where=str(folder), there=there)
        headers = {shard: read_header(folder / shard, described_by=described_by) for shard in shards}
        infos, metadata = join_shards(weight_map, headers, config, index=str(folder / INDEX_FILE))
        return Checkpoint(name, folder, infos, config, metadata, revision)
    files = [folder / file for file in there if file.endswith(GGUF_SUFFIX)]
    if len(files) == 1:
        return open_gguf(files[0], name=name, folder=folder)
    raise NotFoundError(f"'{name}': {why_no_model(there)}")


def open_gguf(path: Path, *, name: str, folder: Path | None) -> Checkpoint:
    """Open the model in a GGUF file."""
    from portllm.checkpoint.gguf.tensors import open_gguf_model

    model = open_gguf_model(path)
    return Checkpoint(name, folder, model.infos, model.config, {})


def _files_in(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file()]
    except OSError as error:
        raise NotFoundError(f"'{folder}': cannot be looked into: {error.strerror}.") from error


def why_no_model(files: Iterable[str]) -> str:
    """What a folder or repository with these files is, when it is no model that can be read."""
    files = list(files)
    if "adapter_config.json" in files:
        return "is an adapter, not a model. Pass it as the patch, and its base model as the base."
    if any(file.endswith(".bin") or Path(file).suffix.startswith(".pt") for file in files):
        return (
            'contains pickled weights, which are never read. Convert them once: python -c "from transformers '
            "import AutoModelForCausalLM as M; "
            "M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\"."
        )
    if several := sorted(file for file in files if file.endswith(GGUF_SUFFIX)):
        return f"contains {len(several)} GGUF files. Pass one of them, such as '{several[0]}'."
    return f"contains neither {SINGLE_FILE} nor {INDEX_FILE} nor a GGUF file."
