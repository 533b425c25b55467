"""Verify that a patch, or a merged model with its manifest, is byte for byte what was written. Needs no torch.

A patch says in `patch.json` what its other files and its tensors must be, and seals what it says; a merged model does
so in `portllm.json`. Every byte is read again: nothing is taken from a cache.
"""

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from portllm.checkpoint.header import TensorInfo, render_header
from portllm.checkpoint.identity import digest_of, digest_tensor, fingerprint, own_tensors
from portllm.checkpoint.raw_files import read_header, read_json
from portllm.checkpoint.reader import Checkpoint, names_hub, open_checkpoint
from portllm.checkpoint.seal import digest_file, digest_header, render_sealed, seal_problem
from portllm.checkpoint.writer import METADATA
from portllm.errors import CheckpointError, NotFoundError, PatchError, PatchRecordError
from portllm.output.manifest import MANIFEST_FILE, Manifest, manifest_from_json
from portllm.patch.adapter_config import parse_adapter_config
from portllm.patch.adapter_folder import CONFIG_FILE, RECORD_FILE, TENSOR_FILE, parse_record
from portllm.patch.adapter_tensors import sort_out
from portllm.patch.record import ModelIdentity, PatchRecord
from portllm.pipeline.signature import SIGNATURE_FILE, Trust, signature_problem
from portllm.progress import Progress, silent

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
    """The verdict on a patch or a merged model.

    Attributes:
        kind: What it is.
        name: As given.
        checks: What was verified.
        notes: What was not, and why.
    """

    kind: Literal["patch", "checkpoint"]
    name: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...]

    @property
    def verified(self) -> bool:
        """Whether everything holds."""
        return all(check.holds for check in self.checks)


def verify(
    where: str | Path,
    *,
    base: Checkpoint | None = None,
    trust: Trust | None = None,
    signature: Path | None = None,
    progress: Progress = silent,
) -> Verification:
    """Verify a patch, or a model that `merge` wrote.

    Args:
        where: Its folder.
        base: The model that the patch belongs to, or that was merged into; its fingerprint is compared.
        trust: Whose signature it must bear.
        signature: Where the signature is, if not in the folder under its usual name.
        progress: Told of the bytes read of a model.

    Returns:
        What holds and what does not; damage is a finding, not an error.

    Raises:
        NotFoundError: There is no folder, or nothing in it that could be verified.
        PatchRecordError, CheckpointError: What says how the rest must be is no JSON, or a file cannot be read.
        SignatureError: The key or certificate to check against cannot be used.
        MissingExtraError: A signature is to be checked without the extra `sign`.
    """
    folder = _folder(where)
    if (folder / RECORD_FILE).is_file():
        return _verify_patch(folder, str(where), base, trust, signature)
    return _verify_checkpoint(folder, str(where), base, trust, signature, progress)


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
    }


def _folder(where: str | Path) -> Path:
    if names_hub(where):
        raise NotFoundError(
            f"'{where}': is a name of the hub; what is verified lies on this machine. Fetch it (hf download {where} "
            "--local-dir FOLDER) and give the folder."
        )
    folder = Path(where)
    if not folder.is_dir():
        raise NotFoundError(f"'{where}': no such folder. Give the folder of a patch, or of a model that merge wrote.")
    if (folder / RECORD_FILE).is_file() or (folder / MANIFEST_FILE).is_file():
        return folder
    if (folder / CONFIG_FILE).is_file():
        raise PatchRecordError(
            f"'{where}': is an adapter without {RECORD_FILE}, so nothing says what it should be. Make a patch of it: "
            f"portllm capture --adapter {where} --base BASE -o PATCH."
        )
    raise NotFoundError(
        f"'{where}': holds neither {RECORD_FILE} nor {MANIFEST_FILE}, so nothing says what it should be. Give a patch, "
        "or a model that merge wrote; 'portllm inspect --digest' takes the digest of any other."
    )


def _right(subject: str, finding: str) -> Check:
    return Check(subject, holds=True, finding=finding)


def _wrong(subject: str, finding: str) -> Check:
    return Check(subject, holds=False, finding=finding)


def _verify_patch(
    folder: Path, name: str, base: Checkpoint | None, trust: Trust | None, signature: Path | None
) -> Verification:
    covered = {RECORD_FILE, CONFIG_FILE, TENSOR_FILE}
    checks = [*_patch_checks(folder, base), *_signature_checks(folder, trust, signature, covered)]
    return Verification("patch", name, tuple(checks), tuple(_notes(folder, covered, trust, signature)))


def _patch_checks(folder: Path, base: Checkpoint | None) -> Iterator[Check]:
    values = read_json(folder / RECORD_FILE, error=PatchRecordError)
    try:
        record = parse_record(values, where=str(folder / RECORD_FILE))
    except PatchRecordError as error:
        yield _wrong(RECORD_FILE, str(error))
        return
    yield _sealed_check(folder / RECORD_FILE, values)
    yield from _file_checks(folder, record.files)
    yield from _adapter_checks(folder, record)
    yield _chain_check(record)
    if base is not None:
        yield _base_check(record.base, base)


def _adapter_checks(folder: Path, record: PatchRecord) -> Iterator[Check]:
    """The tensors, each by its digest, and whether they and the configuration make a patch."""
    try:
        tensors = read_header(folder / TENSOR_FILE).tensors
    except CheckpointError as error:
        yield _wrong("tensors", str(error))
        return
    yield _tensor_check(tensors, record.tensors)
    try:
        config = parse_adapter_config(read_json(folder / CONFIG_FILE, error=PatchError), where=CONFIG_FILE)
        patch = sort_out(tensors, config, name=str(folder), record=record)
    except PatchError as error:
        yield _wrong("adapter", str(error))
    else:
        yield _right("adapter", f"{len(patch.deltas)} modules, every tensor accounted for")


def _tensor_check(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> Check:
    problems = [f"'{key}' is missing" for key in sorted(set(digests) - set(tensors))]
    problems += [f"'{key}' is not in the record" for key in sorted(set(tensors) - set(digests))]
    for key in sorted(set(digests) & set(tensors)):
        if digest_tensor(tensors[key]) != digests[key]:
            problems.append(f"'{key}' differs")
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        return _wrong("tensors", "; ".join(problems[:SHOWN]) + rest)
    return _right("tensors", f"{len(digests)}, each by its digest, and no other")


def _chain_check(record: PatchRecord) -> Check:
    """The last port leads to the base; a port may start elsewhere than the one before it led, if the user said so."""
    if not record.ports:
        return _right("ports", "none")
    if record.ports[-1].target.fingerprint != record.base.fingerprint:
        return _wrong("ports", "the last one leads to another model than the base")
    jumps = sum(
        step.target.fingerprint != after.source.fingerprint
        for step, after in zip(record.ports, record.ports[1:], strict=False)
    )
    allowed = f"; {jumps} of them from another model than the one before led to, as --allow-other-base permits"
    return _right("ports", f"{len(record.ports)}, the last one leads to the base{allowed if jumps else ''}")


def _verify_checkpoint(
    folder: Path, name: str, base: Checkpoint | None, trust: Trust | None, signature: Path | None, progress: Progress
) -> Verification:
    values = read_json(folder / MANIFEST_FILE)
    weights = {file.name for file in folder.glob("*.safetensors")}
    covered = {MANIFEST_FILE, *weights}
    checks: list[Check] = []
    try:
        manifest = manifest_from_json(values)
    except ValueError as error:
        checks.append(_wrong(MANIFEST_FILE, f"{error}; it was written by another version, or changed by hand"))
    else:
        covered |= set(manifest.files)
        checks.append(_sealed_check(folder / MANIFEST_FILE, values))
        checks += _file_checks(folder, manifest.files)
        checks += _weight_checks(folder, manifest, weights, progress)
        checks += [] if base is None else [_base_check(manifest.into, base)]
    checks += _signature_checks(folder, trust, signature, covered)
    return Verification("checkpoint", name, tuple(checks), tuple(_notes(folder, covered, trust, signature)))


def _weight_checks(folder: Path, manifest: Manifest, weights: Collection[str], progress: Progress) -> Iterator[Check]:
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        yield _wrong("weights", str(error))
        return
    unused = sorted(set(weights) - {Path(str(file)).name for file in checkpoint.files})
    if unused:
        yield _wrong("weights", f"'{unused[0]}' belongs to no model here")
    yield from _header_checks(checkpoint, manifest.headers)
    digests = {}
    done = 0
    for name, info in checkpoint.infos.items():
        digests[name] = digest_tensor(info)
        done += info.n_bytes
        progress("verify", done, checkpoint.n_bytes, "bytes")
    found = digest_of(digests, own_tensors(checkpoint))
    told = f"{len(digests)} tensors, all bytes" if found == manifest.output.digest else _unlike(found, manifest.output)
    yield Check("digest", found == manifest.output.digest, told)
    mark = fingerprint(checkpoint)
    holds = mark == manifest.output.fingerprint
    yield Check("fingerprint", holds, mark if holds else f"is {mark}, written was {manifest.output.fingerprint}")


def _unlike(found: str, output: ModelIdentity) -> str:
    return f"is {found}, written was {output.digest}: a name, dtype, shape or byte of a tensor differs"


def _header_checks(checkpoint: Checkpoint, kept: Mapping[str, str]) -> Iterator[Check]:
    """Headers that say the same in other bytes, and metadata, which no digest of tensors covers.

    A merge in place has kept the headers that were there, and noted their digests.
    """
    for file in checkpoint.files:
        if kept:
            if digest_header(Path(str(file))) != kept.get(Path(str(file)).name):
                yield _wrong(Path(str(file)).name, "its header is not the one that merge found")
            continue
        infos = sorted((info for info in checkpoint.infos.values() if info.file == file), key=lambda info: info.start)
        written = render_header([(info.name, info.dtype, info.shape) for info in infos], METADATA)
        with open(str(file), "rb") as stream:
            if stream.read(len(written)) != written:
                yield _wrong(Path(str(file)).name, "its header is not as merge writes it")


def _sealed_check(file: Path, values: Mapping[str, object]) -> Check:
    problem = seal_problem(values)
    if problem is None and file.read_bytes() != render_sealed(values).encode():
        problem = "says what was written, but in other bytes: its layout was changed"
    return Check(file.name, problem is None, problem or f"its seal fits, every byte {AS_WRITTEN}")


def _file_checks(folder: Path, files: Mapping[str, str]) -> Iterator[Check]:
    for name, digest in sorted(files.items()):
        # What is no file, as a pipe, could be read forever; these functions also take what cannot be a name.
        if not os.path.isfile(folder / name):
            yield _wrong(name, "is no file" if os.path.exists(folder / name) else "is missing")
            continue
        try:
            holds = digest_file(folder / name) == digest
        except OSError as error:
            raise CheckpointError(f"'{folder / name}': cannot be read: {error.strerror}.") from error
        else:
            yield Check(name, holds, AS_WRITTEN if holds else "its bytes are not those that were written")


def _base_check(expected: ModelIdentity, base: Checkpoint) -> Check:
    found = fingerprint(base)
    if found == expected.fingerprint:
        return _right("base", f"{base.name} is the model that the record names ({found})")
    return _wrong("base", f"{base.name} is {found}, the record names {expected.name} ({expected.fingerprint})")


def _signature_checks(
    folder: Path, trust: Trust | None, signature: Path | None, covered: Collection[str]
) -> Iterator[Check]:
    if trust is None:
        return
    problem = signature_problem(folder, trust, signature=signature, required=covered)
    yield Check("signature", problem is None, problem or f"by {trust}, over every file")


def _notes(folder: Path, covered: Collection[str], trust: Trust | None, signature: Path | None) -> Iterator[str]:
    given = signature is not None and signature.resolve().parent == folder.resolve()
    signatures = {SIGNATURE_FILE} | ({signature.name} if signature is not None and given else set())
    if trust is None and (folder / SIGNATURE_FILE).is_file():
        yield f"{SIGNATURE_FILE} was not checked: say whose it must be, for example with --public-key FILE"
    others = sorted(entry.name for entry in folder.iterdir() if entry.name not in {*covered, *signatures})
    if others and trust is None:
        rest = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        yield f"not covered by the record: {', '.join(others[:SHOWN])}{rest}"
