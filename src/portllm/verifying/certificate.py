"""Verify that a certificate is unchanged, consistent, and about the given models, patches and inputs."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from portllm.certifying.certificate import (
    CERTIFICATE_FILE,
    Certificate,
    PatchFiles,
    arithmetic_problems,
    parse_certificate,
)
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import CertificateError, NotFoundError
from portllm.files.json_file import read_json
from portllm.files.seal import digest_file
from portllm.verifying.checks import AS_WRITTEN, Check, file_checks, model_check, right, sealed_check, wrong


@dataclass(frozen=True, slots=True)
class Certified:
    """Models, patches and inputs to compare a certificate with; all are optional.

    Attributes:
        evolved: The model that answered after the port: the evolved one, or the merged one.
        patch: Folder of the old specialist's patch.
        ported: Folder of the ported patch.
        data: The file of inputs.
    """

    evolved: ModelLike | None = None
    patch: str | Path | None = None
    ported: str | Path | None = None
    data: str | Path | None = None


def certificate_checks(folder: Path, base: Checkpoint | None, certified: Certified) -> Iterator[Check]:
    """The file itself, its arithmetic, and each thing that is given beside it.

    Raises:
        CertificateError: The file is no JSON.
        NotFoundError: A file that is given is not there.
    """
    file = folder / CERTIFICATE_FILE
    values = read_json(file, error=CertificateError)
    try:
        certificate = parse_certificate(values, where=str(file))
    except CertificateError as error:
        yield wrong(CERTIFICATE_FILE, str(error))
        return
    yield sealed_check(file, values)
    yield _arithmetic_check(certificate)
    if base is not None:
        yield model_check("base", certificate.specialist.model, base)
    if certified.patch is not None:
        yield from _patch_checks("patch", certificate.specialist.patch, Path(certified.patch))
    if certified.evolved is not None:
        yield model_check("evolved", certificate.ported.model, open_checkpoint(certified.evolved))
    if certified.ported is not None:
        yield from _patch_checks("ported", certificate.ported.patch, Path(certified.ported))
    if certified.data is not None:
        yield _data_check(certificate.inputs.digest, Path(certified.data))


def unchecked(base: Checkpoint | None, certified: Certified) -> Iterator[str]:
    """What a certificate names and was not compared with, for nobody has shown it."""
    given = {
        "--base": base,
        "--patch": certified.patch,
        "--evolved": certified.evolved,
        "--ported": certified.ported,
        "--data": certified.data,
    }
    absent = [option for option, value in given.items() if value is None]
    if absent:
        yield f"not compared, since not given: {', '.join(absent)}"


def _arithmetic_check(certificate: Certificate) -> Check:
    problems = list(arithmetic_problems(certificate))
    if problems:
        return wrong("arithmetic", "; ".join(problems))
    if certificate.bound is None:
        return right("arithmetic", "no bound is claimed")
    return right("arithmetic", f"the bound follows from {len(certificate.differing or ())} of {certificate.n}")


def _patch_checks(subject: str, expected: PatchFiles | None, folder: Path) -> Iterator[Check]:
    if not folder.is_dir():
        raise NotFoundError(f"'{folder}': no such folder. Pass the patch that the certificate is about.")
    if expected is None:
        yield wrong(subject, f"the certificate is about a merged model, and {folder} is a patch")
        return
    for check in file_checks(folder, expected.files):
        yield Check(f"{subject}/{check.subject}", check.holds, check.finding)


def _data_check(expected: str, data: Path) -> Check:
    try:
        holds = f"blake3:{digest_file(data)}" == expected
    except OSError as error:
        raise NotFoundError(f"'{data}': cannot be read: {error.strerror}. Pass the file of inputs.") from error
    return Check("data", holds, AS_WRITTEN if holds else "its bytes differ from those of the certified inputs")
