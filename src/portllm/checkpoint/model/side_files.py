"""The files that make a folder of weights a model: configuration, tokenizer, license; copied from another model."""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

from portllm.checkpoint.model.checkpoint import CONFIG_FILE
from portllm.errors import CheckpointError
from portllm.files.content import LFS_POINTER, mistaken
from portllm.files.input_file import MAX_BYTES, open_input
from portllm.files.json_file import read_config

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
HEAD_FILE = "value_head.safetensors"
"""A value head of reinforcement learning, as LLaMA-Factory saves and loads it beside a model or an adapter."""

NOT_COPIED = (".index.json", "README.md", "portllm.json")
"""An index and a manifest of other weights, and a model card that describes another model."""


def side_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to any model with the same architecture and tokenizer, sorted.

    Raises:
        CheckpointError: One of them is a link that leads out of the folder, other than to the hub's cache as
            huggingface_hub lays it out: a model from a stranger must not bring a secret of its user into the output.
    """
    files = sorted(
        file
        for file in folder.iterdir()
        if file.is_file()
        and not file.name.startswith(".")
        and (file.name == HEAD_FILE or not file.name.endswith(WEIGHT_SUFFIXES + NOT_COPIED))
    )
    for file in files:
        require_copyable(file)
    return files


def require_copyable(file: Path) -> None:
    """Raise CheckpointError if a file must not be copied from a folder that may be a stranger's; see `side_files`."""
    require_writable_name(file)
    if (why := why_uncopyable(file)) is not None:
        raise CheckpointError(f"'{file}': {why}")


def why_uncopyable(file: Path) -> str | None:
    """Why a file must not be copied, but for its name; None where it may be."""
    if (size := file.stat().st_size) > MAX_BYTES:
        return (
            f"has {size} bytes, and would be copied into the output; the limit for files beside the weights is "
            f"{MAX_BYTES}. Move it elsewhere."
        )
    target = file.resolve()
    if not any(target.is_relative_to(root) for root in _roots(file.parent.resolve())):
        return (
            f"is a link to '{target}', outside its folder, and would be copied into the output. Delete the link, or "
            "replace it with the file itself."
        )
    problem = _stand_in(file)
    return None if problem is None else f"would be copied into the output, and {problem}"


def _stand_in(file: Path) -> str | None:
    """What is copied in place of a file that a clone did not bring along; None for a file that is itself."""
    with open_input(file) as stream:
        head = stream.read(len(LFS_POINTER))
    return mistaken(head) if head == LFS_POINTER else None


def require_writable_name(file: Path) -> None:
    """Raise CheckpointError if the name of a file is no UTF-8, and can stand in no record."""
    try:
        file.name.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"'{file}': its name is not valid UTF-8 and cannot be recorded. Rename it, or move it elsewhere."
        ) from error


def _roots(folder: Path) -> tuple[Path, ...]:
    """The folder itself; for one that shows a commit in the hub's cache, also where the cache keeps its files."""
    return (folder, folder.parents[1] / "blobs") if folder.parent.name == "snapshots" else (folder,)


def copy_side_files(
    source: Path, folder: Path, *, config_changes: Mapping[str, object], leave_out: Collection[str] = ()
) -> None:
    """Copy them, with the given fields of `config.json` changed, or taken out where they are None.

    Without changes its bytes stay as they are. `dtype` goes where the file has it: under that name, or under the older
    `torch_dtype`.

    Raises:
        CheckpointError: As `side_files`.
    """
    for file in side_files(source):
        if file.name not in leave_out:
            shutil.copyfile(file, folder / file.name)
    if not config_changes or not (folder / CONFIG_FILE).is_file():
        return
    config = read_config(folder / CONFIG_FILE)
    for key, value in config_changes.items():
        if value is None:
            config.pop(key, None)
            continue
        config["torch_dtype" if key == "dtype" and "torch_dtype" in config else key] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
