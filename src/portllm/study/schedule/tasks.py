"""The sources of a study's tasks, by kind."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from blake3 import blake3

from portllm.errors import DataError
from portllm.evaluating.scoring import Scores, Task, Tick, score
from portllm.running.encoding import Encoder
from portllm.running.examples import Example, ExampleFormat, read_examples
from portllm.running.model import PeftModel, PreTrainedModel
from portllm.study.definition.settings import HarnessTask, RowsTask, TaskSettings
from portllm.study.parts.task import TaskSource

Row = TypeVar("Row")


def open_task(settings: TaskSettings, data: Path | None) -> TaskSource:
    """The source of a task's rows; files are read here and now, so that a study does not fail hours later.

    Args:
        settings: The task.
        data: The folder that its files lie in. A task of the harness whose name is no folder there comes from the hub.

    Raises:
        DataError: A file cannot be read, or its rows do not fit.
        MissingExtraError: The task is of lm-evaluation-harness, and that is not installed.
    """
    if isinstance(settings, HarnessTask):
        from portllm.evaluating.harness.source import HarnessRows

        here = data is not None and (data / settings.name).is_dir()
        return HarnessRows(**asdict(settings), data=data if here else None)
    return _Rows(settings, below(data, settings.train), below(data, settings.score))


def below(data: Path | None, name: str) -> Path:
    """A file of a study, below its data folder.

    Raises:
        DataError: It is not there.
    """
    file = Path(name) if data is None else data / name
    if not file.is_file():
        way = "Pass the folder that contains it with --data." if data is None else "Check --data."
        raise DataError(f"'{file}': does not exist. {way}")
    return file


def first(values: Sequence[Row], rows: int | None, file: Path) -> tuple[Row, ...]:
    """The first so many rows.

    Raises:
        DataError: There are fewer.
    """
    if rows is not None and len(values) < rows:
        raise DataError(
            f"'{file}': has {len(values)} rows, fewer than the {rows} that the study requests. Request fewer."
        )
    return tuple(values[:rows])


class _Rows:
    """Rows of the user's own files."""

    def __init__(self, settings: RowsTask, train: Path, held_out: Path) -> None:
        self._settings = settings
        fmt = ExampleFormat(prompt=settings.prompt, completion=settings.completion)
        n_rows = settings.train_rows
        rows = first(read_examples(train, fmt), None if n_rows is None else n_rows + settings.port_rows, train)
        self._train, self._port = rows[:n_rows], rows[len(rows) - settings.port_rows :]
        self._task = Task(
            examples=first(read_examples(held_out, fmt), settings.score_rows, held_out),
            kind=settings.judge,
            labels=settings.labels,
            max_tokens=settings.max_tokens,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )

    @property
    def n_rows(self) -> int:
        return len(self._task.examples)

    @property
    def longest(self) -> int:
        return self._task.longest

    @cached_property
    def identity(self) -> Mapping[str, object]:
        task = {name: value for name, value in asdict(self._task).items() if name not in ("examples", "batch_size")}
        return {"kind": "rows", "rows": digest_examples(self._task.examples), **task, "labels": list(self._task.labels)}

    def train_examples(self) -> Sequence[Example]:
        return self._train

    def port_prompts(self) -> Sequence[str]:
        return [example.prompt for example in self._port]

    def score(
        self, model: PreTrainedModel | PeftModel, encoder: Encoder, *, device: torch.device, tick: Tick
    ) -> Scores:
        return score(model, encoder, self._task, device=device, tick=tick)


def digest_examples(examples: Sequence[Example]) -> str:
    """A digest of prompts and completions in their order."""
    return blake3(repr([(example.prompt, example.completion) for example in examples]).encode()).hexdigest()
