"""A model's folder, opened by what lies in it."""

import itertools
import os
import re
from collections.abc import Iterable
from pathlib import Path

from portllm.checkpoint.model.checkpoint import CONFIG_FILE, SIDE_SUFFIXES, Checkpoint
from portllm.checkpoint.model.unfinished import UNFINISHED_FILE
from portllm.checkpoint.safetensors.folder import join_shards, read_weight_map, require_shards, tensors_of
from portllm.checkpoint.safetensors.header_file import describing, read_header
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX, INDEX_FILE, SINGLE_FILE
from portllm.errors import NotFoundError
from portllm.files.json_file import read_config

ADAPTER_FILE = "adapter_config.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
CONVERSION = (
    'Convert the model once, if you trust it: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('FOLDER').save_pretrained('FOLDER-safetensors')\"."
)

KINDS = {
    "certificate.json": ("certificates", "is a certificate, not a model. Read it with: portllm verify"),
    "export.json": ("exports", "is an export for a runtime, not a model. Look at it with: portllm verify"),
    "patch.json": ("patches", ""),
    ADAPTER_FILE: ("adapters", ""),
}
"""What a folder is, by a file that only its kind has, and what is said of it where a model is expected."""

MOST_BELOW, SHOWN_BELOW = 10_000, 6
"""Folders that are looked into, and those that are named of each kind."""

_SHARD_NAME = re.compile(r"-\d{5}-of-\d{5}\.safetensors$")
_STEP = re.compile(r"checkpoint-(?P<step>\d+)")


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
    raise NotFoundError(f"'{name}': {_inner_model(folder, name) or _below(folder, name, there) or why_no_model(there)}")


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
    for file, (_, told) in KINDS.items():
        if told and file in files:
            return told
    if ADAPTER_FILE in files:
        return (
            "is an adapter, not a model. Pass it as the patch (capture takes it as --adapter), and the model that it "
            "was trained on as the base."
        )
    if any(file.startswith("adapter_model.") for file in files):
        return f"is an adapter without its {ADAPTER_FILE}. Copy that from where the adapter came from."
    if any(Path(file).suffix in PICKLE_SUFFIXES for file in files):
        return f"contains pickled weights, which are never read. {CONVERSION}"
    if several := sorted(file for file in files if file.endswith(GGUF_SUFFIX)):
        return f"contains {len(several)} GGUF files. Pass one of them, such as '{several[0]}'."
    if any(file.endswith(".safetensors") for file in files):
        shown = ", ".join(sorted(file for file in files if file.endswith(".safetensors"))[:2])
        return (
            f"contains {shown}, and neither {SINGLE_FILE} nor {INDEX_FILE}. Download the index too, or name the file "
            "itself if it is a whole model."
        )
    return f"contains neither {SINGLE_FILE} nor {INDEX_FILE} nor a GGUF file."


def why_no_model_file(path: Path, *, folder: Path) -> str | None:
    """What a file is that is no whole model, and what to pass instead; None for one that may be.

    Args:
        path: The file, which is not a GGUF file.
        folder: The one that it is in, as the user would name it.
    """
    if _SHARD_NAME.search(path.name):
        return f"is one shard of a model. Pass the folder that contains all shards: {folder}"
    if (path.parent / ADAPTER_FILE).is_file() and path.name.startswith("adapter"):
        return (
            f"is a file of an adapter, not a model. Pass its folder as the patch: {folder}, and the model that it was "
            "trained on as the base."
        )
    if path.suffix == ".safetensors":
        return None
    if path.suffix in PICKLE_SUFFIXES:
        return f"is a pickle, which can run code and is never read. {CONVERSION}"
    if path.suffix in SIDE_SUFFIXES:
        return f"is a file of a model's folder, not its weights. Pass the folder: {folder}"
    return "is neither a safetensors nor a GGUF file. Pass a model's folder, or such a file."


def _below(folder: Path, name: str, there: Iterable[str]) -> str | None:
    """What lies one or two levels below a folder that holds no weights of any kind itself."""
    if any(Path(file).suffix in (".safetensors", GGUF_SUFFIX, *PICKLE_SUFFIXES) or file in KINDS for file in there):
        return None
    found: dict[str, list[str]] = {}
    folders = itertools.islice(itertools.chain(folder.glob("*/"), folder.glob("*/*/")), MOST_BELOW)
    for inner in folders:
        place = inner.relative_to(folder)
        kind = None if any(part.startswith(".") for part in place.parts) else _kind_of(inner)
        if kind is not None:
            found.setdefault(kind, []).append(str(place))
    if not found:
        return None
    lists = [
        f"{kind}: {', '.join(sorted(places)[:SHOWN_BELOW])}"
        + f" and {len(places) - SHOWN_BELOW} more" * (len(places) > SHOWN_BELOW)
        for kind, places in sorted(found.items())
    ]
    first = min(next(iter(found.values())))
    return f"is no model itself. Below it lie {'; '.join(lists)}. Pass one of them, such as {os.path.join(name, first)}"


def _kind_of(folder: Path) -> str | None:
    """What a folder holds, told by the names of its files."""
    try:
        there = _files_in(folder)
    except NotFoundError:
        return None
    for file, (kind, _) in KINDS.items():
        if file in there:
            return kind
    is_model = SINGLE_FILE in there or INDEX_FILE in there or any(file.endswith(GGUF_SUFFIX) for file in there)
    return "models" if is_model else None


def _inner_model(folder: Path, name: str) -> str | None:
    """The way into a folder that is no model itself, and holds the checkpoints of a training run."""
    steps = {
        int(match["step"]): child
        for child in folder.glob("checkpoint-*")
        if (match := _STEP.fullmatch(child.name)) is not None and child.is_dir()
    }
    if not steps:
        return None
    last = steps[max(steps)]
    kind = "an adapter: pass it as the patch" if (last / ADAPTER_FILE).is_file() else "a model: pass it"
    return f"is the folder of a training run. Its last checkpoint is {kind}: {name}/{last.name}"
