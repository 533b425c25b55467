"""The files that make a folder of weights a model: configuration, tokenizer, license; copied from another model."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from portllm.checkpoint.reader import CONFIG_FILE, read_json

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz")
NOT_COPIED = (".index.json", "README.md", "portllm.json")
"""An index and a manifest of other weights, and a model card that describes another model."""


def side_files(folder: Path) -> list[Path]:
    """The files of a model's folder that belong to any model with the same architecture and tokenizer, sorted."""
    return sorted(
        file
        for file in folder.iterdir()
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(WEIGHT_SUFFIXES + NOT_COPIED)
    )


def copy_side_files(source: Path, folder: Path, *, config_changes: Mapping[str, object]) -> None:
    """Copy them, with the given fields of `config.json` changed; without changes its bytes stay as they are.

    `dtype` goes where the file has it: under that name, or under the older `torch_dtype`.
    """
    for file in side_files(source):
        shutil.copyfile(file, folder / file.name)
    if not config_changes or not (folder / CONFIG_FILE).is_file():
        return
    config = read_json(folder / CONFIG_FILE)
    for key, value in config_changes.items():
        config["torch_dtype" if key == "dtype" and "torch_dtype" in config else key] = value
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
