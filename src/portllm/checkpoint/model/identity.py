"""Two identities of a checkpoint, both independent of shard layout, tensor order and file names.

The fingerprint is a digest over names, dtypes, shapes and a sample of each tensor's bytes. It costs milliseconds at
any size, and any two trained versions differ in it; it does not prove that every byte is equal. The digest does: it
covers all bytes. It is taken when the bytes are read anyway or when asked for, and kept in the user's cache by path,
size and time of change.

A head stored beside the embedding it is tied to counts for neither, so that both ways to store it are one model; the
fingerprint knows it by samples, the digest by every number. So are the spellings that a family has for the names of its
tensors. Both are over bytes as they are stored: a model and what was quantized of it never have the same identity.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from blake3 import blake3

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import same_values, stored_tensors
from portllm.errors import OutputError
from portllm.files.cache import cache_root
from portllm.files.input_file import local_file, read_input, require_unchanged
from portllm.files.json_file import MAX_JSON_BYTES
from portllm.files.json_text import parse_json
from portllm.files.own_files import write_text
from portllm.files.seal import render_sealed, seal_of
from portllm.files.source import LocalFile, Source
from portllm.progress import Progress, silent
from portllm.tensors.bytes import read_bytes, read_spans
from portllm.tensors.encoding import is_plain
from portllm.tensors.info import DTYPE_BITS, FLOAT_DTYPES, TensorInfo
from portllm.tensors.rounding import encode_floats
from portllm.tensors.windows import load_spans, sample_window

FINGERPRINT_PREFIX = "s4k1:"
"""Names the sampling rule (4 KiB, version 1), so that another rule can never be mistaken for it."""

DIGEST_PREFIX = "blake3:"
READ_BYTES = 1 << 24


def fingerprint(checkpoint: Checkpoint) -> str:
    """The checkpoint's fingerprint, such as `s4k1:` and 40 hexadecimal digits.

    Raises:
        CheckpointError: A file cannot be read.
    """
    state = blake3()
    infos = list(stored_tensors(checkpoint.listed.own_tensors))
    windows = [(info, *sample_window(name, info.n_bytes)) for name, info in infos]
    for (name, info), sample in zip(infos, read_spans(windows), strict=True):
        state.update(json.dumps([name, info.stored_as, info.shape]).encode())
        state.update(sample)
    return FINGERPRINT_PREFIX + state.hexdigest(20)


def fingerprint_in(checkpoint: Checkpoint, dtype: str) -> str:
    """The fingerprint that the checkpoint would have if its weights were stored in another dtype.

    Where it is that of another model, the two are one in two dtypes: both hold the same numbers, rounded to this one.

    Raises:
        CheckpointError: A file cannot be read.
    """
    return fingerprints_in(checkpoint, [dtype])[dtype]


def fingerprints_in(checkpoint: Checkpoint, dtypes: Sequence[str]) -> dict[str, str]:
    """`fingerprint_in` for several dtypes of one size, whose samples are the same numbers, read once."""
    infos = list(stored_tensors(checkpoint.listed.own_tensors))
    (width,) = {DTYPE_BITS[dtype] // 8 for dtype in dtypes}
    windows = [(info, sample_window(name, width * info.n_params)) for name, info in infos if _is_float(info)]
    floats = load_spans([(info, start // width, stop // width) for info, (start, stop) in windows])
    others = read_spans([(info, *sample_window(name, info.n_bytes)) for name, info in infos if not _is_float(info)])
    states = {dtype: blake3() for dtype in dtypes}
    for name, info in infos:
        values, data = (next(floats), b"") if _is_float(info) else (None, next(others))
        for dtype, state in states.items():
            stored_as = info.stored_as if values is None else dtype
            state.update(json.dumps([name, stored_as, info.shape]).encode())
            state.update(data if values is None else encode_floats(values, dtype))
    return {dtype: FINGERPRINT_PREFIX + state.hexdigest(20) for dtype, state in states.items()}


def same_rounded(one: Checkpoint, other: Checkpoint) -> str | None:
    """The dtype in which two models that are stored in different ones are the same numbers, by their samples."""
    dtypes = [model.float_dtypes for model in (one, other)]
    if dtypes[0] == dtypes[1] or any(model.quantization is not None for model in (one, other)):
        return None
    for model, rounded, found in ((one, other, dtypes[1]), (other, one, dtypes[0])):
        if len(found) == 1 and fingerprint_in(model, dtype := next(iter(found))) == fingerprint(rounded):
            return dtype
    return None


def _is_float(info: TensorInfo) -> bool:
    return info.dtype in FLOAT_DTYPES and (info.encoding is None or is_plain(info.encoding))


def digest(checkpoint: Checkpoint, *, progress: Progress = silent) -> str:
    """The checkpoint's digest: blake3 of each tensor's bytes, then over the sorted list of names and digests.

    Raises:
        CheckpointError: A file cannot be read.
    """
    return digest_of(tensor_digests(checkpoint, progress=progress), checkpoint)


def digest_of(digests: Mapping[str, str], checkpoint: Checkpoint) -> str:
    """The digest of a model whose tensors have these digests, by the names in the file.

    A head that only looks like the embedding it is said to be tied to counts: every byte of the model does.
    """
    listed = checkpoint.listed
    is_tied = all(same_values(pair.left, pair.right, known=digests) for pair in listed.stored_twice)
    infos = listed.own_tensors if is_tied else listed.tensors
    stored = sorted(stored_tensors(infos), key=lambda pair: pair[0])
    rows = [[name, info.stored_as, list(info.shape), digests[info.stored_name]] for name, info in stored]
    return DIGEST_PREFIX + blake3(json.dumps(rows).encode()).hexdigest()


def tensor_digests(checkpoint: Checkpoint, *, progress: Progress = silent) -> dict[str, str]:
    """The blake3 digest of every tensor's bytes, from the cache where the files have not changed since."""
    digests: dict[str, str] = {}
    done = 0
    for file in checkpoint.files:
        infos = [info for _, info in stored_tensors(checkpoint.infos) if info.file == file]
        known = _recall(file)
        if not all(info.stored_name in known for info in infos):
            known = {}
            for info in infos:
                known[info.stored_name] = digest_tensor(info)
                done += info.n_bytes
                progress("digest", done, checkpoint.n_bytes, "bytes")
            require_unchanged([file])
            remember(file, known)
        digests.update(known)
    progress("digest", checkpoint.n_bytes, checkpoint.n_bytes, "bytes")
    return digests


def known_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """The digests of the tensors in those files that have not changed since the cache was told of them."""
    return {name: digest for file in checkpoint.files for name, digest in _recall(file).items()}


def remember_digests(checkpoint: Checkpoint, digests: Mapping[str, str]) -> None:
    """Keep the digests of a model's tensors, by the names in its files, for each file of which all are given."""
    for file in checkpoint.files:
        names = [info.stored_name for _, info in stored_tensors(checkpoint.infos) if info.file == file]
        if all(name in digests for name in names):
            remember(file, {name: digests[name] for name in names})


def digest_stored(info: TensorInfo, known: Mapping[str, str]) -> dict[str, str]:
    """The digests of one tensor and of what decoding it needs, by stored name; what is not known is read.

    Raises:
        CheckpointError: The file cannot be read.
    """
    parts = [part for _, part in stored_tensors({info.name: info})]
    return {part.stored_name: known.get(part.stored_name) or digest_tensor(part) for part in parts}


def digest_tensor(info: TensorInfo) -> str:
    """The blake3 digest of one tensor's bytes, read afresh.

    Raises:
        CheckpointError: The file cannot be read.
    """
    state = blake3()
    for start in range(0, info.n_bytes, READ_BYTES):
        state.update(read_bytes(info, start, min(start + READ_BYTES, info.n_bytes)))
    return state.hexdigest()


def _cache_entry(file: Source) -> tuple[Path, dict[str, object]]:
    key: dict[str, object]
    if isinstance(file, LocalFile):
        state = file.state or local_file(file.path).state
        assert state is not None
        key = {"path": str(file.path.resolve()), "size": state.size, "mtime_ns": state.mtime_ns}
    else:
        key = {"path": file.url, "size": file.size, "etag": file.etag}
    return cache_root() / "digests" / f"{blake3(str(key['path']).encode()).hexdigest(16)}.json", key


def _recall(file: Source) -> dict[str, str]:
    """The digests that the cache has of a file in its state; none where its entry is damaged."""
    entry, key = _cache_entry(file)
    try:
        stored = parse_json(read_input(entry, most=MAX_JSON_BYTES))
    except (OSError, ValueError):
        return {}
    match stored:
        case {"key": found, "digests": dict(digests), "seal": seal} if found == key:
            is_whole = seal == seal_of({"key": key, "digests": digests})
            return digests if is_whole and all(isinstance(digest, str) for digest in digests.values()) else {}
    return {}


def remember(file: Source, digests: Mapping[str, str]) -> None:
    """Keep the digests of a file's tensors until the file changes; a cache that cannot be written is no error."""
    entry, key = _cache_entry(file)
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        write_text(entry, render_sealed({"key": key, "digests": dict(digests)}), is_kept=False)
    except (OSError, OutputError):
        return
