"""PEFT's adapter folder, both directions. The names of its keys live here and nowhere else.

Reading takes the headers only; a factor stays on disk, described by a `TensorInfo`, until somebody loads it. Every
tensor of the file is accounted for: it becomes part of a delta, or the folder is refused with all such tensors named.
"""

import importlib.resources
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import fastjsonschema
from blake3 import blake3

from portllm.checkpoint.header import DTYPE_BITS, FLOAT_DTYPES, TensorInfo, render_header
from portllm.checkpoint.reader import names_hub, read_bytes, read_header, read_json
from portllm.checkpoint.source import Source
from portllm.checkpoint.writer import METADATA
from portllm.errors import AdapterFormatError, PatchRecordError
from portllm.patch.adapter_config import AdapterConfig, parse_adapter_config
from portllm.patch.delta import LowRankDelta
from portllm.patch.patch import Patch
from portllm.patch.record import PatchRecord, record_from_json, record_to_json

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
RECORD_FILE = "patch.json"

_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")

UNSUPPORTED_KEYS: Mapping[str, str] = {
    "lora_magnitude_vector": "a DoRA magnitude",
    "lora_embedding_": "a LoRA of an embedding",
    "lora_B.bias": "a bias of lora_B (lora_bias)",
    "trainable_tokens_delta": "trained token rows (trainable_token_indices)",
    "modules_to_save": "a whole saved module (modules_to_save)",
    ".bias": "a trained bias",
}


def load_patch(folder: str | Path) -> Patch[TensorInfo]:
    """Open an adapter folder, with its `patch.json` where it has one; no tensor byte is read.

    Args:
        folder: A folder, or an adapter of the Hugging Face Hub (`org/name` or `org/name@revision`), whose three files
            are brought into huggingface_hub's cache.

    Raises:
        NotFoundError, RemoteError: An adapter of the hub is not there, or cannot be fetched.
        AdapterFormatError: It is not an adapter that is understood whole.
        PatchRecordError: Its `patch.json` breaks the schema.
        HeaderError: Its tensor file is damaged.
    """
    path = Path(folder)
    name = str(folder)
    revision = None
    if names_hub(name):
        path, revision = _fetch(name)
    _require_files(path, name)
    config = parse_adapter_config(read_json(path / CONFIG_FILE, error=AdapterFormatError), where=name)
    tensors = read_header(path / TENSOR_FILE).tensors
    factors = _pair_factors(tensors, where=name)
    problems = [problem for module, pair in factors.items() if (problem := _pair_problem(module, pair, config))]
    if problems:
        raise AdapterFormatError(f"'{name}': {_first(problems)}")
    deltas = {
        module: LowRankDelta(a=pair["A"], b=pair["B"], scale=config.scale_of(module))
        for module, pair in factors.items()
    }
    copies = {match["module"]: info for key, info in tensors.items() if (match := _BASE_COPY.fullmatch(key))}
    return Patch(name, deltas, config, read_record(path), copies, revision=revision)


def read_record(folder: Path) -> PatchRecord | None:
    """The content of a folder's `patch.json`, checked against the schema; None where there is no such file.

    Raises:
        PatchRecordError: The file breaks the schema.
    """
    file = folder / RECORD_FILE
    if not file.exists():
        return None
    value = read_json(file, error=PatchRecordError)
    try:
        _validator()(value)
        return record_from_json(value)
    except (fastjsonschema.JsonSchemaValueException, ValueError) as error:
        raise PatchRecordError(
            f"'{file}': {error}. It was written by another version or changed by hand; capture the patch again."
        ) from error


def write_record(folder: Path, record: PatchRecord) -> None:
    """Write `patch.json`."""
    text = json.dumps(record_to_json(record), indent=2, ensure_ascii=False) + "\n"
    (folder / RECORD_FILE).write_text(text, encoding="utf-8")


def write_patch(folder: Path, patch: Patch[TensorInfo], *, base_name: str, base_revision: str | None = None) -> None:
    """Write a patch whose factors lie on disk into a folder that PEFT loads; without the record.

    The tensors are copied as bytes, in the order of their names, so that the same patch gives the same file.

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
    with open(folder / TENSOR_FILE, "wb") as file:
        file.write(render_header([(key, info.dtype, info.shape) for key, info in tensors.items()], METADATA))
        for info in tensors.values():
            file.write(read_bytes(info))


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
    keyed = {
        f"base_model.model.{module}.lora_{letter}.weight": factor
        for module, delta in patch.deltas.items()
        for letter, factor in (("A", delta.a), ("B", delta.b))
    }
    return dict(sorted(keyed.items(), key=lambda pair: (-DTYPE_BITS[pair[1].dtype], pair[0])))


def files_of(patch: Patch[TensorInfo]) -> tuple[Source, ...]:
    """The files that hold a patch's tensors, sorted."""
    return tuple(sorted({info.file for info in stored_tensors(patch).values()}, key=str))


def folder_of(patch: Patch[TensorInfo]) -> Path:
    """The folder that a patch was opened from, for programs that load it themselves."""
    return Path(str(files_of(patch)[0])).parent


def digest_tensors(patch: Patch[TensorInfo]) -> dict[str, str]:
    """The blake3 digest of every stored tensor's bytes, by PEFT's key."""
    return {key: blake3(read_bytes(info)).hexdigest() for key, info in stored_tensors(patch).items()}


def _fetch(name: str) -> tuple[Path, str]:
    """Bring an adapter of the hub into the cache; the folder there, and the commit hash."""
    from portllm.checkpoint.hub import fetch, look_up  # loads an HTTP client, which few runs need

    repository = look_up(name)
    files = [file for file in (CONFIG_FILE, TENSOR_FILE, RECORD_FILE) if file in repository.files]
    if CONFIG_FILE not in files:
        raise AdapterFormatError(f"'{name}': has no {CONFIG_FILE} on the hub, so it is not an adapter.")
    if TENSOR_FILE not in files:
        pickled = (
            f"; its {PICKLE_FILE}, a pickle, can run code and is never read" if PICKLE_FILE in repository.files else ""
        )
        raise AdapterFormatError(
            f"'{name}': has no {TENSOR_FILE} on the hub{pickled}. Ask its author for one, or convert it and give the "
            "folder."
        )
    return fetch(repository, files), repository.revision


def _require_files(path: Path, name: str) -> None:
    if not path.is_dir():
        raise AdapterFormatError(f"'{name}': no such folder. A patch is a folder with {CONFIG_FILE} and {TENSOR_FILE}.")
    if not (path / CONFIG_FILE).is_file():
        inner = next((child.parent.name for child in sorted(path.glob(f"*/{CONFIG_FILE}"))), None)
        hint = f" Its subfolder '{inner}' is one: give that." if inner else ""
        raise AdapterFormatError(f"'{name}': has no {CONFIG_FILE}, so it is not an adapter folder.{hint}")
    if (path / TENSOR_FILE).is_file():
        return
    if (path / PICKLE_FILE).is_file():
        raise AdapterFormatError(
            f"'{name}': holds {PICKLE_FILE}, a pickle, which can run code and is never read. If you trust it, convert "
            'it once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path / PICKLE_FILE}', "
            f"weights_only=True), '{path / TENSOR_FILE}')\"."
        )
    raise AdapterFormatError(f"'{name}': has {CONFIG_FILE} but no {TENSOR_FILE}. Copy the whole folder.")


def _pair_factors(tensors: Mapping[str, TensorInfo], *, where: str) -> dict[str, dict[str, TensorInfo]]:
    """The two factors of each module, or a refusal that names every tensor that is neither such a factor nor a copy."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    problems: list[str] = []
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        kind = next((kind for part, kind in UNSUPPORTED_KEYS.items() if part in key), None)
        if _BASE_COPY.fullmatch(key):
            continue
        if match and not kind:
            factors.setdefault(match["module"], {})[match["factor"]] = tensors[key]
        else:
            problems.append(f"tensor '{key}' is {kind or 'no factor of a LoRA'}, which is not supported")
    problems += [
        f"module '{module}' has lora_{next(iter(pair))} but not its partner"
        for module, pair in factors.items()
        if len(pair) != 2
    ]
    if not factors and not problems:
        problems.append("there is no factor of a LoRA in it")
    if problems:
        raise AdapterFormatError(f"'{where}': {_first(problems)}")
    return factors


def _pair_problem(module: str, pair: Mapping[str, TensorInfo], config: AdapterConfig) -> str | None:
    """What is wrong with the factors of one module, or None."""
    a, b = pair["A"], pair["B"]
    for info in (a, b):
        if info.dtype not in FLOAT_DTYPES:
            return f"tensor '{info.name}' has dtype {info.dtype}, expected one of {', '.join(FLOAT_DTYPES)}"
        if len(info.shape) != 2:
            return f"tensor '{info.name}' has shape {info.shape}, expected two axes"
    if a.shape[0] != b.shape[1]:
        return f"module '{module}': lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}"
    if a.shape[0] != config.rank_of(module):
        return (
            f"module '{module}': its tensors have rank {a.shape[0]}, {CONFIG_FILE} says {config.rank_of(module)}, so "
            "its scale cannot be known"
        )
    return None


def _first(problems: list[str], *, shown: int = 10) -> str:
    rest = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
    return "; ".join(problems[:shown]) + rest + "."


@cache
def _validator() -> Callable[[object], object]:
    text = importlib.resources.files("portllm.patch").joinpath("patch.schema.json").read_text(encoding="utf-8")
    compiled: Callable[[object], object] = fastjsonschema.compile(json.loads(text))
    return compiled
