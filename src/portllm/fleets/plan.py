"""Which cells a fleet has, and which of them are still to be done: values in, values out, nothing is touched.

A cell is one patch and one evolved model. Its key is a digest of all that its result depends on, so that a result can
be kept for as long as it is the one that the file asks for.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec
from blake3 import blake3

from portllm.files.record import Recorded

FORMAT = 1
"""Version of what a key covers; a key of another version fits nothing."""

Todo: TypeAlias = Literal["run", "keep", "refuse"]


@dataclass(frozen=True, slots=True)
class PatchEntry:
    """A patch of the fleet.

    Attributes:
        name: Its own, and that of its folder in the output.
        place: Where it is.
        identity: A digest of what it holds.
        n_bytes: Of its files.
    """

    name: str
    place: str
    identity: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A model of the fleet.

    Attributes:
        name: That of its folder in the output.
        said: What the fleet's file calls it; stands in the records of ported patches.
        place: How it is opened.
        fingerprint: Its identity.
        n_bytes: Of its tensors.
    """

    name: str
    said: str
    place: str
    fingerprint: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class FleetWork:
    """What is done in every cell.

    Attributes:
        base: The model that the patches belong to, where it is given.
        steps: `check`, `port`, `merge`.
        options: Of each step, by its name.
        output: A folder or URL; below it lie a folder for each evolved model and in these one for each patch.
    """

    base: ModelEntry | None
    steps: tuple[str, ...]
    options: Mapping[str, Mapping[str, object]]
    output: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A patch, an evolved model, and what is done for them.

    Attributes:
        patch: The patch.
        evolved: The evolved model.
        work: What is done.
        key: A digest of all that the result depends on.
    """

    patch: PatchEntry
    evolved: ModelEntry
    work: FleetWork = field(repr=False)
    key: str

    @property
    def folder(self) -> str:
        """Its folder, below the output's root; also what messages call it."""
        return f"{self.evolved.name}/{self.patch.name}"

    def to_job(self, *, dry: bool) -> dict[str, object]:
        """What a worker is told, as JSON values."""
        return {
            "folder": self.folder,
            "patch": {"name": self.patch.name, "place": self.patch.place},
            "evolved": asdict(self.evolved),
            "base": None if self.work.base is None else asdict(self.work.base),
            "steps": list(self.work.steps),
            "options": self.work.options,
            "output": self.work.output,
            "dry": dry,
        }


class FleetRow(Recorded, frozen=True, omit_defaults=False):
    """The outcome of one cell of a fleet.

    Attributes:
        folder: The cell's.
        key: The cell's, when this became of it.
        status: `waiting` to be done; `done`; `no` where the check's verdict is that the patch will not hold, so that
            nothing else was done; `refused`, with the reasons; `failed` otherwise.
        facts: What each step found, by its name.
        files: The files written, below the cell's folder, with their bytes.
        records: The digests of those that vouch for the others.
        reason: Why it was refused, failed, or will not hold.
        attempts: Why it had to be tried again, each time.
        seconds: Of the last attempt.
        kept: Whether this is an earlier run's.
    """

    folder: str
    key: str
    status: Literal["waiting", "done", "no", "refused", "failed"] = "waiting"
    facts: Mapping[str, Mapping[str, Any]] = msgspec.field(default_factory=dict)
    files: Mapping[str, int] = msgspec.field(default_factory=dict)
    records: Mapping[str, str] = msgspec.field(default_factory=dict)
    reason: str | None = None
    attempts: tuple[str, ...] = ()
    seconds: float = 0.0
    kept: bool = False

    def __repr__(self) -> str:
        return f"FleetRow({self.folder!r}, {self.status!r})"

    @property
    def holds(self) -> bool:
        """Whether the check's verdict is that the patch holds, where it was checked."""
        return bool(self.facts.get("check", {}).get("verdict", "holds") == "holds")


def cells_of(patches: Sequence[PatchEntry], evolved: Sequence[ModelEntry], work: FleetWork) -> tuple[Cell, ...]:
    """Every patch with every evolved model; the cells of one model follow each other, so that it is opened once."""
    return tuple(Cell(patch, model, work, _key(patch, model, work)) for model in evolved for patch in patches)


def _key(patch: PatchEntry, evolved: ModelEntry, work: FleetWork) -> str:
    inputs = [
        FORMAT,
        patch.identity,
        (evolved.said, evolved.fingerprint),
        None if work.base is None else (work.base.said, work.base.fingerprint),
        work.steps,
        [(step, sorted(work.options[step].items())) for step in sorted(work.options)],
    ]
    return blake3(repr(inputs).encode()).hexdigest(16)


def decide(
    cell: Cell, row: FleetRow | None, *, files: Mapping[str, int], records: Mapping[str, str], overwrite: bool
) -> Todo:
    """What is to be done about a cell.

    Args:
        cell: The cell.
        row: What an earlier run noted about it.
        files: The files in its folder, with their bytes.
        records: The digests of those files that vouch for the others.
        overwrite: Whether a stranger's output may be replaced.

    Returns:
        `keep` where it is done with these inputs and its files are there as they were written; `refuse` where files
        are there that an earlier run did not write for these inputs; else `run`.
    """
    if row is not None and row.key == cell.key:
        whole = all(files.get(name) == size for name, size in row.files.items())
        vouched = all(records.get(name) == digest for name, digest in row.records.items())
        return "keep" if row.status in ("done", "no") and whole and vouched else "run"
    return "refuse" if files and not overwrite else "run"


def stranger(cell: Cell, row: FleetRow | None) -> FleetRow:
    """The row of a cell whose folder holds what was not written for these inputs."""
    found = (
        "the existing output was made from other inputs or options" if row is not None else "the output already exists"
    )
    return FleetRow(
        cell.folder, cell.key, "refused", reason=f"{found}. Pass --overwrite to replace it, or choose another path."
    )
