"""The TOML file that describes a study: read and checked at once, every problem with its line and key."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from portllm.errors import StudyFileError
from portllm.files.toml_file import read_toml, told
from portllm.files.toml_text import meant
from portllm.files.typed import Tell, read_table
from portllm.study.definition.paper import published
from portllm.study.definition.settings import EVOLUTIONS, Evolution, HarnessTask, RowsTask, Study, TaskSettings, Text
from portllm.study.parts.ported_by import PortedBy
from portllm.training.settings import TrainSettings

TASKS: Mapping[str, type[TaskSettings]] = {"rows": RowsTask, "harness": HarnessTask}

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


def read_study(file: Path) -> Study:
    """Read and check a study's file. What it names, data and models, is looked for when the study is run.

    Raises:
        StudyFileError: It cannot be read, is not TOML, or says what a study cannot be; with every problem.
    """
    text, values = read_toml(file, kind="study", error=StudyFileError)
    problems: list[tuple[tuple[str, ...], str]] = []
    study = _read(values, lambda path, problem: problems.append((path, problem)))
    if study is None or problems:
        raise StudyFileError(told(file, text, problems))
    return study


def _read(values: Mapping[str, Any], tell: Tell) -> Study | None:
    # What is wrong has been told, and stands here as something right, so that the rest is looked at too.
    tasks = {name: _read_task(table, ("tasks", name), tell) for name, table in _named(values, "tasks", tell)}
    evolutions = {
        name: _read_evolution(table, ("evolutions", name), tell) for name, table in _named(values, "evolutions", tell)
    }
    named = {name: task for name, task in tasks.items() if task is not None}
    parts = {
        "patch": _read_patch(values.get("patch", {}), tell) or TrainSettings(),
        "tasks": named,
        "evolutions": {name: evolution for name, evolution in evolutions.items() if evolution is not None},
    }
    _check(values, named, tell)
    return read_table(Study, {key: value for key, value in values.items() if key not in parts}, (), tell, **parts)


def _named(values: Mapping[str, Any], key: str, tell: Tell) -> list[tuple[str, Any]]:
    """The tables below a key, whose names become names of files."""
    tables = values.get(key)
    if not isinstance(tables, Mapping) or not tables:
        tell((key,), f"is required: one or more tables [{key}.NAME]")
        return []
    for name in tables:
        if not _NAME.fullmatch(name):
            tell((key, name), "is not a valid name; expected lowercase letters, digits and hyphens")
    return list(tables.items())


def _read_task(table: object, path: tuple[str, ...], tell: Tell) -> TaskSettings | None:
    found = _kind(TASKS, table, path, tell)
    return None if found is None else read_table(TASKS[found[0]], found[1], path, tell)


def _read_patch(table: object, tell: Tell) -> TrainSettings | None:
    if isinstance(table, Mapping) and "seed" in table:
        tell(("patch", "seed"), "unknown key; patches are trained with each of 'seeds'")
    return read_table(TrainSettings, table, ("patch",), tell)


def _kind(
    kinds: Mapping[str, object], table: object, path: tuple[str, ...], tell: Tell
) -> tuple[str, dict[str, Any]] | None:
    """The kind that a table says it is of, and its other keys."""
    rest = dict(table) if isinstance(table, Mapping) else {}
    kind = rest.pop("kind", None)
    if not isinstance(kind, str) or kind not in kinds:
        shown = " or ".join(f"'{name}'" for name in kinds)
        tell((*path, "kind"), f"is {kind!r}; expected {shown}" if kind is not None else f"is required: {shown}")
        return None
    return kind, rest


def _read_evolution(table: object, path: tuple[str, ...], tell: Tell) -> Evolution | None:
    found = _kind(EVOLUTIONS, table, path, tell)
    if found is None:
        return None
    kind, rest = found
    own = {field.name for field in dataclasses.fields(Evolution)} - {"settings"}
    cls = EVOLUTIONS[kind]
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in sorted(set(rest) - own - set(fields)):
        tell((*path, key), f"unknown key. {meant(key, [*sorted(own), *fields])}")
        del rest[key]
    settings = read_table(cls, {key: rest[key] for key in rest if key not in own}, path, tell)
    new_text = rest.pop("new_text", None)
    text = None if new_text is None else read_table(Text, new_text, (*path, "new_text"), tell)
    mine = {key: rest[key] for key in rest if key in own}
    return read_table(Evolution, mine, path, tell, settings=settings or cls(), new_text=text)


def _method_problems(method: object, tasks: Mapping[str, TaskSettings]) -> Iterator[str]:
    """What is wrong with a method, and with its tasks' prompts."""
    try:
        by = PortedBy.read(str(method))
    except ValueError as error:
        yield str(error)
        return
    if by.is_drawn:
        without = [f"[tasks.{name}]" for name, task in tasks.items() if not isinstance(task, RowsTask)]
        if without:
            yield f"'{method}': prompts are drawn through a template, and there is none in {', '.join(without)}"
    elif by.reads_prompts:
        wanted = by.n_prompts or 1
        without = [f"[tasks.{name}]" for name, task in tasks.items() if task.port_rows < wanted]
        if without:
            wanted_rows = f"'port_rows', {wanted} or more," if by.n_prompts else "'port_rows'"
            yield f"method '{method}' reads prompts; pass {wanted_rows} in {', '.join(without)}"


def _check(values: Mapping[str, Any], tasks: Mapping[str, TaskSettings], tell: Tell) -> None:
    """What types do not say; values of a wrong type are left to `read_table`."""
    methods = values.get("methods")
    for method in methods if isinstance(methods, list) else []:
        for problem in _method_problems(method, tasks):
            tell(("methods",), problem)
    seeds, again = values.get("seeds"), values.get("retrain_seeds")
    if isinstance(again, list):
        for seed in again:
            if seed in (seeds if isinstance(seeds, list) else [0]):
                tell(("retrain_seeds",), f"seed {seed} is one of 'seeds', of which patches are retrained anyway")
    tables = values.get("compare")
    for table in tables if isinstance(tables, list) else [tables]:
        if isinstance(table, str) and table not in published():
            tell(("compare",), f"is '{table}', which is not a published table. {meant(table, published())}")
