"""What of a folder that may be a stranger's reaches transformers and PEFT: the files and the fields that may pass.

Both act on more in a folder than weights and numbers: code, kernels to fetch, other models and adapters to load, files
of pickle. So they are never given the folder, but one of our own, for as long as they load: with the weights by link,
and with each small file written anew from the fields below. What is not named here is not there.
"""

import contextlib
import dis
import inspect
import json
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import cast

from portllm.checkpoint.model.checkpoint import CONFIG_FILE, Checkpoint
from portllm.checkpoint.safetensors.names import INDEX_FILE, SINGLE_FILE
from portllm.checkpoint.vocabulary import TOKENIZER_FILE
from portllm.errors import AdapterFormatError, CheckpointError
from portllm.files.json_file import read_config, read_json_text
from portllm.files.source import LocalFile
from portllm.foreign import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    foreign,
    quiet,
    tokenizer_class_from_name,
)
from portllm.patch.adapter_config import UNDERSTOOD_FIELDS
from portllm.patch.adapter_folder import CONFIG_FILE as ADAPTER_CONFIG_FILE
from portllm.patch.adapter_folder import TENSOR_FILE, load_patch, stored_tensors

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
ADDED_TOKENS_FILE = "added_tokens.json"

DTYPES = ("bfloat16", "float16", "float32", "float64")

COMMON_FIELDS = frozenset(
    {
        "architectures", "bos_token_id", "eos_token_id", "head_dim", "model_type", "original_max_position_embeddings",
        "pad_token_id", "partial_rotary_factor", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window",
        "tie_word_embeddings", "transformers_version",
    }
)  # fmt: skip
"""Of a model's configuration, beside the fields of its own type: some types read them without declaring them."""

LAYERS_FIELD = "per_layer_config"
"""Where fields of a single layer stand, by its number."""

BITSANDBYTES = "bitsandbytes"
QUANTIZATION_FIELDS = frozenset(
    {
        "_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant", "llm_int8_has_fp16_weight", "llm_int8_skip_modules", "llm_int8_threshold",
        "load_in_4bit", "load_in_8bit", "quant_method",
    }
)  # fmt: skip

GENERATION_FIELDS = frozenset(
    {
        "bos_token_id", "do_sample", "eos_token_id", "min_p", "pad_token_id", "repetition_penalty", "temperature",
        "top_k", "top_p", "transformers_version", "typical_p",
    }
)  # fmt: skip

TOKENIZER_FIELDS = frozenset(
    {
        "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
        "clean_up_tokenization_spaces", "do_lower_case", "errors", "extra_special_tokens", "legacy",
        "model_input_names", "model_max_length", "padding_side", "spaces_between_special_tokens",
        "split_special_tokens", "strip_accents", "tokenize_chinese_chars", "trim_offsets", "truncation_side",
    }
)  # fmt: skip
"""Of a tokenizer's configuration, beside its class and the fields `*_token`."""

TOKENIZER_MODEL_FIELDS = frozenset({"model_type", "transformers_version", "vocab_size"})
"""Of a model's configuration, what chooses how its tokenizer is read."""

ADAPTER_FIELDS = UNDERSTOOD_FIELDS | {"base_model_name_or_path", "lora_dropout", "peft_type", "task_type"}

MOST_LAYERS = 1000
"""That a configuration may speak of, where the weights have fewer tensors than that."""


@contextlib.contextmanager
def cleared_model(checkpoint: Checkpoint) -> Iterator[Path]:
    """A folder with what may pass of a causal language model.

    Args:
        checkpoint: In a folder on disk.

    Raises:
        CheckpointError: It is of no type that transformers runs, needs more than fields that may pass, or speaks of
            more layers than there are tensors.
    """
    where = checkpoint.name
    kind = _kind(checkpoint.config, where=where)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"'{where}': transformers has no causal language model of type '{checkpoint.config['model_type']}'. "
            "Use a causal (decoder) language model."
        )
    config = _passing(checkpoint.config, kind, where=where)
    _check_layers(config, most=max(MOST_LAYERS, len(checkpoint.infos)), where=where)
    folder = cast(Path, checkpoint.folder)
    files: dict[str, Mapping[str, object]] = {CONFIG_FILE: config}
    if generation := _only(_read(folder / GENERATION_FILE), GENERATION_FIELDS):
        files[GENERATION_FILE] = generation
    links = [folder / INDEX_FILE] if not (folder / SINGLE_FILE).is_file() else []
    links += [file.path for file in checkpoint.files if isinstance(file, LocalFile)]
    with _folder(files, links=links) as cleared:
        yield cleared


@contextlib.contextmanager
def cleared_tokenizer(folder: Path) -> Iterator[Path]:
    """A folder with what may pass of a tokenizer: what the tokenizers library reads, and how transformers uses it.

    Raises:
        CheckpointError: It has no `tokenizer.json`, is code of its own, or a file of it is damaged.
    """
    if not (folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"'{folder}': has no '{TOKENIZER_FILE}', so transformers cannot load its tokenizer. "
            "Copy it from the model's own folder."
        )
    config, model = (_read(folder / name) for name in (TOKENIZER_CONFIG_FILE, CONFIG_FILE))
    passing = {name: value for name, value in config.items() if name in TOKENIZER_FIELDS or _is_token(name)}
    if not isinstance(passing.get("model_max_length", 0), int | float):
        del passing["model_max_length"]
    files: dict[str, Mapping[str, object]] = {
        TOKENIZER_CONFIG_FILE: passing | _tokenizer_class(config, model, where=str(folder)),
        CONFIG_FILE: _only(model, TOKENIZER_MODEL_FIELDS),
        SPECIAL_TOKENS_FILE: {
            name: token for name, token in _read(folder / SPECIAL_TOKENS_FILE).items() if _is_token(name)
        },
        ADDED_TOKENS_FILE: {name: row for name, row in _read(folder / ADDED_TOKENS_FILE).items() if type(row) is int},
    }
    with _folder(files) as cleared:
        (cleared / TOKENIZER_FILE).write_bytes(read_json_text(folder / TOKENIZER_FILE))
        yield cleared


@contextlib.contextmanager
def cleared_adapter(folder: Path, modules: Iterable[str]) -> Iterator[Path]:
    """A folder with what may pass of an adapter onto these modules: its tensors, and the fields that are understood.

    Raises:
        PatchError: It is not an adapter that is understood whole and fits its base as it is.
        AdapterFormatError: PEFT could take forever over its patterns, or would make more of it than its tensors hold.
    """
    patch = load_patch(folder)
    if patch.config.takes_peft_long(modules):
        raise AdapterFormatError(
            f"'{folder}': PEFT could take forever to match the patterns in its '{ADAPTER_CONFIG_FILE}'. Name the "
            "modules without patterns."
        )
    fields = patch.config.fields
    ranks = [fields["r"], *cast(Mapping[str, object], fields.get("rank_pattern") or {}).values()]
    longest = max(side for info in stored_tensors(patch).values() for side in info.shape)
    if (rank := max(cast(list[int], ranks))) > longest:
        raise AdapterFormatError(
            f"'{folder}': '{ADAPTER_CONFIG_FILE}' says rank {rank}, but no tensor dimension exceeds {longest}. "
            "Correct it."
        )
    with _folder({ADAPTER_CONFIG_FILE: _only(fields, ADAPTER_FIELDS)}, links=[folder / TENSOR_FILE]) as cleared:
        yield cleared


@contextlib.contextmanager
def _folder(files: Mapping[str, Mapping[str, object]], *, links: Sequence[Path] = ()) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="portllm-") as name:
        cleared = Path(name)
        for file, values in files.items():
            (cleared / file).write_text(json.dumps(values), encoding="utf-8")
        for target in links:
            (cleared / target.name).symlink_to(target.resolve())
        yield cleared


def _read(file: Path) -> dict[str, object]:
    """A small JSON file; empty where there is none."""
    return read_config(file) if file.is_file() else {}


def _only(values: Mapping[str, object], names: Collection[str]) -> dict[str, object]:
    return {name: value for name, value in values.items() if name in names}


def _is_token(name: str) -> bool:
    return name.endswith(("_token", "_special_tokens"))


def _tokenizer_class(config: Mapping[str, object], model: Mapping[str, object], *, where: str) -> dict[str, object]:
    """The tokenizer's class, where it is one of transformers that reads `tokenizer.json`; otherwise the plainest."""
    name = config.get("tokenizer_class") or model.get("tokenizer_class")
    if name is None:
        return {}
    with quiet(), foreign(lambda why: CheckpointError(f"'{where}': transformers cannot load its tokenizer: {why}")):
        kind = tokenizer_class_from_name(name) if isinstance(name, str) else None
    if isinstance(kind, type) and issubclass(kind, PreTrainedTokenizerFast):
        return {"tokenizer_class": name}
    if "auto_map" in config:
        raise CheckpointError(
            f"'{where}': its tokenizer is custom code, which is never run. Save a transformers tokenizer to the "
            "folder with save_pretrained."
        )
    return {"tokenizer_class": PreTrainedTokenizerFast.__name__}


def _kind(config: Mapping[str, object], *, where: str) -> type[PreTrainedConfig]:
    """The class of a configuration, by its type."""
    name = config.get("model_type")
    # What Mistral calls Ministral was of the type of its predecessor at first.
    name = "ministral" if name == "mistral" and "layer_types" in config else name
    try:
        kind: type[PreTrainedConfig] = CONFIG_MAPPING[name]
    except (KeyError, TypeError):
        raise CheckpointError(
            f"'{where}': transformers cannot load it as a causal language model: its '{CONFIG_FILE}' has the "
            f"model_type {name!r}, which it does not support. Code from a model's folder is never run."
        ) from None
    return kind


def _passing(config: Mapping[str, object], kind: type[PreTrainedConfig], *, where: str) -> dict[str, object]:
    """The fields of a configuration that may pass, in those inside it too."""
    known = _known_fields(kind)
    passing = _only(config, known)
    if isinstance(layers := config.get(LAYERS_FIELD), dict):
        passing[LAYERS_FIELD] = {
            number: _only(fields, known) for number, fields in layers.items() if isinstance(fields, dict)
        }
    for name, inner in kind.sub_configs.items():
        if isinstance(value := config.get(name), dict):
            chosen = inner if issubclass(inner, PreTrainedConfig) else _kind(_typed(value, kind, name), where=where)
            passing[name] = _passing(value, chosen, where=where)
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype in DTYPES:
        passing["dtype"] = dtype
    if (quantization := config.get("quantization_config")) is not None:
        passing["quantization_config"] = _passing_quantization(quantization, where=where)
    return passing


def _typed(config: dict[str, object], kind: type[PreTrainedConfig], name: str) -> dict[str, object]:
    """A configuration inside another one, with the type that it has where it does not say so."""
    usual = getattr(kind, "sub_configs_defaults", {}).get(name)
    return {"model_type": getattr(usual, "model_type", None), **config}


def _known_fields(kind: type[PreTrainedConfig]) -> set[str]:
    """The fields that a type of model declares itself, and those that the code of its configuration names or sets."""
    general = set(inspect.signature(PreTrainedConfig).parameters)
    own = {*inspect.signature(kind).parameters, *kind.attribute_map}
    for ancestor in kind.__mro__[: kind.__mro__.index(PreTrainedConfig)]:
        for value in vars(ancestor).values():
            if inspect.isfunction(value):
                own |= _names_in(inspect.unwrap(value).__code__)
    return {*COMMON_FIELDS} | {
        name for name in own - general if not hasattr(PreTrainedConfig, name) and not name.startswith("_")
    }


def _names_in(code: CodeType) -> set[str]:
    """The texts in a function that could be the names of fields, and the attributes that it sets."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname == "STORE_ATTR"}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            found |= _names_in(constant)
        else:
            texts = constant if isinstance(constant, tuple | frozenset) else (constant,)
            found |= {text for text in texts if isinstance(text, str) and text.isidentifier()}
    return found


def _passing_quantization(fields: object, *, where: str) -> dict[str, object]:
    """The fields of a quantization that may pass: that of bitsandbytes, which fetches nothing."""
    method = (fields.get("quant_method") or BITSANDBYTES) if isinstance(fields, dict) else None
    if not isinstance(fields, dict) or method != BITSANDBYTES:
        raise CheckpointError(
            f"'{where}': its weights are quantized by {method!r}; of quantized models, only those of "
            f"{BITSANDBYTES!r} can be run. Use the original unquantized model."
        )
    passing = _only(fields, QUANTIZATION_FIELDS)
    for name in ("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"):
        if passing.get(name) not in (*DTYPES, "uint8", None):
            del passing[name]
    return {**passing, "quant_method": BITSANDBYTES}


def _check_layers(config: Mapping[str, object], *, most: int, where: str) -> None:
    """See to it that no loop over layers, of which transformers has some before it makes any, goes on for long."""
    for name, value in config.items():
        if isinstance(value, dict):
            _check_layers(value, most=most, where=where)
        elif "layer" in name and isinstance(value, int | float) and value > most:
            raise CheckpointError(
                f"'{where}': '{name}' in its '{CONFIG_FILE}' is {value}, which exceeds its number of tensors. The "
                "configuration belongs to another model: download both again."
            )
