"""Where in a study's folder the record and the output of each step lie."""

from dataclasses import dataclass
from pathlib import Path

from portllm.patch.written import checkpoint_identity, patch_identity
from portllm.study.definition.plan import Step


@dataclass(frozen=True, slots=True)
class Places:
    """The names below a study's folder.

    Attributes:
        out: The folder.

    Example:
        >>> places = Places(Path("small.study"))
        >>> places.record_file(Step("drift", "wiki.1")).as_posix(), places.folder("evolve_wiki.1").as_posix()
        ('small.study/steps/drift_wiki.1.json', 'small.study/evolve/evolve_wiki.1')
    """

    out: Path

    def record_file(self, step: Step) -> Path:
        """Where a step's record is."""
        return self.out / "steps" / f"{step.name}.json"

    def folder(self, name: str) -> Path:
        """Where the output of the step of a name is."""
        return self.out / name.partition("_")[0] / name

    def identify(self, step: Step) -> str:
        """The identity of what a step wrote; empty where it writes nothing but its record.

        Raises:
            PortLLMError: It is not there, or not whole.
        """
        match step.makes:
            case "patches":
                return patch_identity(self.folder(step.name))
            case "checkpoints":
                return checkpoint_identity(self.folder(step.name))
            case _:
                return ""
