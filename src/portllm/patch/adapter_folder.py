"""Read and write PEFT's adapter folder.

Reading takes the headers only; a factor stays on disk, described by a `TensorInfo`, until somebody loads it. Every
tensor of the file is accounted for: it becomes part of a delta, or the folder is refused with all such tensors named.
"""

import contextlib
import fnmatch
import json
import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from blake3 import blake3
from msgspec import structs

from portllm.checkpoint.model.families import order_of
from portllm.checkpoint.model.hub_names import MAX_NAME_LENGTH, names_hub
from portllm.checkpoint.safetensors.header import parse_header, render_header
from portllm.checkpoint.safetensors.header_file import describing, read_header_text, size_of
from portllm.checkpoint.safetensors.writer import METADATA
from portllm.errors import AdapterFormatError, CheckpointError, PatchRecordError
from portllm.files.input_file import local_file
from portllm.files.json_file import MAX_CONFIG_BYTES, read_config, read_json
from portllm.files.json_text import is_utf8
from portllm.files.near_names import did_you_mean
from portllm.files.record import decode_sealed, write_sealed
from portllm.files.seal import digest_file, seal_problem
from portllm.files.source import Source
from portllm.patch.adapter_config import parse_adapter_config
from portllm.patch.adapter_keys import INNER, PREFIX, Role, plain_key, render_key
from portllm.patch.adapter_start import INIT_CONFIGS, RECOMPUTED_INITS, named_init
from portllm.patch.adapter_tensors import BIAS, WEIGHT, sort_out
from portllm.patch.no_adapter import why_no_adapter
from portllm.patch.other_weights import why_incomplete
from portllm.patch.patch import Patch
from portllm.patch.record import PATCH_FILES, PatchRecord
from portllm.patch.side_files import SIDE_FILES, copy_into, labels_in, side_files_in
from portllm.tensors.bytes import read_bytes
from portllm.tensors.info import DTYPE_BITS, TensorInfo

CONFIG_FILE, TENSOR_FILE = PATCH_FILES
PICKLE_FILE = "adapter_model.bin"
MODEL_CONFIG_FILE = "config.json"
"""Some training programs save that of the model beside the adapter; it names a classifier's labels."""

RECORD_FILE = "patch.json"
CARD_FILE = "README.md"
COPY_BYTES = 1 << 24

MLX_FILE = "adapters.safetensors"
PatchLike = str | Path | Patch[TensorInfo]
"""A patch, or where it is."""


class AdapterOpener:
    """Opens adapter folders one after the other.

    Adapters of one recipe have the same header, byte for byte, and the same configuration. What these mean is found
    once: the next such adapter is the last one with its tensors in another file.
    """

    def __init__(self) -> None:
        self._last: tuple[tuple[bytes, int, str], Patch[TensorInfo]] | None = None

    def load(self, folder: str | Path) -> Patch[TensorInfo]:
        """As `load_patch`."""
        patch = self.open(folder)
        if patch.config.changed_base is not None:
            raise AdapterFormatError(f"'{patch.name}': {why_unconverted(patch)}")
        return patch

    def open(self, folder: str | Path) -> Patch[TensorInfo]:
        """As `open_adapter`."""
        path = Path(folder)
        name = str(folder)
        revision = None
        if not is_utf8(name):
            raise AdapterFormatError(f"{name!r}: is not valid UTF-8, so no record can name it. Rename it.")
        if names_hub(name):
            path, revision = _fetch(name)
        _require_files(path, name)
        described_by = describing(file for file in (path / CONFIG_FILE, path / RECORD_FILE) if os.path.isfile(file))
        fields = read_json(path / CONFIG_FILE, error=AdapterFormatError, most=MAX_CONFIG_BYTES)
        header, file = read_header_text(path / TENSOR_FILE, described_by=described_by)
        file_bytes = size_of(file)
        recipe = header, file_bytes, repr(fields)  # as text: 1 and True are equal, and only one of them is a rank
        if self._last is not None and self._last[0] == recipe:
            patch = self._last[1].mapped(lambda info: info.in_file(file))
            return replace(patch, name=name, revision=revision, **_around(path))
        config = parse_adapter_config(fields, where=name)
        tensors = parse_header(header, file=file, file_bytes=file_bytes).tensors
        patch = sort_out(tensors, config, name=name, record=read_record(path), revision=revision)
        self._last = recipe, patch
        return replace(patch, **_around(path))


def _around(folder: Path) -> dict[str, Any]:
    """What lies around an adapter's tensors and configuration."""
    record, config = read_record(folder), folder / MODEL_CONFIG_FILE
    told = record.labels if record is not None else ()
    if not told and os.path.isfile(config):
        with contextlib.suppress(CheckpointError):  # nothing else is asked of it
            told = labels_in(read_config(config))
    card = folder / CARD_FILE
    kept = local_file(card) if os.path.isfile(card) else None
    return {"record": record, "beside": side_files_in(folder), "labels": told, "card": kept}


def load_patch(folder: PatchLike) -> Patch[TensorInfo]:
    """Open a patch: an adapter folder, with its `patch.json` if it has one; no tensor is read.

    Args:
        folder: A folder, or an adapter of the Hugging Face Hub (`org/name` or `org/name@revision`), whose three files
            are brought into huggingface_hub's cache. A patch is returned as it is.

    Raises:
        NotFoundError, RemoteError: The adapter does not exist on the Hub, or cannot be downloaded.
        AdapterFormatError: It is not a fully supported adapter, or it belongs to a base that PEFT changed.
        PatchRecordError: Its `patch.json` breaks the schema or its seal.
        HeaderError: Its tensor file is corrupt.
    """
    return folder if isinstance(folder, Patch) else AdapterOpener().load(folder)


def open_adapter(folder: PatchLike) -> Patch[TensorInfo]:
    """Open an adapter folder as it is, though it may belong to a base that PEFT changed; otherwise as `load_patch`."""
    return folder if isinstance(folder, Patch) else AdapterOpener().open(folder)


def why_unconverted(patch: Patch[TensorInfo]) -> str:
    """What is said of an adapter that began with a part of its base, and how it is converted."""
    began = patch.config.changed_base
    is_named = named_init(patch.config.fields) == began
    field = next((name for name, init in INIT_CONFIGS.items() if init == began), None)
    said = f"'init_lora_weights' is '{began}'" if is_named else f"it has a '{field}'"
    if began in RECOMPUTED_INITS:
        way = f"portllm capture --adapter {patch.name} --base BASE -o PATCH"
    else:
        way = (
            f"portllm capture --adapter {patch.name} --base BASE --initial START -o PATCH, where START is the "
            "adapter as saved before training"
        )
    again = "" if is_named else f" If PEFT has already converted it, remove '{field}' from its file."
    return (
        f"{said}: PEFT subtracted a part from the base's weights before training, so the adapter belongs to the "
        f"remainder. Convert it once: {way}.{again}"
    )


def read_record(folder: Path) -> PatchRecord | None:
    """The content of a folder's `patch.json`, checked against schema and seal; None where there is no such file.

    Raises:
        PatchRecordError: The file breaks the schema, or its seal does not fit what it says.
    """
    file = folder / RECORD_FILE
    if not os.path.exists(file):
        return None
    values = read_json(file, error=PatchRecordError)
    record = parse_record(values, where=str(file))
    problem = seal_problem(values)
    if problem:
        raise PatchRecordError(f"'{file}': {problem}. Download the patch again, or capture it again.")
    return record


def parse_record(values: Mapping[str, object], *, where: str) -> PatchRecord:
    """The record that the values of a `patch.json` stand for, whatever its seal.

    Raises:
        PatchRecordError: They break the schema.
    """
    try:
        return decode_sealed(PatchRecord, values)
    except ValueError as error:
        raise PatchRecordError(
            f"'{where}': {error}. It was written by another version or edited by hand; capture the patch again."
        ) from error


def write_record(folder: Path, record: PatchRecord) -> PatchRecord:
    """Write `patch.json` beside the patch's other files, sealed and with their digests; the record as written."""
    names = (CONFIG_FILE, TENSOR_FILE, *side_files_in(folder))
    whole = structs.replace(record, files={name: digest_file(folder / name) for name in names})
    write_sealed(folder / RECORD_FILE, whole)
    return whole


def write_patch(folder: Path, patch: Patch[TensorInfo], *, base_name: str, base_revision: str | None = None) -> None:
    """Write a patch whose factors lie on disk into a folder that PEFT loads; without the record.

    The tensors are copied as bytes, in the order of their names, so that the same patch gives the same file. Tokenizer
    and chat template are copied beside them.

    Args:
        folder: An existing, empty folder.
        patch: What to write.
        base_name: Becomes `base_model_name_or_path`, which PEFT shows and some servers check.
        base_revision: The commit hash of a base of the hub, else None.
    """
    fields = name_base(patch.config.fields, base_name, base_revision)
    # Fields are sorted, what they hold is not: the first pattern that matches a module wins.
    text = json.dumps(dict(sorted(fields.items())), indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")
    tensors = stored_tensors(patch)
    copy_into(folder, patch.beside)
    with open(folder / TENSOR_FILE, "wb") as file:
        file.write(render_header([(key, info.dtype, info.shape) for key, info in tensors.items()], METADATA))
        for info in tensors.values():
            for part in _parts(info):
                file.write(part)


def name_base(fields: Mapping[str, object], name: str, revision: str | None) -> dict[str, object]:
    """The fields of an adapter's configuration with another base; PEFT keeps a revision in a field of its own.

    Example:
        >>> name_base({"revision": "v1"}, "org/name@main", "0123abcd")
        {'revision': '0123abcd', 'base_model_name_or_path': 'org/name'}
        >>> name_base({"revision": "v1"}, "evolved", None)
        {'revision': None, 'base_model_name_or_path': 'evolved'}
    """
    named = {**fields, "base_model_name_or_path": name.partition("@")[0] if revision else name}
    return {**named, "revision": revision} if revision or "revision" in fields else named


def stored_tensors(patch: Patch[TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors of a patch by PEFT's key, in the order in which they are written."""
    keyed: dict[str, TensorInfo] = {}
    for module, delta in patch.deltas.items():
        keyed[render_key(module, Role.EMBEDDING_A if delta.is_embedding else Role.A)] = delta.a
        keyed[render_key(module, Role.EMBEDDING_B if delta.is_embedding else Role.B)] = delta.b
        if delta.magnitude is not None:
            keyed[render_key(module, Role.MAGNITUDE)] = delta.magnitude
    for tensor, experts in patch.experts.items():
        module = _wrapped(tensor, patch)
        keyed |= {render_key(module, Role.A): experts.a, render_key(module, Role.B): experts.b}
    for tensor, bias in patch.bias_deltas.items():
        keyed[render_key(tensor.removesuffix(BIAS), Role.BIAS_DELTA)] = bias.values
    for tensor, rows in patch.rows.items():
        keyed[render_key(tensor.removesuffix(WEIGHT), Role.TOKEN_ROWS)] = rows.values
    for tensor, weight in patch.resized.items():
        keyed[render_key(tensor.removesuffix(WEIGHT), Role.BASE_WEIGHT)] = weight
    for tensor, whole in patch.values.items():
        targeted = tensor.endswith(BIAS) and tensor.removesuffix(BIAS) in patch.deltas
        key = render_key(tensor.removesuffix(BIAS), Role.BASE_BIAS) if targeted else render_key(tensor, Role.WHOLE)
        keyed[key] = whole.values
    return dict(sorted(keyed.items(), key=lambda pair: (-DTYPE_BITS[pair[1].dtype], pair[0])))


def _wrapped(tensor: str, patch: Patch[TensorInfo]) -> str:
    """The module of an adapted parameter as PEFT names it, wrapped once more for each parameter that comes after."""
    module, _, parameter = tensor.rpartition(".")
    parameters = [other.rpartition(".")[2] for other in patch.experts if other.rpartition(".")[0] == module]
    order = order_of(parameters) or (parameter,)
    return module + INNER * (len(order) - 1 - order.index(parameter))


def files_of(patch: Patch[TensorInfo]) -> tuple[Source, ...]:
    """The files that a patch is read from, sorted: that of its tensors, tokenizer and chat template."""
    files = {id(info.file): info.file for info in stored_tensors(patch).values()}  # to hash them all takes longer
    return tuple(sorted({*files.values(), *patch.beside.values()}, key=str))


def folder_of(patch: Patch[TensorInfo]) -> Path:
    """The folder that a patch was opened from, for programs that load it themselves.

    Raises:
        AdapterFormatError: Its keys are not as PEFT writes them: a program would drop their tensors without a word.
    """
    keys = (info.name for info in stored_tensors(patch).values())
    odd = next((key for key in keys if not key.startswith(PREFIX) or plain_key(key) != key), None)
    if odd is not None:
        raise AdapterFormatError(
            f"'{patch.name}': tensor '{odd}' has a name that PEFT does not use and would ignore. Write the patch "
            f"again: portllm capture --adapter {patch.name} --base BASE -o PATCH."
        )
    return Path(str(files_of(patch)[0])).parent


def digest_tensors(patch: Patch[TensorInfo]) -> dict[str, str]:
    """The blake3 digest of every stored tensor's bytes, by PEFT's key."""
    digests = {}
    for key, info in stored_tensors(patch).items():
        state = blake3()
        for part in _parts(info):
            state.update(part)
        digests[key] = state.hexdigest()
    return dict(sorted(digests.items()))


def _parts(info: TensorInfo) -> Iterator[bytes]:
    for start in range(0, info.n_bytes, COPY_BYTES):
        yield read_bytes(info, start, min(start + COPY_BYTES, info.n_bytes))


def _fetch(name: str) -> tuple[Path, str]:
    """Bring an adapter of the hub into the cache; the folder there, and the commit hash."""
    from portllm.checkpoint.hub_repository import fetch, look_up  # loads an HTTP client, which few runs need

    repository = look_up(name)
    files = [
        file for file in (CONFIG_FILE, TENSOR_FILE, RECORD_FILE, CARD_FILE, *SIDE_FILES) if file in repository.files
    ]
    if CONFIG_FILE not in files:
        raise AdapterFormatError(f"'{name}': has no {CONFIG_FILE} on the Hub, so it is not an adapter.")
    _require_read(repository.files, name)
    if TENSOR_FILE not in files:
        pickled = (
            f"; its {PICKLE_FILE} is a pickle, which can run code and is never read"
            if PICKLE_FILE in repository.files
            else ""
        )
        raise AdapterFormatError(
            f"'{name}': has no {TENSOR_FILE} on the Hub{pickled}. Ask its author for one, or convert it and pass "
            "the folder."
        )
    return fetch(repository, files), repository.revision


def _require_files(path: Path, name: str) -> None:
    if not os.path.exists(path):
        raise AdapterFormatError(
            f"'{name[:MAX_NAME_LENGTH]}': no such folder. A patch is a folder with {CONFIG_FILE} and {TENSOR_FILE}."
            f"{did_you_mean(name)}"
        )
    try:
        if not os.path.isfile(path / CONFIG_FILE):
            raise AdapterFormatError(f"'{name}': {why_no_adapter(path, name)}")
        there = os.listdir(path)
    except OSError as error:
        raise AdapterFormatError(f"'{name}': cannot be looked into: {error.strerror}.") from error
    _require_read(there, name)
    if os.path.isfile(path / TENSOR_FILE):
        return
    if os.path.isfile(path / PICKLE_FILE):
        raise AdapterFormatError(
            f"'{name}': contains {PICKLE_FILE}, a pickle, which can run code and is never read. If you trust it, "
            'convert it once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path / PICKLE_FILE}', weights_only=True), '{path / TENSOR_FILE}')\"."
        )
    if (shard := min(fnmatch.filter(there, "adapter_model-*.safetensors"), default=None)) is not None:
        raise AdapterFormatError(
            f"'{name}': its tensors are in several files, such as {shard}, of which PEFT loads none. Join them: "
            f'python -c "import glob, safetensors.torch as s; s.save_file({{k: v for f in '
            f"glob.glob('{path}/adapter_model-*') for k, v in s.load_file(f).items()}}, '{path / TENSOR_FILE}')\"."
        )
    raise AdapterFormatError(f"'{name}': has {CONFIG_FILE} but no {TENSOR_FILE}. Copy the whole folder.")


def _require_read(files: Collection[str], name: str) -> None:
    """See to it that nothing that was trained lies in a file that is not read."""
    if (reason := why_incomplete(files, name)) is not None:
        raise AdapterFormatError(f"'{name}': {reason}")
    if MLX_FILE in files and TENSOR_FILE not in files:
        raise AdapterFormatError(
            f"'{name}': {MLX_FILE} is in mlx-lm's layout, whose names and axes differ from PEFT's. Convert it to "
            "PEFT's layout, or merge it with mlx_lm.fuse and pass the result: portllm capture --base BASE "
            "--tuned TUNED."
        )
