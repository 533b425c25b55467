"""Run a study: missing steps are run in turn or in parallel on Ray, and recorded as soon as they are complete."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from portllm.errors import OutputExistsError
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json
from portllm.files.kept_results import Record
from portllm.files.own_files import locked_folder, require_real, write_text
from portllm.files.typed import decode
from portllm.progress import Progress, silent
from portllm.running.model import Device
from portllm.study.definition.estimate import Estimated, estimate
from portllm.study.definition.file import read_study
from portllm.study.definition.plan import Identities, Step
from portllm.study.definition.settings import Study
from portllm.study.results.rows import StudyResults
from portllm.study.results.table import tabulate
from portllm.study.schedule.cluster import open_cluster
from portllm.study.schedule.ledger import Ledger
from portllm.study.schedule.machine import describe_machine
from portllm.study.schedule.places import Places
from portllm.study.schedule.side_by_side import do_side_by_side
from portllm.study.schedule.work import StepRunner, open_inputs

LOCK_FILE = ".study.lock"
IDENTITIES = "inputs.json"
MACHINE = "machine.json"
RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step that has just been done, and how far the study is.

    Attributes:
        step: The step.
        record: What came of it.
        dropped: Names of steps whose outputs were removed, since no step that is left needs them.
        left: What is left.
    """

    step: Step
    record: Record
    dropped: tuple[str, ...]
    left: Estimated


def run_study(
    file: str | Path,
    *,
    out: str | Path | None = None,
    data: str | Path | None = None,
    device: Device = "auto",
    ray: str | None = None,
    workers: int | None = None,
    on_step: Callable[[StepReport], None] = lambda _: None,
    progress: Progress = silent,
) -> StudyResults:
    """Run the remaining steps of a study and return its results.

    A step is completed or not done at all; the next run of the same file starts with the first missing one. A step
    is run again if anything its result depends on has changed: settings, base, data, versions of programs.

    On Ray, independent steps run in parallel, each on its own device. The folder must then
    be reachable by all workers under the same path.

    Args:
        file: A TOML file; see `docs/study.md`.
        out: The folder for the results; by default, `default_folder(file)`.
        data: The folder with the study's data files.
        device: Device to train and run models on.
        ray: The address of a Ray cluster, as `ray.init` takes it, or None for this process alone.
        workers: Number of workers on Ray; None for one per GPU, or one per machine if there is none.
        on_step: Callback after each finished step.
        progress: Progress callback within a step.

    Returns:
        The results, also written to `results.json`.

    Raises:
        StudyFileError: The file is invalid.
        CheckpointError, DataError: The base or the data are missing or invalid.
        OutputExistsError: The folder exists and contains something else.
        OutputBusyError: Another run writes to the same folder.
        OutputError: The folder cannot be written to, or, on Ray, is not visible to a worker.
        StudyStepError: A step failed on a worker.
        MissingExtraError, WorkersError: There is no Ray, or no worker can be started.
    """
    study, out = _named(file, out)
    data = None if data is None else Path(data)
    with _locked(out):
        inputs = open_inputs(study, data, progress=progress)
        ledger = Ledger(study, Places(out), inputs.identities())
        _write(out / IDENTITIES, asdict(ledger.identities))
        _write(out / MACHINE, describe_machine())
        ledger.drop()  # a run that was killed may not have come to it

        def note(step: Step, record: Record, n_workers: int = 1) -> None:
            dropped, left = tuple(ledger.drop()), ledger.left()
            on_step(StepReport(step, record, dropped, estimate(left, ledger.seconds(), workers=n_workers)))
            if ray is not None:  # what goes on within a step is told to nobody here
                progress("study", len(ledger.steps) - len(left), len(ledger.steps), "steps")

        if ray is None:
            _do_in_turn(ledger, StepRunner(study, inputs, ledger.places, device, progress), note)
        elif ledger.left():
            with open_cluster(ray, ledger, data=data, device=device, workers=workers) as pool:
                do_side_by_side(ledger, pool, note=note)
        results = tabulate(study, ledger.results())
        _write(out / RESULTS, results.to_json())
    return results


def _do_in_turn(ledger: Ledger, work: StepRunner, note: Callable[[Step, Record], None]) -> None:
    """Do what is left in this process, one step after another."""
    while left := ledger.left():
        step = left[0]
        note(step, ledger.do(step, lambda step=step: work.do(step)))  # type: ignore[misc]


@dataclass(frozen=True, slots=True)
class StudyStatus:
    """Progress of a study.

    Attributes:
        study: The study.
        out: Its folder.
        n_steps: All its steps.
        seconds: That those which are done took.
        left: What is left.
    """

    study: Study
    out: Path
    n_steps: int
    seconds: float
    left: Estimated

    def __repr__(self) -> str:
        return f"StudyStatus({str(self.out)!r}, {len(self.left.steps)} of {self.n_steps} steps left)"


def study_status(file: str | Path, *, out: str | Path | None = None) -> StudyStatus:
    """Report the progress of a study from its folder alone; data and base are assumed to be those of the last run.

    Raises:
        StudyFileError: The file is invalid.
    """
    study, out = _named(file, out)
    ledger = Ledger(study, Places(out), study_identities(out))
    seconds = ledger.seconds()
    return StudyStatus(study, out, len(ledger.steps), sum(seconds.values()), estimate(ledger.left(), seconds))


def study_results(file: str | Path, *, out: str | Path | None = None) -> StudyResults:
    """Return the results of the finished steps, whatever the program versions that computed them.

    Raises:
        StudyFileError: The file is invalid.
    """
    study, out = _named(file, out)
    return tabulate(study, Ledger(study, Places(out), study_identities(out), any_version=True).results())


def _named(file: str | Path, out: str | Path | None) -> tuple[Study, Path]:
    """The study in a file, and the folder of its results."""
    return read_study(Path(file)), default_folder(Path(file)) if out is None else Path(out)


def default_folder(file: Path) -> Path:
    """The folder of a study's results: in the current one, named as the file.

    Example:
        >>> default_folder(Path("studies/smollm2-cpu.toml")).as_posix()
        'smollm2-cpu.study'
    """
    return Path(f"{file.stem}.study")


def study_identities(out: Path) -> Identities:
    """What the results in a folder came from, as its last run noted it; of nothing where none did."""
    try:
        return decode(Identities, parse_json(read_input(out / IDENTITIES)))
    except (OSError, ValueError):
        return Identities("", {})  # nothing has been run, or nobody knows with what: no record is of these


def _write(file: Path, values: object) -> None:
    write_text(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs on this machine from writing to the same folder."""
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK_FILE).exists():
        raise OutputExistsError(f"'{out}': already exists and is not a study's folder. Choose another with --output.")
    with locked_folder(out, LOCK_FILE):
        for name in os.listdir(out):
            require_real(out, name)
        yield
