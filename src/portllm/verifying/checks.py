"""The result of a verification, and checks that patches, merged models and certificates share."""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint
from portllm.errors import CheckpointError
from portllm.files.own_files import inode_of
from portllm.files.seal import digest_file, render_sealed, seal_problem
from portllm.patch.record import ModelIdentity
from portllm.verifying.holding import Holding, holding_to_json
from portllm.verifying.signature import SIGNATURE_FILE, Trust, signature_problem

SHOWN = 5
"""Tensors that a finding names before it counts the rest."""

AS_WRITTEN = "as written"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was verified.

    Attributes:
        subject: The file, or what of the whole.
        holds: Whether it is as it should be.
        finding: What was compared, or what does not fit.
    """

    subject: str
    holds: bool
    finding: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict on a patch, a merged model, an export or a certificate.

    Attributes:
        kind: What it is.
        name: As given.
        checks: What was verified.
        notes: What was not, and why.
        holding: How far a merged model holds the patch that was named; None where none was.
    """

    kind: Literal["patch", "checkpoint", "export", "certificate"]
    name: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    holding: Holding | None = None

    def __repr__(self) -> str:
        wrong = [check.subject for check in self.checks if not check.holds]
        return f"Verification({self.name!r}, verified={self.verified}" + (f", wrong={wrong[:3]})" if wrong else ")")

    @property
    def verified(self) -> bool:
        """Whether everything holds."""
        return all(check.holds for check in self.checks)


def verification_to_json(verification: Verification) -> dict[str, object]:
    """The verdict as JSON values."""
    return {
        "kind": verification.kind,
        "name": verification.name,
        "verified": verification.verified,
        "checks": [
            {"subject": check.subject, "holds": check.holds, "finding": check.finding} for check in verification.checks
        ],
        "notes": list(verification.notes),
        **({} if verification.holding is None else {"holding": holding_to_json(verification.holding)}),
    }


def right(subject: str, finding: str) -> Check:
    """A check that holds."""
    return Check(subject, holds=True, finding=finding)


def wrong(subject: str, finding: str) -> Check:
    """A check that does not hold."""
    return Check(subject, holds=False, finding=finding)


def sealed_check(file: Path, values: Mapping[str, object]) -> Check:
    """Whether the seal of a JSON file fits what was read from it, and the file is laid out as it was written."""
    problem = seal_problem(values)
    if problem is None and file.read_bytes() != render_sealed(values).encode():
        problem = "has the recorded values but different bytes: it was reformatted"
    return Check(file.name, problem is None, problem or f"its seal matches, every byte {AS_WRITTEN}")


def file_checks(folder: Path, files: Mapping[str, str]) -> Iterator[Check]:
    """Whether each file of a folder has the digest that was written down for it."""
    for name, digest in sorted(files.items()):
        # What is no file, as a pipe, could be read forever; these functions also take what cannot be a name.
        if not os.path.isfile(folder / name):
            yield wrong(name, "is not a file" if os.path.exists(folder / name) else "is missing")
            continue
        try:
            holds = digest_file(folder / name) == digest
        except OSError as error:
            raise CheckpointError(f"'{folder / name}': cannot be read: {error.strerror}.") from error
        else:
            yield Check(name, holds, AS_WRITTEN if holds else "its bytes differ from those that were written")


def model_check(subject: str, expected: ModelIdentity, model: Checkpoint) -> Check:
    """Whether a model is the one that was written down."""
    found = fingerprint(model)
    if found == expected.fingerprint:
        return right(subject, f"{model.name} is the model that the record names ({found})")
    return wrong(subject, f"{model.name} is {found}, but the record names {expected.name} ({expected.fingerprint})")


def signature_checks(
    folder: Path, trust: Trust | None, signature: Path | None, covered: Collection[str]
) -> Iterator[Check]:
    """Whether a folder bears the signature that it must, over all files that are covered."""
    if trust is None:
        return
    problem = signature_problem(folder, trust, signature=signature, required=covered)
    yield Check("signature", problem is None, problem or f"by {trust}, over every file")


def notes_on(folder: Path, covered: Collection[str], trust: Trust | None, signature: Path | None) -> Iterator[str]:
    """What in a folder is not covered by its record, or was not checked."""
    given = signature is not None and inode_of(signature.parent) == inode_of(folder)
    signatures = {SIGNATURE_FILE} | ({signature.name} if signature is not None and given else set())
    if trust is None and (folder / SIGNATURE_FILE).is_file():
        yield f"{SIGNATURE_FILE} was not checked: name the expected signer, for example with --public-key FILE"
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in {*covered, *signatures})
    if others and trust is None:
        rest = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        yield f"not covered by the record: {', '.join(others[:SHOWN])}{rest}"
