"""What is installed of what PortLLM asks for, as its own metadata says: the extras, their packages and versions.

No message names this package as one that pip could find somewhere: an extra is had by installing what it asks for.
"""

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

PACKAGE = "portllm"

EXTRAS: Mapping[str, str] = {
    "live": "train, evaluate, certify, check --text, demo, study",
    "sign": "sign, and verify with a signer",
    "data": "datasets of the Hugging Face Hub, Parquet files",
    "eval": "tasks of lm-evaluation-harness",
    "ray": "fleet --ray, study --ray",
    "s3": "patches and outputs at s3://",
    "gcs": "patches and outputs at gs://",
}
"""The extras, and what each is for."""


@dataclass(frozen=True, slots=True)
class Needed:
    """A package that is asked for.

    Attributes:
        requirement: Its name and versions, as pip takes them.
        found: The version installed, or None.
        suits: Whether that is one of the versions.
    """

    requirement: str
    found: str | None
    suits: bool


def needed(extra: str = "") -> tuple[Needed, ...]:
    """What the package itself asks for, or what one extra adds to it, with the extras that this one includes.

    Empty where the package runs from its source and was never installed.

    Example:
        >>> [package.requirement for package in needed("ray")]
        ['ray>=2.40']
    """
    return tuple(_look_up(requirement) for requirement in _requirements(extra))


def why_not(error: ImportError, extra: str) -> str:
    """What an import failed for, if a package of an extra is missing, in another version, or broken; and what to do.

    Example:
        >>> why_not(ModuleNotFoundError("No module named 'ray'", name="ray"), "ray")[-29:]
        "Run: pip install 'ray>=2.40'."
    """
    wrong = [
        f"{package.requirement} ({package.found or 'not installed'})" for package in needed(extra) if not package.suits
    ]
    found = f"needed: {', '.join(wrong)}" if wrong else f"'{error.name}': cannot be imported: {error}"
    return f"{found}. {how_to_get(extra)}."


def how_to_get(*extras: str) -> str:
    """The sentence that ends a message about packages that are missing.

    Example:
        >>> how_to_get("ray")
        "Run: pip install 'ray>=2.40'"
    """
    wanted = [package.requirement for extra in extras for package in needed(extra)]
    if not wanted:
        return f"Run, in the source folder of PortLLM: pip install -e '.[{','.join(extras)}]'"
    return install(wanted)


def install(requirements: Iterable[str]) -> str:
    """The sentence that has pip install these.

    Example:
        >>> install(["numpy>=2", "torch"])
        "Run: pip install 'numpy>=2' torch"
    """
    return f"Run: pip install {shlex.join(requirements)}"


def _requirements(extra: str) -> Iterator[Requirement]:
    try:
        lines = requires(PACKAGE) or []
    except PackageNotFoundError:
        return
    for requirement in map(Requirement, lines):
        if not _is_asked_for(requirement, extra):
            continue
        if requirement.name == PACKAGE:
            for inner in sorted(requirement.extras):
                yield from _requirements(inner)
        else:
            yield requirement


def _is_asked_for(requirement: Requirement, extra: str) -> bool:
    """By this extra, and not without it; without any, for the empty name."""
    marker = requirement.marker
    if marker is None or marker.evaluate({"extra": ""}):
        return not extra
    return marker.evaluate({"extra": extra})


def _look_up(requirement: Requirement) -> Needed:
    asked = f"{requirement.name}{requirement.specifier}"
    try:
        found = version(requirement.name)
    except PackageNotFoundError:
        return Needed(asked, None, suits=False)
    return Needed(asked, found, requirement.specifier.contains(found, prereleases=True))
