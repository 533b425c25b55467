"""A fleet: many patches ported to many evolved models; planned from its file, run and resumed.

The work is done by processes of this machine or by Ray; see `portllm.workers.pool`.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from msgspec import structs

from portllm.files.own_files import locked_folder
from portllm.fleets.cell import RECORDS, CellWorker
from portllm.fleets.file import read_fleet_file
from portllm.fleets.inputs import find_inputs
from portllm.fleets.plan import Cell, FleetRow, FleetWork, Todo, cells_of, decide, stranger
from portllm.fleets.processes import MEMORY, Processes, fitting_workers
from portllm.fleets.run import run_cells
from portllm.fleets.state import State, read_state
from portllm.fleets.storage import digests, is_url, join, resolve, sizes
from portllm.progress import Progress, silent
from portllm.workers.pool import Pool

T = TypeVar("T")

RETRIES = 2
LOCK_FILE = ".fleet.lock"


@dataclass(frozen=True, slots=True)
class FleetPlan:
    """What a fleet's file comes to now.

    Attributes:
        work: What is done in every cell.
        cells: Every patch with every evolved model.
        todo: What is to be done about each cell.
        rows: What earlier runs noted, by cell.
    """

    work: FleetWork
    cells: tuple[Cell, ...]
    todo: tuple[Todo, ...]
    rows: dict[str, FleetRow]

    def chosen(self, todo: Todo) -> tuple[Cell, ...]:
        """The cells about which this is to be done."""
        return tuple(cell for cell, what in zip(self.cells, self.todo, strict=True) if what == todo)


def plan_fleet(file: Path, *, overwrite: bool = False) -> FleetPlan:
    """Find the patches, identify the models, and see what earlier runs have done.

    Args:
        file: The fleet's file.
        overwrite: Whether outputs may be replaced that no run for these inputs wrote.

    Raises:
        FleetFileError: The file is wrong, or what it names is not there, with every problem.
        StorageError: The output's place cannot be read.
    """
    asked = read_fleet_file(file)
    patches, evolved, base = find_inputs(asked)
    work = FleetWork(base, asked.steps, asked.options, resolve(asked.output, file.resolve().parent))
    cells = cells_of(patches, evolved, work)
    rows = read_state(work.output)
    files = _by_folder(sizes(work.output))
    records = _by_folder(digests(work.output, _records(files, work.steps)))
    todo = tuple(
        decide(
            cell,
            rows.get(cell.folder),
            files=files.get(cell.folder, {}),
            records=records.get(cell.folder, {}),
            overwrite=overwrite,
        )
        for cell in cells
    )
    return FleetPlan(work, cells, todo, rows)


def forecast_fleet(
    plan: FleetPlan, pool: Pool, *, retries: int = RETRIES, progress: Progress = silent
) -> tuple[FleetRow, ...]:
    """What running a plan would do, from headers alone: a row for each cell; nothing is written."""
    rows = _settled(plan)
    count = _Count(plan, progress)
    rows |= {row.folder: row for row in run_cells(plan.chosen("run"), pool, retries=retries, note=count, dry=True)}
    return tuple(rows[cell.folder] for cell in plan.cells)


def run_fleet(
    plan: FleetPlan, pool: Pool, *, retries: int = RETRIES, progress: Progress = silent
) -> tuple[FleetRow, ...]:
    """Carry out a plan, and keep `fleet.json` in its output's root.

    Args:
        plan: What to do.
        pool: Who does it.
        retries: Retries of a cell whose worker died or whose failure may be temporary.
        progress: Progress callback (finished cells).

    Returns:
        What became of each cell, those of earlier runs with them.

    Raises:
        OutputBusyError: Another run writes to the same output.
        WorkersError: No worker can be started.
        StorageError: The state cannot be written.
    """
    output = plan.work.output
    with contextlib.nullcontext() if is_url(output) else locked_folder(Path(output), LOCK_FILE):
        rows = _settled(plan)
        # What is noted as waiting is ours, should this run die after it wrote an output and before it noted that.
        waiting = {cell.folder: FleetRow(cell.folder, cell.key) for cell in plan.chosen("run")}
        state = State(output, (plan.rows | waiting).values())
        count = _Count(plan, progress)

        def note(row: FleetRow) -> None:
            state.note(row)
            count(row)

        try:
            rows |= {row.folder: row for row in run_cells(plan.chosen("run"), pool, retries=retries, note=note)}
        finally:
            state.write()
    return tuple(rows[cell.folder] for cell in plan.cells)


def fleet(
    file: str | Path,
    *,
    workers: int | None = None,
    ray: str | None = None,
    retries: int = RETRIES,
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[FleetRow, ...]:
    """Port many patches to many evolved models, as described in a file; a second run does only what is missing.

    Args:
        file: A TOML file; see `docs/fleet.md`.
        workers: Number of workers; None for what cores and memory of this machine allow, or one per core on Ray.
        ray: The address of a Ray cluster, as `ray.init` takes it, or None for processes of this machine.
        retries: Retries of a cell whose worker died or whose failure may be temporary.
        overwrite: Replace outputs that were not made from these inputs.
        progress: Progress callback (finished cells).

    Returns:
        The outcome of each cell. A failing cell does not stop the others and raises nothing.

    Raises:
        FleetFileError: The file is invalid, or something it names does not exist.
        MissingExtraError: Ray, or the file system of a URL, is not installed.
        OutputBusyError, StorageError, WorkersError: As `run_fleet`.
    """
    plan = plan_fleet(Path(file), overwrite=overwrite)
    with open_pool(plan, workers=workers, ray=ray) as pool:
        return run_fleet(plan, pool, retries=retries, progress=progress)


def open_pool(plan: FleetPlan, *, workers: int | None, ray: str | None) -> Pool:
    """The workers for a plan; see `fleet`."""
    n_jobs = len(plan.chosen("run"))
    if ray is None:
        return Processes(workers or fitting_workers(plan.work.steps, n_jobs))
    from portllm.workers.on_ray import ClusterRequest, Machine, OnRay

    def share(machines: Sequence[Machine]) -> ClusterRequest:
        """A core for each."""
        cores = sum(machine.cores for machine in machines)
        memory = max(MEMORY[step] for step in plan.work.steps)
        return ClusterRequest(max(1, min(workers or cores, n_jobs)), memory=memory)

    return OnRay(ray, CellWorker, share, own_cores=workers)


def _records(files: Mapping[str, Mapping[str, int]], steps: Sequence[str]) -> list[str]:
    """The records that are there, by their names below the output's root."""
    names = [join(step, RECORDS[step]) for step in steps]
    return [join(folder, name) for folder, inside in files.items() for name in names if name in inside]


def _by_folder(found: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """What was found below the output's root, by cell."""
    grouped: dict[str, dict[str, T]] = {}
    for name, fact in found.items():
        parts = name.split("/", 2)
        if len(parts) == 3:
            grouped.setdefault(f"{parts[0]}/{parts[1]}", {})[parts[2]] = fact
    return grouped


def _settled(plan: FleetPlan) -> dict[str, FleetRow]:
    """The rows of cells about which nothing is done."""
    kept = {cell.folder: structs.replace(plan.rows[cell.folder], kept=True) for cell in plan.chosen("keep")}
    return kept | {cell.folder: stranger(cell, plan.rows.get(cell.folder)) for cell in plan.chosen("refuse")}


class _Count:
    """Tells the progress of the cells that have come to an end."""

    def __init__(self, plan: FleetPlan, progress: Progress) -> None:
        self._total, self._progress = len(plan.cells), progress
        self._done, self._failed = self._total - len(plan.chosen("run")), len(plan.chosen("refuse"))

    def __call__(self, row: FleetRow) -> None:
        self._done += 1
        self._failed += row.status in ("refused", "failed")
        label = f"fleet: {self._failed} failed" if self._failed else "fleet"
        self._progress(label, self._done, self._total, "cells")
