"""Run a study: what is missing is done, one step after another, and noted as soon as it is whole."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from portllm.checkpoint.staging import open_locked
from portllm.errors import OutputError, OutputExistsError
from portllm.kept import Record
from portllm.live.model import Device
from portllm.progress import Progress, silent
from portllm.study.estimate import Estimated, estimate
from portllm.study.file import read_study
from portllm.study.ledger import Ledger
from portllm.study.plan import Identities, Step
from portllm.study.settings import Study
from portllm.study.table import Results, tabulate
from portllm.study.work import Work, open_inputs

LOCK_FILE = ".study.lock"
IDENTITIES = "inputs.json"
RESULTS = "results.json"


@dataclass(frozen=True, slots=True)
class Told:
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
    file: Path,
    *,
    out: Path | None = None,
    data: Path | None = None,
    device: Device = "auto",
    on_step: Callable[[Told], None] = lambda _: None,
    progress: Progress = silent,
) -> Results:
    """Do the steps of a study that have not been done.

    A step is done whole or not at all; the next run of the same file begins with the first that is missing. One is done
    again where anything that its result depends on has changed: settings, base, data, versions of programs.

    Args:
        file: A TOML file; see `docs/study.md`.
        out: The folder of the results; without it, `default_folder(file)`.
        data: The folder that the study's data files lie in.
        device: Where models are trained and run.
        on_step: Told of each step when it is done.
        progress: Told of what goes on within a step.

    Returns:
        The results, which also are in `results.json`.

    Raises:
        StudyFileError: The file is wrong.
        CheckpointError, DataError: The base or the data are not there, or do not fit.
        OutputExistsError: The folder is there and holds something else.
        OutputBusyError: Another run writes to the same folder.
        OutputError: The folder cannot be written to.
    """
    study = read_study(file)
    out = out or default_folder(file)
    with _locked(out):
        inputs = open_inputs(study, data, progress=progress)
        ledger = Ledger(study, out, inputs.identities())
        _write(out / IDENTITIES, asdict(ledger.identities))
        work = Work(study, inputs, ledger, device, progress)
        ledger.drop()  # a run that was killed may not have come to it
        while left := ledger.left():
            record = ledger.do(left[0], lambda step=left[0]: work.do(step))  # type: ignore[misc]
            dropped = tuple(ledger.drop())
            on_step(Told(left[0], record, dropped, estimate(ledger.left(), ledger.seconds())))
        results = tabulate(study, ledger.results())
        _write(out / RESULTS, results.to_json())
    return results


@dataclass(frozen=True, slots=True)
class Status:
    """How far a study is.

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


def study_status(file: Path, *, out: Path | None = None) -> Status:
    """How far a study is, from its folder alone: data and base are taken to be those of the last run.

    Raises:
        StudyFileError: The file is wrong.
    """
    study, out = read_study(file), out or default_folder(file)
    ledger = Ledger(study, out, study_identities(out))
    seconds = ledger.seconds()
    return Status(study, out, len(ledger.steps), sum(seconds.values()), estimate(ledger.left(), seconds))


def study_results(file: Path, *, out: Path | None = None) -> Results:
    """The results of the steps that are done, whatever the versions of the programs that did them.

    Raises:
        StudyFileError: The file is wrong.
    """
    study, out = read_study(file), out or default_folder(file)
    return tabulate(study, Ledger(study, out, study_identities(out), any_version=True).results())


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
        values = json.loads((out / IDENTITIES).read_text(encoding="utf-8"))
        return Identities(values["base"], values["data"])
    except (OSError, ValueError, TypeError, KeyError):
        return Identities("", {})  # nothing has been run, or nobody knows with what: no record is of these


def _write(file: Path, values: object) -> None:
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(file)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Keep other runs on this machine from writing to the same folder."""
    if out.is_dir() and any(out.iterdir()) and not (out / LOCK_FILE).exists():
        raise OutputExistsError(f"'{out}': is there already, and is no study's folder. Name another with --output.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = open_locked(out / LOCK_FILE, wait=False)
    except OSError as error:
        raise OutputError(f"'{out}': cannot be written to: {error.strerror}.") from error
    try:
        yield
    finally:
        os.close(descriptor)
