"""Rows of a task from local JSONL files, in the shape that the task's own data set has on the hub.

A folder has a subfolder for each task, with `train.jsonl`, `validation.jsonl` and, for some, `test.jsonl`: one object
a line, fields named as on the hub. What the harness says about a task stays as it is; only where its rows come from is
replaced.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from portllm.errors import DataError
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json

TRAIN, VALIDATION, TEST = "train.jsonl", "validation.jsonl", "test.jsonl"

Row = dict[str, object]


def local_source(config: Mapping[str, object], rows: Path, place: Path) -> dict[str, object]:
    """The keys of a task file that make the harness read local rows; the rows, in the hub's shape, are written.

    Args:
        config: The task file of the harness.
        rows: Folder of the task's JSONL files.
        place: Empty folder for what the harness reads.

    Raises:
        DataError: The rows that the task scores are not there, or a line is no JSON object.
    """
    files: dict[str, Path] = {}
    train = rows / TRAIN
    # A split of the hub that a task names, and the file that stands for it.
    if train.is_file():
        files |= dict.fromkeys(_splits(config, "training_split", "fewshot_split"), train)
    if config.get("validation_split") is not None:
        files |= dict.fromkeys(_splits(config, "validation_split"), rows / VALIDATION)
    for split in _splits(config, "test_split"):
        files[split] = rows / TEST if (rows / TEST).is_file() else rows / VALIDATION
    written = {split: str(_write(file, place / f"{split}.jsonl")) for split, file in files.items()}
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": written, "cache_dir": str(place / "cache"), "keep_in_memory": True},
        **({} if train.is_file() else {"training_split": None, "fewshot_split": None}),
    }


def hub_row(row: Row) -> Row:
    """The row as the hub has it: BoolQ's `answer`, true or false, is `label`, 1 or 0, in SuperGLUE.

    Example:
        >>> hub_row({"question": "is it", "passage": "It is.", "answer": True})
        {'question': 'is it', 'passage': 'It is.', 'label': 1}
    """
    if "label" in row or not isinstance(row.get("answer"), bool):
        return row
    return {**{name: value for name, value in row.items() if name != "answer"}, "label": int(bool(row["answer"]))}


def _splits(config: Mapping[str, object], *keys: str) -> list[str]:
    return [str(config[key]) for key in keys if config.get(key) is not None]


def _write(source: Path, out: Path) -> Path:
    try:
        lines = read_input(source).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise DataError(
            f"'{source}': cannot be read: {error}. Expected one folder per task with {TRAIN} and {VALIDATION}."
        ) from error
    made = [json.dumps(hub_row(_parsed(line, source, number))) for number, line in enumerate(lines, 1) if line.strip()]
    if not made:
        raise DataError(f"'{source}': has no rows; expected one JSON object per line.")
    out.write_text("\n".join(made) + "\n", encoding="utf-8")
    return out


def _parsed(line: bytes, source: Path, number: int) -> Row:
    try:
        row = parse_json(line, infinities=True)
    except ValueError as error:
        raise DataError(f"'{source}', line {number}: is not valid JSON: {error}. Correct the line.") from error
    if not isinstance(row, dict):
        raise DataError(f"'{source}', line {number}: is not a JSON object. Correct the line.")
    return row
