"""Give a fleet's cells to workers, and gather what becomes of them; what can pass is tried again."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from portllm.fleets.plan import Cell, FleetRow
from portllm.fleets.storage import is_url, join
from portllm.workers.pool import Finished, Lost, Pool, Retries, work_through


def run_cells(
    cells: Sequence[Cell], pool: Pool, *, retries: int, note: Callable[[FleetRow], None], dry: bool = False
) -> tuple[FleetRow, ...]:
    """Do every cell, each by itself: one that fails stops no other.

    Args:
        cells: What to do, in this order.
        pool: Who does it.
        retries: How often a cell is tried again whose worker died, or whose failure may pass. Refusals never are.
        note: Told of every row as soon as it is final.
        dry: Only say what would be done.

    Returns:
        A row for each cell, in their order.
    """
    waiting, running = dict.fromkeys(range(len(cells))), set[int]()
    tried = Retries(retries)
    rows: dict[int, FleetRow] = {}

    def ready() -> Iterator[tuple[int, dict[str, object]]]:
        return ((number, cells[number].to_job(dry=dry)) for number in waiting if number not in running)

    for ended in work_through(pool, ready, running):
        del waiting[ended.number]
        if tried.again(ended):
            waiting[ended.number] = None  # behind the others, so that what passes has time to
            continue
        rows[ended.number] = _row(cells[ended.number], ended, tried.reasons(ended.number), dry=dry)
        note(rows[ended.number])
    return tuple(rows[number] for number in range(len(cells)))


def _row(cell: Cell, ended: Finished | Lost, attempts: tuple[str, ...], *, dry: bool) -> FleetRow:
    if isinstance(ended, Lost):
        return FleetRow(cell.folder, cell.key, "failed", reason=ended.reason, attempts=attempts)
    result = {name: value for name, value in ended.result.items() if name != "can_pass"}
    row = FleetRow(cell.folder, cell.key, attempts=attempts, **result)
    if row.status in ("done", "no") and not dry and not _is_here(cell, row):
        reason = (
            f"a worker wrote it on another machine, where '{cell.work.output}' is a different folder. Use a "
            "folder that all machines share, or a URL."
        )
        return FleetRow(cell.folder, cell.key, "failed", reason=reason, attempts=attempts)
    return row


def _is_here(cell: Cell, row: FleetRow) -> bool:
    place = join(cell.work.output, cell.folder)
    return is_url(place) or all(Path(place, name).exists() for name in row.records)
