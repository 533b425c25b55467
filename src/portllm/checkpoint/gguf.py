"""From a GGUF file to a Hugging Face checkpoint folder.

Which architectures are understood is a table, `ARCHITECTURES`: how its metadata becomes `config.json`, and for each
tensor the name, the shape and whether llama.cpp reordered its rows. Everything in the file must be accounted for by
the row: an unknown tensor, an unknown hyperparameter or a shape that does not fit is refused by name, since the
folder would otherwise hold another model than the file.

Weights are dequantized to float32 and rounded once, to nearest even, to bfloat16, a block of rows at a time.

Sources: llama.cpp's `convert_hf_to_gguf.py` (names, and the permutation in `LlamaModel.permute`); the GGUF
specification (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from gguf import ReaderTensor, dequantize

from portllm.checkpoint.gguf_file import GGUFFile, listed, open_gguf
from portllm.checkpoint.gguf_tokenizer import named_ids, read_tokens, tokenizer_config_json, tokenizer_json
from portllm.checkpoint.writer import Entry, ShardWriter, lay_out, write_index
from portllm.errors import CheckpointError, MissingTensorError
from portllm.progress import Progress, silent

_BLOCK_ELEMENTS = 2**21
"""Elements dequantized at once: 8 MB in float32, so that memory does not grow with the tensor."""

_QUIET_NAN = 0x7FC0
"""What PyTorch makes of every NaN that it rounds to bfloat16."""


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What becomes of one tensor.

    Attributes:
        name: Its name in the checkpoint, within its layer for a tensor that each layer has.
        shape: Its axes, outermost first, as names of sizes.
        heads: The size that counts its heads if llama.cpp reordered its rows for rotary embedding, else empty.
        optional: Whether a file may lack it.
    """

    name: str
    shape: tuple[str, ...]
    heads: str = ""
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """One row of `ARCHITECTURES`: how `general.architecture` becomes a model that transformers loads.

    Attributes:
        model_type: `model_type` of `config.json`.
        model_class: Its one entry of `architectures`.
        outer: Tensors outside the layers, by their name in the file.
        layer: Tensors of each layer, by their name in the file without `blk.N.`.
        fixed: Entries of `config.json` that the architecture implies.
    """

    model_type: str
    model_class: str
    outer: Mapping[str, TensorRule]
    layer: Mapping[str, TensorRule]
    fixed: Mapping[str, object] = field(default_factory=dict)


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        model_type="llama",
        model_class="LlamaForCausalLM",
        outer={
            "token_embd.weight": TensorRule("model.embed_tokens.weight", ("vocab", "hidden")),
            "output_norm.weight": TensorRule("model.norm.weight", ("hidden",)),
            "output.weight": TensorRule("lm_head.weight", ("vocab", "hidden"), optional=True),
        },
        layer={
            "attn_norm.weight": TensorRule("input_layernorm.weight", ("hidden",)),
            "attn_q.weight": TensorRule("self_attn.q_proj.weight", ("query", "hidden"), heads="heads"),
            "attn_k.weight": TensorRule("self_attn.k_proj.weight", ("key", "hidden"), heads="key_heads"),
            "attn_v.weight": TensorRule("self_attn.v_proj.weight", ("key", "hidden")),
            "attn_output.weight": TensorRule("self_attn.o_proj.weight", ("hidden", "query")),
            "ffn_norm.weight": TensorRule("post_attention_layernorm.weight", ("hidden",)),
            "ffn_gate.weight": TensorRule("mlp.gate_proj.weight", ("inner", "hidden")),
            "ffn_up.weight": TensorRule("mlp.up_proj.weight", ("inner", "hidden")),
            "ffn_down.weight": TensorRule("mlp.down_proj.weight", ("hidden", "inner")),
        },
        fixed={"attention_bias": False, "hidden_act": "silu", "mlp_bias": False},
    ),
}
"""What `general.architecture` may be; supporting another one is one more row."""

_HEAD_OF_LAYER = "blk."
_LAYER_NAME = "model.layers.{layer}.{name}"
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


@dataclass(frozen=True, slots=True)
class _Conversion:
    """One tensor on its way: where it comes from, and what it is called and shaped at the end."""

    source: ReaderTensor
    name: str
    shape: tuple[int, ...]
    n_heads: int


def write_gguf_as_checkpoint(gguf_path: Path, folder: Path, *, progress: Progress = silent) -> None:
    """Write a GGUF file as a checkpoint that transformers loads: weights, configurations and tokenizer.

    The folder is filled in place; a caller that must not show half a model hands in a temporary one.

    Args:
        gguf_path: The file to convert.
        folder: An existing folder, which gets `model.safetensors` (bfloat16; shards and an index above 5 GB),
            `config.json`, `generation_config.json`, `tokenizer.json` and `tokenizer_config.json`.
        progress: Told of the bytes of weights written.

    Raises:
        MissingTensorError: A tensor that the architecture needs is not in the file.
        CheckpointError: The file is damaged, or holds something that is not supported; the message names it.
    """
    file = open_gguf(gguf_path)
    name = file.text("general.architecture")
    if name not in ARCHITECTURES:
        raise file.refuse(f"its architecture is '{name}'; supported: {listed(ARCHITECTURES)}.")
    architecture = ARCHITECTURES[name]
    tokens = read_tokens(file)
    sizes = _read_sizes(file, name, n_tokens=len(tokens))
    conversions = _plan(file, architecture, sizes)
    tied = all(conversion.name != "lm_head.weight" for conversion in conversions)
    ids = named_ids(file, n_tokens=len(tokens))
    documents: dict[str, Mapping[str, object]] = {
        "config.json": _config_json(file, name, sizes, ids=ids, tied=tied),
        "generation_config.json": _token_ids(ids),
        "tokenizer.json": tokenizer_json(file, tokens),
        "tokenizer_config.json": tokenizer_config_json(file, tokens, context=sizes["context"]),
    }
    _write_weights(folder, conversions, file=file, progress=progress)
    for document, value in documents.items():
        text = json.dumps(value, ensure_ascii=False, indent=2)
        (folder / document).write_text(text + "\n", encoding="utf-8", newline="\n")


def round_to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The bits of each value rounded to bfloat16, to nearest, ties to even; every NaN becomes one quiet NaN.

    bfloat16 is the upper half of a float32. Adding `0x7FFF + (lowest kept bit)` before the lower half is cut off
    carries into the upper half exactly when the value must be rounded up.

    Example:
        >>> [hex(bits) for bits in round_to_bfloat16(np.array([1.0, 1.00390625, 1.01171875], np.float32))]
        ['0x3f80', '0x3f80', '0x3f82']
    """
    bits = values.view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    rounded[np.isnan(values)] = _QUIET_NAN
    return rounded


def original_rows(n_rows: int, *, n_heads: int) -> npt.NDArray[np.intp]:
    """For each row of a query or key projection as transformers orders it, the row of the GGUF file that holds it.

    Within a head of `2 h` rows, rotary embedding turns row `i` together with row `i + h`. llama.cpp stores the two
    side by side, as rows `2 i` and `2 i + 1`; this undoes it.

    Example:
        >>> original_rows(8, n_heads=2).tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(n_rows).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _read_sizes(file: GGUFFile, name: str, *, n_tokens: int) -> dict[str, int]:
    """The sizes that `TensorRule.shape` names, and the counts of layers and heads."""
    unknown = [key for key in file.keys(f"{name}.") if key.removeprefix(f"{name}.") not in _HYPERPARAMETERS]
    if unknown:
        raise file.refuse(f"its metadata has {listed(unknown)}, which this conversion does not understand.")

    def size(key: str, default: int | None = None) -> int:
        whole = f"{name}.{key}"
        return default if default is not None and not file.has(whole) else file.integer(whole, least=1)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    key_heads = size("attention.head_count_kv", heads)
    head = size("attention.key_length", hidden // heads)
    if heads % key_heads or head % 2 or hidden % heads:
        raise file.refuse(
            f"it has {heads} query heads, {key_heads} key heads of {head} rows and a width of {hidden}; query heads "
            "must be a multiple of the key heads, divide the width, and have an even number of rows."
        )
    for key in ("attention.value_length", "rope.dimension_count"):
        if size(key, head) != head:
            raise file.refuse(
                f"its metadata '{name}.{key}' is {size(key)}; only the size of a key head, {head}, is supported."
            )
    vocab = size("vocab_size", n_tokens)
    if vocab != n_tokens:
        raise file.refuse(f"its metadata '{name}.vocab_size' is {vocab}; the vocabulary has {n_tokens} tokens.")
    return {
        "context": size("context_length"),
        "head": head,
        "heads": heads,
        "hidden": hidden,
        "inner": size("feed_forward_length"),
        "key": key_heads * head,
        "key_heads": key_heads,
        "layers": size("block_count"),
        "query": heads * head,
        "vocab": vocab,
    }


def _plan(file: GGUFFile, architecture: Architecture, sizes: Mapping[str, int]) -> list[_Conversion]:
    """Every tensor of the file with its place in the checkpoint, sorted by name; nothing left over, nothing missing."""
    rules = dict(architecture.outer)
    for layer in range(sizes["layers"]):
        for source, rule in architecture.layer.items():
            name = _LAYER_NAME.format(layer=layer, name=rule.name)
            rules[f"{_HEAD_OF_LAYER}{layer}.{source}"] = TensorRule(name, rule.shape, rule.heads, rule.optional)
    tensors = {tensor.name: tensor for tensor in file.tensors}
    unknown = set(tensors) - set(rules)
    if unknown:
        raise file.refuse(
            f"its tensors {listed(unknown)} are not part of the architecture as this conversion knows it."
        )
    missing = {source for source, rule in rules.items() if not rule.optional} - set(tensors)
    if missing:
        raise MissingTensorError(f"'{file.path}': lacks the tensors {listed(missing)}. Fetch the file again.")
    conversions = []
    for source, tensor in tensors.items():
        rule = rules[source]
        expected = tuple(sizes[axis] for axis in rule.shape)
        found = tuple(int(axis) for axis in reversed(tensor.shape.tolist()))  # GGUF lists the innermost axis first
        if found != expected:
            axes = ", ".join(f"{axis}={sizes[axis]}" for axis in rule.shape)
            raise file.refuse(f"its tensor '{source}' is {found}; its metadata implies ({axes}).")
        conversions.append(_Conversion(tensor, rule.name, expected, sizes[rule.heads] if rule.heads else 0))
    return sorted(conversions, key=lambda conversion: conversion.name)


def _config_json(
    file: GGUFFile, name: str, sizes: Mapping[str, int], *, ids: Mapping[str, int], tied: bool
) -> dict[str, object]:
    architecture = ARCHITECTURES[name]
    epsilon = _shortest(file.positive(f"{name}.attention.layer_norm_rms_epsilon"))
    theta = _shortest(file.positive(f"{name}.rope.freq_base")) if file.has(f"{name}.rope.freq_base") else 10000.0
    config = {
        "architectures": [architecture.model_class],
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "head_dim": sizes["head"],
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["inner"],
        "max_position_embeddings": sizes["context"],
        "model_type": architecture.model_type,
        "num_attention_heads": sizes["heads"],
        "num_hidden_layers": sizes["layers"],
        "num_key_value_heads": sizes["key_heads"],
        "rms_norm_eps": epsilon,
        # transformers 5 reads the first, earlier versions and other programs the second.
        "rope_parameters": {"rope_theta": theta, "rope_type": "default"},
        "rope_theta": theta,
        "tie_word_embeddings": tied,
        "use_cache": True,
        "vocab_size": sizes["vocab"],
    }
    return dict(sorted((config | dict(architecture.fixed) | _token_ids(ids)).items()))


def _token_ids(ids: Mapping[str, int]) -> dict[str, int]:
    return {f"{name}_id": ids[name] for name in ("bos_token", "eos_token", "pad_token") if name in ids}


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: 1e-05 for the 9.999999747378752e-06 that float32 makes of it."""
    return float(str(np.float32(value)))


def _write_weights(folder: Path, conversions: list[_Conversion], *, file: GGUFFile, progress: Progress) -> None:
    sources = {conversion.name: conversion for conversion in conversions}
    entries = {name: Entry(name, "BF16", conversion.shape) for name, conversion in sources.items()}
    shards = lay_out(entries)
    total = sum(entry.n_bytes for entry in entries.values())
    label, done = f"converting {file.path.name}", 0
    for shard in shards:
        with ShardWriter(folder, shard) as writer:
            for entry in shard.entries:
                for block in _bfloat16_blocks(sources[entry.name], file=file):
                    writer.append(block)
                    done += len(block)
                    progress(label, done, total, "bytes")
    write_index(folder, shards)


def _bfloat16_blocks(conversion: _Conversion, *, file: GGUFFile) -> Iterator[bytes]:
    """The tensor's bytes as bfloat16, a block of rows at a time.

    Rows are put in order before they are dequantized: no block of quantized values spans two rows.
    """
    tensor = conversion.source
    n_rows = conversion.shape[0]
    rows_at_once = max(1, _BLOCK_ELEMENTS * n_rows // tensor.n_elements)
    order = original_rows(n_rows, n_heads=conversion.n_heads) if conversion.n_heads else None
    for start in range(0, n_rows, rows_at_once):
        rows = slice(start, start + rows_at_once)
        stored = tensor.data[rows] if order is None else tensor.data[order[rows]]
        try:
            values = dequantize(stored, tensor.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"'{file.path}': tensor '{tensor.name}' is stored as {tensor.tensor_type.name}, which cannot be "
                "dequantized. Use a file of another quantization."
            ) from error
        yield round_to_bfloat16(np.ascontiguousarray(values, dtype=np.float32)).astype("<u2").tobytes()
