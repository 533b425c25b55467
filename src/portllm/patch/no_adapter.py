"""What lies at a place where an adapter was expected, and what to pass instead. Looks at names of files, opens none."""

import os
import re
from pathlib import Path

from portllm.checkpoint.folder import PICKLE_SUFFIXES
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX, INDEX_FILE, SINGLE_FILE
from portllm.patch.record import PATCH_FILES

CONFIG_FILE, TENSOR_FILE = PATCH_FILES
MERGE_FILE = "portllm.json"
"""What a merge leaves beside the model that it writes."""

GGUF_WAY = (
    "is an adapter in GGUF, for llama.cpp, whose names and axes differ from PEFT's. Pass the PEFT folder that it was "
    "converted from (by convert_lora_to_gguf.py)."
)

_STEP = re.compile(r"checkpoint-(\d+)")


def why_no_adapter(path: Path, name: str) -> str:
    """What a place is that is no adapter folder, with the way to one.

    Args:
        path: A file, or a folder without `adapter_config.json`.
        name: As the user gave it.
    """
    if os.path.isfile(path):
        return _of_file(path, name)
    if (last := last_step(path, CONFIG_FILE)) is not None:
        return f"is the folder of a training run. Pass one of its checkpoints, such as the last one: {name}/{last}"
    inner = next((child.parent.name for child in sorted(path.glob(f"*/{CONFIG_FILE}"))), None)
    if inner is not None:
        return (
            f"has no {CONFIG_FILE}, so it is not an adapter folder. Its subfolder '{inner}' is one: pass {name}/{inner}"
        )
    there = {entry.name for entry in path.iterdir() if entry.is_file()}
    if MERGE_FILE in there:
        return (
            f"is a model that a patch was merged into ({MERGE_FILE} says so), not the patch. Pass the patch itself: "
            "every command takes it unmerged."
        )
    if there & {SINGLE_FILE, INDEX_FILE, "pytorch_model.bin", "pytorch_model.bin.index.json"}:
        return (
            "is a model, not an adapter. To make a patch of what it learned: portllm capture --base BASE --tuned "
            f"{name} -o PATCH, where BASE is the model that it was trained from."
        )
    if any(file.endswith(GGUF_SUFFIX) for file in there):
        return GGUF_WAY
    return f"has no {CONFIG_FILE}, so it is not an adapter folder. Pass the folder that PEFT's save_pretrained wrote."


def _of_file(path: Path, name: str) -> str:
    folder = Path(name).parent
    if (path.parent / CONFIG_FILE).is_file():
        return f"is a file of an adapter. Pass its folder: {folder}"
    if path.suffix == GGUF_SUFFIX:
        return GGUF_WAY
    if path.suffix in PICKLE_SUFFIXES:
        return (
            "is a pickle, which can run code and is never read. A patch is a folder with "
            f"{CONFIG_FILE} and {TENSOR_FILE}: load the adapter with the program that made it, and save_pretrained it."
        )
    return f"is a file. A patch is a folder with {CONFIG_FILE} and {TENSOR_FILE}: pass that."


def last_step(path: Path, holding: str) -> str | None:
    """The subfolder of a training run's last checkpoint that holds a file; None where there is none."""
    steps = [child.parent.name for child in path.glob(f"checkpoint-*/{holding}") if _STEP.fullmatch(child.parent.name)]
    return max(steps, key=lambda step: int(step.partition("-")[2]), default=None)
