"""Several patches at once: which folders the PATCH arguments of a command stand for, and what becomes of each.

`port`, `check` and `merge` take one or more PATCH arguments. One that is no adapter itself, but holds folders that are,
stands for these. What several patches become is written into one folder, in a subfolder for each, named like the
patch's own folder; a single patch that is named itself is written to the output itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from portllm.checkpoint.model.hub_names import names_hub
from portllm.errors import PatchError, PortLLMError
from portllm.files.own_files import ignores_case
from portllm.patch.adapter_folder import CONFIG_FILE, AdapterOpener
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

T = TypeVar("T")
U = TypeVar("U")
K = TypeVar("K")
Where = TypeVar("Where", str, Path)
"""How an output folder is named: each result is found under the name that was given."""


@dataclass(frozen=True, slots=True)
class PatchFolders:
    """The patches that a command was given.

    Attributes:
        folders: Each patch's folder, or its name on the hub.
        is_single: One patch was named itself, so that the output is what becomes of it.
    """

    folders: tuple[Path, ...]
    is_single: bool

    def outputs(self, out: Path) -> tuple[Path, ...]:
        """Where what becomes of each patch is written.

        Raises:
            PatchError: Two patches' folders have the same name.

        Example:
            >>> found = PatchFolders((Path("team/triage"), Path("org/billing@main")), is_single=False)
            >>> [str(path) for path in found.outputs(Path("out"))]
            ['out/triage', 'out/billing']
        """
        if self.is_single:
            return (out,)
        names = [_name_of(folder) for folder in self.folders]
        letters = str.casefold if ignores_case(out) else str
        for name, count in Counter(map(letters, names)).items():
            if count > 1:
                same = " and ".join(f"'{folder}'" for folder in self.folders if letters(_name_of(folder)) == name)
                raise PatchError(
                    f"{same}: would both be written to '{out / name}'. Rename one, or run them separately."
                )
        return tuple(out / name for name in names)


@dataclass(frozen=True, slots=True)
class Outcome(Generic[T]):
    """What became of one patch of several.

    Attributes:
        folder: The patch's.
        value: What the work gave, or None where it failed.
        error: Why it failed, or None.
    """

    folder: Path
    value: T | None
    error: PortLLMError | None = None

    def result(self) -> T:
        """What the work gave.

        Raises:
            PortLLMError: Why it failed.
        """
        if self.value is None:
            raise self.error or AssertionError("an outcome without a value has an error")
        return self.value

    def followed_by(self, done: U | PortLLMError | None) -> "Outcome[tuple[T, U | None]]":
        """This with what came of it next: None where that was left out, or an error."""
        if isinstance(done, PortLLMError):
            return Outcome(self.folder, None, done)
        return Outcome(self.folder, None if self.value is None else (self.value, done), self.error)


def find_patches(given: Sequence[str | Path]) -> PatchFolders:
    """The patches that the arguments of a command stand for; no file is read.

    A folder that is no adapter, but holds folders that are, stands for these, sorted by name. Anything else stands for
    itself, also what is not there: opening it says what is wrong.
    """
    found: list[Path] = []
    for where in map(Path, given):
        inner = () if names_hub(where) or (where / CONFIG_FILE).is_file() else where.glob(f"*/{CONFIG_FILE}")
        found += sorted(config.parent for config in inner) or [where]
    return PatchFolders(tuple(found), is_single=found == [Path(where) for where in given] and len(found) == 1)


def each(items: Mapping[K, T], work: Callable[[K, T], U]) -> dict[K, U | PortLLMError]:
    """What the work gives for each item, or the error by which it failed.

    Example:
        >>> each({"a": 1, "b": 2}, lambda name, number: f"{name}{number}")
        {'a': 'a1', 'b': 'b2'}
    """
    done: dict[K, U | PortLLMError] = {}
    for key, item in items.items():
        try:
            done[key] = work(key, item)
        except PortLLMError as error:
            done[key] = error
    return done


def open_each(folders: PatchFolders, work: Callable[[Patch[TensorInfo], int], T]) -> list[Outcome[T]]:
    """Open each patch and do `work(patch, number)` on it; one that fails does not stop the others."""
    outcomes: list[Outcome[T]] = []
    opener = AdapterOpener()
    for number, folder in enumerate(folders.folders):
        try:
            outcomes.append(Outcome(folder, work(opener.load(folder), number)))
        except PortLLMError as error:
            outcomes.append(Outcome(folder, None, error))
    return outcomes


def outcomes_to_json(
    outcomes: Sequence[Outcome[T]], outputs: Sequence[Path], told: Callable[[T, Path], dict[str, object]]
) -> list[dict[str, object]]:
    """For each patch where it is, and what is told of what became of it and of where that was written, or the error."""
    return [
        {
            "patch": str(outcome.folder),
            **({"error": str(outcome.error)} if outcome.value is None else told(outcome.value, output)),
        }
        for outcome, output in zip(outcomes, outputs, strict=True)
    ]


def _name_of(folder: Path) -> str:
    """The name of a patch's folder; that of a patch on the hub is its repository's, without the revision."""
    return folder.name.partition("@")[0] if names_hub(folder) else folder.resolve().name
