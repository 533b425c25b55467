"""Verify that a patch, merged model, export or certificate is byte for byte as it was written. Needs no torch.

A patch says in `patch.json` what its other files and its tensors must be, and seals what it says; a merged model does
so in `portllm.json`, and a certificate stands in one file. Every byte is read again: nothing is taken from a cache.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from portllm.certifying.certificate import CERTIFICATE_FILE
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import listed_tensors
from portllm.checkpoint.model.hub_names import names_hub
from portllm.checkpoint.model.identity import digest_of, digest_tensor, fingerprint
from portllm.checkpoint.open import ModelLike, on_disk, open_checkpoint
from portllm.checkpoint.safetensors.header import render_header
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.checkpoint.safetensors.writer import METADATA
from portllm.errors import CheckpointError, NotFoundError, PatchError, PatchRecordError, PortLLMError
from portllm.exporting.export import EXPORT_FILE, ExportRecord
from portllm.files.json_file import read_json
from portllm.files.near_names import did_you_mean
from portllm.files.record import decode_sealed
from portllm.files.seal import digest_header
from portllm.merging.manifest import MANIFEST_FILE, Manifest
from portllm.patch.adapter_config import parse_adapter_config
from portllm.patch.adapter_folder import (
    CONFIG_FILE,
    RECORD_FILE,
    TENSOR_FILE,
    PatchLike,
    folder_of,
    load_patch,
    parse_record,
)
from portllm.patch.adapter_tensors import sort_out
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity, PatchRecord
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.verifying.certificate import Certified, certificate_checks, unchecked
from portllm.verifying.checks import (
    SHOWN,
    Check,
    Verification,
    file_checks,
    model_check,
    notes_on,
    right,
    sealed_check,
    signature_checks,
    wrong,
)
from portllm.verifying.holding import Holding, find_holding
from portllm.verifying.likeness import Extent
from portllm.verifying.signature import Trust


def verify(
    where: PatchLike,
    *,
    base: ModelLike | None = None,
    trust: Trust | None = None,
    signature: str | Path | None = None,
    certified: Certified | None = None,
    patch: PatchLike | None = None,
    progress: Progress = silent,
) -> Verification:
    """Verify a patch, a merged model, an export or a certificate; or whether a merge by any tool holds a patch.

    Args:
        where: Its folder, or a patch opened from there.
        base: The model that the patch belongs to, that was merged into, or that the old specialist of a certificate was
            made of; its fingerprint is compared.
        trust: The signer to require.
        signature: The signature file, if not the default one in the folder.
        certified: For a certificate, the models, patches and inputs to compare it with.
        patch: For a merged model, whichever tool wrote it: the patch that it is to hold, with the model it was merged
            into as `base`. Every tensor is merged again and compared.
        progress: Progress callback (bytes read of a model).

    Returns:
        All checks and their outcome; corruption is a finding, not an error.

    Raises:
        NotFoundError: The folder does not exist, or contains nothing to verify.
        PatchRecordError, CheckpointError: The record is not valid JSON, or a file cannot be read.
        SignatureError: The key or certificate to check against cannot be used.
        MissingExtraError: A signature is to be checked without the extra `sign`.
        PortLLMError: `certified` is given for something else than a certificate, or `patch` without `base`.
        PlanRefusedError: Whether the model holds the patch cannot be said.
    """
    if patch is not None:
        return _verify_holding(where, load_patch(patch), base, trust, signature, progress)
    where = folder_of(where) if isinstance(where, Patch) else where
    base = None if base is None else open_checkpoint(base)
    signature = None if signature is None else Path(signature)
    folder = _folder(where)
    if (folder / CERTIFICATE_FILE).is_file():
        return _verify_certificate(folder, str(where), base, certified or Certified(), trust, signature)
    if certified is not None:
        raise PortLLMError(f"'{where}': is not a certificate; evolved model, patches and data require one.")
    if (folder / EXPORT_FILE).is_file():
        return _verify_export(folder, str(where), base, trust, signature)
    if (folder / RECORD_FILE).is_file():
        return _verify_patch(folder, str(where), base, trust, signature)
    return _verify_checkpoint(folder, str(where), base, trust, signature, progress)


def _verify_holding(
    where: PatchLike,
    patch: Patch[TensorInfo],
    base: ModelLike | None,
    trust: Trust | None,
    signature: str | Path | None,
    progress: Progress,
) -> Verification:
    """Whether a model holds a patch, and, where `merge` wrote it, whether it is as it was written."""
    if isinstance(where, Patch) or base is None:
        raise PortLLMError(f"'{where}': whether it holds a patch is found with a merged model and its --base.")
    merged = on_disk(open_checkpoint(where), progress=progress)
    below = on_disk(open_checkpoint(base), progress=progress)
    holding = find_holding(patch, base=below, merged=merged, progress=progress)
    check = Check("patch", not holding.wrong, _told(holding, patch, below))
    if not (Path(where) / MANIFEST_FILE).is_file():
        note = f"{where} has no {MANIFEST_FILE}: whether its bytes are as they were written is not known"
        return Verification("checkpoint", str(where), (check,), (note,), holding)
    written = verify(where, trust=trust, signature=signature, progress=progress)
    return replace(written, checks=(*written.checks, check), holding=holding)


def _told(holding: Holding, patch: Patch[TensorInfo], base: Checkpoint) -> str:
    changed = sum(held.is_changed for held in holding.tensors.values())
    wrong = [f"{name} {held.finding}" for name, held in holding.wrong.items()]
    of_patch = sum(held.is_changed for held in holding.wrong.values())
    if holding.extent is Extent.EXACTLY:
        return f"every tensor is, byte for byte, what merging {patch.name} into {base.name} gives"
    if holding.extent is Extent.TO_ROUNDING:
        return f"holds {patch.name} in each of {changed} tensors, but for rounding; all else is as in {base.name}"
    rest = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    some = f"holds {patch.name} in {changed - of_patch} of {changed} tensors"
    said = some if holding.extent is Extent.PARTLY else f"does not hold {patch.name}"
    return f"{said}; wrong: {'; '.join(wrong[:SHOWN])}{rest}"


def _folder(where: str | Path) -> Path:
    if names_hub(where):
        raise NotFoundError(
            f"'{where}': is a Hub id, but only local folders can be verified. Download it (hf download {where} "
            "--local-dir FOLDER) and pass the folder."
        )
    folder = Path(where)
    if not folder.is_dir():
        raise NotFoundError(
            f"'{where}': no such folder. Pass the folder of a patch, of a model written by merge, or of a certificate."
            f"{did_you_mean(where)}"
        )
    if any((folder / name).is_file() for name in (CERTIFICATE_FILE, EXPORT_FILE, RECORD_FILE, MANIFEST_FILE)):
        return folder
    if (folder / CONFIG_FILE).is_file():
        raise PatchRecordError(
            f"'{where}': is an adapter without {RECORD_FILE}, so there is no record to verify it against. Make it "
            f"a patch: portllm capture --adapter {where} --base BASE -o PATCH."
        )
    raise NotFoundError(
        f"'{where}': contains neither {RECORD_FILE} nor {MANIFEST_FILE}, so there is no record to verify it "
        "against. Pass a patch, a model written by merge, or a certificate; 'portllm inspect --digest' computes "
        "the digest of any other model."
    )


def _verify_certificate(
    folder: Path, name: str, base: Checkpoint | None, certified: Certified, trust: Trust | None, signature: Path | None
) -> Verification:
    covered = {CERTIFICATE_FILE}
    checks = [*certificate_checks(folder, base, certified), *signature_checks(folder, trust, signature, covered)]
    notes = [*unchecked(base, certified), *notes_on(folder, covered, trust, signature)]
    return Verification("certificate", name, tuple(checks), tuple(notes))


def _verify_export(
    folder: Path, name: str, base: Checkpoint | None, trust: Trust | None, signature: Path | None
) -> Verification:
    values = read_json(folder / EXPORT_FILE)
    covered = {EXPORT_FILE}
    checks = [sealed_check(folder / EXPORT_FILE, values)]
    try:
        record = decode_sealed(ExportRecord, values)
    except ValueError as error:
        checks.append(wrong(EXPORT_FILE, f"{error}; it was written by another version or edited by hand"))
    else:
        covered |= set(record.files)
        checks += file_checks(folder, record.files)
        if base is not None and record.base is not None:
            checks.append(model_check("base", record.base, base))
    checks += signature_checks(folder, trust, signature, covered)
    return Verification("export", name, tuple(checks), tuple(notes_on(folder, covered, trust, signature)))


def _verify_patch(
    folder: Path, name: str, base: Checkpoint | None, trust: Trust | None, signature: Path | None
) -> Verification:
    covered = {RECORD_FILE, CONFIG_FILE, TENSOR_FILE, *_recorded_files(folder)}
    checks = [*_patch_checks(folder, base), *signature_checks(folder, trust, signature, covered)]
    return Verification("patch", name, tuple(checks), tuple(notes_on(folder, covered, trust, signature)))


def _recorded_files(folder: Path) -> Collection[str]:
    """What else the record covers, where it can be read."""
    try:
        return parse_record(read_json(folder / RECORD_FILE, error=PatchRecordError), where=RECORD_FILE).files
    except PatchRecordError:
        return ()


def _patch_checks(folder: Path, base: Checkpoint | None) -> Iterator[Check]:
    values = read_json(folder / RECORD_FILE, error=PatchRecordError)
    try:
        record = parse_record(values, where=str(folder / RECORD_FILE))
    except PatchRecordError as error:
        yield wrong(RECORD_FILE, str(error))
        return
    yield sealed_check(folder / RECORD_FILE, values)
    yield from file_checks(folder, record.files)
    yield from _adapter_checks(folder, record)
    yield _chain_check(record)
    if base is not None:
        yield model_check("base", record.base, base)


def _adapter_checks(folder: Path, record: PatchRecord) -> Iterator[Check]:
    """The tensors, each by its digest, and whether they and the configuration make a patch."""
    try:
        tensors = read_header(folder / TENSOR_FILE).tensors
    except CheckpointError as error:
        yield wrong("tensors", str(error))
        return
    yield _tensor_check(tensors, record.tensors)
    try:
        config = parse_adapter_config(read_json(folder / CONFIG_FILE, error=PatchError), where=CONFIG_FILE)
        patch = sort_out(tensors, config, name=str(folder), record=record)
    except PatchError as error:
        yield wrong("adapter", str(error))
    else:
        yield right("adapter", f"{len(patch.deltas)} modules, every tensor accounted for")


def _tensor_check(tensors: Mapping[str, TensorInfo], digests: Mapping[str, str]) -> Check:
    problems = [f"'{key}' is missing" for key in sorted(set(digests) - set(tensors))]
    problems += [f"'{key}' is not in the record" for key in sorted(set(tensors) - set(digests))]
    for key in sorted(set(digests) & set(tensors)):
        if digest_tensor(tensors[key]) != digests[key]:
            problems.append(f"'{key}' differs")
    if problems:
        rest = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        return wrong("tensors", "; ".join(problems[:SHOWN]) + rest)
    return right("tensors", f"{len(digests)}, each matches its digest, and no others")


def _chain_check(record: PatchRecord) -> Check:
    """The last port leads to the base; a port may start elsewhere than the one before it led, if the user said so."""
    if not record.ports:
        return right("ports", "none")
    if record.ports[-1].target.fingerprint != record.base.fingerprint:
        return wrong("ports", "the last one does not lead to the base")
    jumps = sum(
        step.target.fingerprint != after.source.fingerprint
        for step, after in zip(record.ports, record.ports[1:], strict=False)
    )
    allowed = f"; {jumps} of them do not start where the previous one ended, as --allow-other-base permits"
    return right("ports", f"{len(record.ports)}, the last one leads to the base{allowed if jumps else ''}")


def _verify_checkpoint(
    folder: Path, name: str, base: Checkpoint | None, trust: Trust | None, signature: Path | None, progress: Progress
) -> Verification:
    values = read_json(folder / MANIFEST_FILE)
    weights = {file.name for file in folder.glob("*.safetensors")}
    covered = {MANIFEST_FILE, *weights}
    checks: list[Check] = []
    try:
        manifest = decode_sealed(Manifest, values)
    except ValueError as error:
        checks.append(wrong(MANIFEST_FILE, f"{error}; it was written by another version or edited by hand"))
    else:
        covered |= set(manifest.files)
        checks.append(sealed_check(folder / MANIFEST_FILE, values))
        checks += file_checks(folder, manifest.files)
        checks += _weight_checks(folder, manifest, weights - set(manifest.files), progress)
        checks += [] if base is None else [model_check("base", manifest.into, base)]
    checks += signature_checks(folder, trust, signature, covered)
    return Verification("checkpoint", name, tuple(checks), tuple(notes_on(folder, covered, trust, signature)))


def _weight_checks(folder: Path, manifest: Manifest, weights: Collection[str], progress: Progress) -> Iterator[Check]:
    try:
        checkpoint = open_checkpoint(folder)
    except CheckpointError as error:
        yield wrong("weights", str(error))
        return
    unused = sorted(set(weights) - {Path(str(file)).name for file in checkpoint.files})
    if unused:
        yield wrong("weights", f"'{unused[0]}' belongs to none of these models")
    yield from _header_checks(checkpoint, manifest.headers)
    digests = {}
    done = 0
    for name, info in listed_tensors(checkpoint.infos).items():
        digests[name] = digest_tensor(info)
        done += info.n_bytes
        progress("verify", done, checkpoint.n_bytes, "bytes")
    found = digest_of(digests, checkpoint)
    told = f"{len(digests)} tensors, all bytes" if found == manifest.output.digest else _unlike(found, manifest.output)
    yield Check("digest", found == manifest.output.digest, told)
    mark = fingerprint(checkpoint)
    holds = mark == manifest.output.fingerprint
    yield Check("fingerprint", holds, mark if holds else f"is {mark}, but {manifest.output.fingerprint} was written")


def _unlike(found: str, output: ModelIdentity) -> str:
    return f"is {found}, but {output.digest} was written: a name, dtype, shape or byte of a tensor differs"


def _header_checks(checkpoint: Checkpoint, kept: Mapping[str, str]) -> Iterator[Check]:
    """Headers that say the same in other bytes, and metadata, which no digest of tensors covers.

    A merge in place has kept the headers that were there, and noted their digests.
    """
    listed = listed_tensors(checkpoint.infos).values()
    for file in checkpoint.files:
        if kept:
            if digest_header(Path(str(file))) != kept.get(Path(str(file)).name):
                yield wrong(Path(str(file)).name, "its header differs from the one that merge read")
            continue
        infos = sorted((info for info in listed if info.file == file), key=lambda info: info.start)
        written = render_header([(info.name, info.dtype, info.shape) for info in infos], METADATA)
        with open(str(file), "rb") as stream:
            if stream.read(len(written)) != written:
                yield wrong(Path(str(file)).name, "its header differs from what merge writes")
