"""From a GGUF file to a Hugging Face checkpoint folder that runs: weights, configuration and tokenizer.

This is done for the architecture `llama` alone: the weights of more architectures are read
(`portllm.checkpoint.gguf.tensors`), but a folder that runs needs every hyperparameter and the tokenizer too. An unknown
hyperparameter is refused by name, since the folder would otherwise hold another model than the file.

Weights are dequantized to float32 and rounded once, to nearest, ties to even, to bfloat16, a block of rows at a time.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from portllm.checkpoint.gguf.file import GGUFFile, listed
from portllm.checkpoint.gguf.tensors import GGUFModel, open_gguf_model
from portllm.checkpoint.gguf.tokenizer import named_ids, read_tokens, tokenizer_config_json, tokenizer_json
from portllm.checkpoint.safetensors.writer import Entry, ShardWriter, lay_out, write_index
from portllm.progress import Progress, silent
from portllm.tensors.info import TensorInfo
from portllm.tensors.rounding import round_to_bfloat16
from portllm.tensors.windows import load_values

NAME = "llama"
"""The `general.architecture` that is converted."""

FIXED: Mapping[str, object] = {"attention_bias": False, "hidden_act": "silu", "mlp_bias": False}
"""Entries of `config.json` that it implies."""

_BLOCK_ELEMENTS = 2**21
"""Elements dequantized at once: 8 MB in float32, so that memory does not grow with the tensor."""

_HYPERPARAMETERS = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "vocab_size",
    }
)


def write_gguf_as_checkpoint(gguf_path: Path, folder: Path, *, progress: Progress = silent) -> None:
    """Write a GGUF file as a checkpoint that transformers loads: weights, configurations and tokenizer.

    The folder is filled in place; a caller that must not show half a model hands in a temporary one.

    Args:
        gguf_path: The file to convert.
        folder: An existing folder, which gets `model.safetensors` (bfloat16; shards and an index above 5 GB),
            `config.json`, `generation_config.json`, `tokenizer.json` and `tokenizer_config.json`.
        progress: Progress callback (bytes of weights written).

    Raises:
        MissingTensorError: A tensor that the architecture needs is not in the file.
        CheckpointError: The file is damaged, or holds something that is not supported; the message names it.
    """
    model = open_gguf_model(gguf_path)
    file = model.file
    sizes = {**model.sizes, "context": _check(model)}
    tokens = read_tokens(file)
    ids = named_ids(file, n_tokens=len(tokens))
    documents: dict[str, Mapping[str, object]] = {
        "config.json": _config_json(model, sizes, ids=ids),
        "generation_config.json": _token_ids(ids),
        "tokenizer.json": tokenizer_json(file, tokens),
        "tokenizer_config.json": tokenizer_config_json(file, tokens, context=sizes["context"]),
    }
    _write_weights(folder, model.infos, file=file, progress=progress)
    for document, value in documents.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (folder / document).write_text(text + "\n", encoding="utf-8", newline="\n")


def _check(model: GGUFModel) -> int:
    """The length of the context, once every hyperparameter is known to be one that the folder can say."""
    file, sizes = model.file, model.sizes
    name = file.text("general.architecture")
    if name != NAME:
        raise file.refuse(f"its architecture is '{name}'; only '{NAME}' can be converted to a model that runs.")
    unknown = [key for key in file.keys(f"{NAME}.") if key.removeprefix(f"{NAME}.") not in _HYPERPARAMETERS]
    if unknown:
        raise file.refuse(f"its metadata has {listed(unknown)}, which the conversion does not support.")
    hidden, heads, head = sizes["hidden"], sizes["heads"], sizes["head"]
    if hidden % heads:
        raise file.refuse(
            f"it has {heads} query heads, {sizes['key_heads']} key heads of {head} rows and a width of {hidden}; query "
            "heads must divide the width."
        )
    whole = f"{NAME}.rope.dimension_count"
    if file.has(whole) and file.integer(whole, least=1) != head:
        raise file.refuse(
            f"its metadata '{whole}' is {file.integer(whole)}; only the size of a key head, {head}, is supported."
        )
    return file.integer(f"{NAME}.context_length", least=1)


def _config_json(model: GGUFModel, sizes: Mapping[str, int], *, ids: Mapping[str, int]) -> dict[str, object]:
    file, name = model.file, NAME
    epsilon = _shortest(file.positive(f"{name}.attention.layer_norm_rms_epsilon"))
    theta = _shortest(file.positive(f"{name}.rope.freq_base")) if file.has(f"{name}.rope.freq_base") else 10000.0
    config = {
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": sizes["head"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["inner"],
        "max_position_embeddings": sizes["context"],
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["key_heads"],
        "rms_norm_eps": epsilon,
        # transformers 5 reads the first, earlier versions and other programs the second.
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "use_cache": True,
        "vocab_size": sizes["vocab"],
    }
    return dict(sorted((config | model.config | dict(FIXED) | _token_ids(ids)).items()))


def _token_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if name in ids}


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747378752e-06 that float32 makes of it."""
    return float(str(np.float32(value)))


def _write_weights(folder: Path, infos: Mapping[str, TensorInfo], *, file: GGUFFile, progress: Progress) -> None:
    entries = {name: Entry(name, "BF16", info.shape) for name, info in infos.items()}
    shards = lay_out(entries)
    total = sum(entry.n_bytes for entry in entries.values())
    label, done = f"converting {file.source.name}", 0
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for entry in shard.entries:
                for block in _bfloat16_blocks(infos[entry.name]):
                    writer.append(block)
                    done += len(block)
                    progress(label, done, total, "bytes")
    write_index(folder, shards)


def _bfloat16_blocks(info: TensorInfo) -> Iterator[bytes]:
    """The tensor's bytes as bfloat16, a block of rows at a time."""
    width = info.n_params // info.shape[0]
    step = max(1, _BLOCK_ELEMENTS // width) * width
    for start in range(0, info.n_params, step):
        values = load_values(info, start, min(start + step, info.n_params))
        yield round_to_bfloat16(np.ascontiguousarray(values)).astype("<u2").tobytes()
