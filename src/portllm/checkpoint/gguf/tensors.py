"""A GGUF file as the tensors of a checkpoint: which one of transformers each is, and how its bytes stand for it.

Which architectures are understood is data, in `architectures.json`, written by `scripts/gen_gguf.py`: for each tensor
of llama.cpp the name and the shape that it has in transformers, whether llama.cpp reordered its rows (`heads` counts
those of the projection) and what it added to its values (`offset`). Everything in the file must be accounted for by
that table: an unknown architecture or tensor, or a shape that does not fit the metadata, is refused by name.
"""

import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from portllm.checkpoint.gguf.file import GGUFFile, listed, open_gguf
from portllm.checkpoint.gguf.header import StoredTensor
from portllm.errors import CheckpointError, MissingTensorError
from portllm.files.source import LocalFile
from portllm.tensors.encoding import UNQUANTIZED, UNREADABLE, GGMLBlocks
from portllm.tensors.info import TensorInfo

FILE = "architectures.json"
HEAD = "lm_head.weight"
_HEAD_OF_LAYER = "blk."
Facts = Mapping[str, dict[str, Any]]
_LAYER_NAME = "model.layers.{layer}.{name}"


@dataclass(frozen=True, slots=True)
class TensorRule:
    """What becomes of one tensor.

    Attributes:
        name: Its name in the checkpoint, within its layer for a tensor that each layer has.
        shape: Its axes, outermost first, as names of sizes.
        heads: The size that counts its heads if llama.cpp reordered its rows for rotary embedding, else empty.
        offset: What llama.cpp added to every value.
        optional: Whether a file may lack it.
    """

    name: str
    shape: tuple[str, ...]
    heads: str = ""
    offset: float = 0.0
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Architecture:
    """How `general.architecture` becomes a model that transformers has.

    Attributes:
        model_types: What `model_type` of `config.json` may be; the first is that of the class.
        model_class: Its one entry of `architectures`.
        outer: Tensors outside the layers, by their name in the file.
        layer: Tensors of each layer, by their name in the file without `blk.N.`.
        left_out: Tensors of the file that are no weights of the model.
    """

    model_types: tuple[str, ...]
    model_class: str
    outer: Mapping[str, TensorRule]
    layer: Mapping[str, TensorRule]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GGUFModel:
    """A GGUF file as a model.

    Attributes:
        file: The file.
        architecture: What it says it is.
        sizes: By name, what its metadata says.
        infos: Every tensor by its name in the checkpoint, sorted.
    """

    file: GGUFFile
    architecture: Architecture
    sizes: Mapping[str, int]
    infos: Mapping[str, TensorInfo]

    @property
    def config(self) -> dict[str, object]:
        """What of `config.json` the architecture implies."""
        return {
            "architectures": [self.architecture.model_class],
            "model_type": self.architecture.model_types[0],
            "tie_word_embeddings": HEAD not in self.infos,
        }


def open_gguf_model(path: Path) -> GGUFModel:
    """Open a GGUF file as a model; its header is read, no tensor.

    Raises:
        MissingTensorError: A tensor that the architecture needs is not in the file.
        CheckpointError: The file is damaged, or holds something that is not supported; the message names it.
    """
    file = open_gguf(path)
    if file.has("split.count") and file.integer("split.count") > 1:
        raise file.refuse("is one of several parts. Join them with llama.cpp's 'llama-gguf-split --merge' first.")
    if file.has("general.type") and file.text("general.type") == "adapter":
        raise file.refuse(
            "is a LoRA adapter for llama.cpp, not a model. Pass the PEFT folder that it was converted from as the "
            "patch, and its base model as the base."
        )
    name = file.text("general.architecture")
    if name not in architectures():
        raise file.refuse(
            f"its architecture is '{name}'; supported: {listed(architectures())}. What llama.cpp did to the values of "
            "another one is not known here. Use the model in safetensors that the file was converted from."
        )
    sizes = _read_sizes(file, name)
    return GGUFModel(file, architectures()[name], sizes, _infos(file, architectures()[name], sizes))


@cache
def architectures() -> Mapping[str, Architecture]:
    """What `general.architecture` may be; written by `scripts/gen_gguf.py`."""
    text = importlib.resources.files("portllm.checkpoint.gguf").joinpath(FILE).read_text(encoding="utf-8")
    return {name: _architecture(**facts) for name, facts in json.loads(text).items()}


def _architecture(
    *, model_types: list[str], model_class: str, outer: Facts, layer: Facts, left_out: list[str]
) -> Architecture:
    of_model, of_layer = (
        {name: TensorRule(**{**rule, "shape": tuple(rule["shape"])}) for name, rule in part.items()}
        for part in (outer, layer)
    )
    return Architecture(tuple(model_types), model_class, of_model, of_layer, tuple(left_out))


def _read_sizes(file: GGUFFile, name: str) -> dict[str, int]:
    """The sizes that `TensorRule.shape` names, and the counts of layers and heads."""

    def size(key: str, default: int | None = None) -> int:
        whole = f"{name}.{key}"
        return default if default is not None and not file.has(whole) else file.integer(whole, least=1)

    hidden, heads = size("embedding_length"), size("attention.head_count")
    key_heads = size("attention.head_count_kv", heads)
    head = size("attention.key_length", max(1, hidden // heads))
    if heads % key_heads or head % 2:
        raise file.refuse(
            f"it has {heads} query heads, {key_heads} key heads of {head} rows and a width of {hidden}; query heads "
            "must be a multiple of the key heads and have an even number of rows."
        )
    if (value_head := size("attention.value_length", head)) != head:
        raise file.refuse(
            f"its metadata '{name}.attention.value_length' is {value_head}; only the size of a key head, {head}, is "
            "supported."
        )
    n_tokens = file.length("tokenizer.ggml.tokens")
    vocab = size("vocab_size", n_tokens)
    if n_tokens is not None and vocab != n_tokens:
        raise file.refuse(f"its metadata '{name}.vocab_size' is {vocab}; the vocabulary has {n_tokens} tokens.")
    inner, layers = size("feed_forward_length"), size("block_count")
    if layers > len(file.header.tensors):
        raise file.refuse(f"its metadata '{name}.block_count' is {layers}; it has {len(file.header.tensors)} tensors.")
    return {
        "head": head,
        "heads": heads,
        "hidden": hidden,
        "inner": inner,
        "inner_twice": 2 * inner,
        "key": key_heads * head,
        "key_heads": key_heads,
        "layers": layers,
        "query": heads * head,
        "query_key_value": (heads + 2 * key_heads) * head,
        "vocab": vocab,
    }


def _infos(file: GGUFFile, architecture: Architecture, sizes: Mapping[str, int]) -> dict[str, TensorInfo]:
    """Every tensor of the file by its name in the checkpoint; nothing left over, nothing missing."""
    rules: dict[str, tuple[str, TensorRule]] = {
        source: (rule.name, rule) for source, rule in architecture.outer.items()
    }
    for layer in range(sizes["layers"]):
        for source, rule in architecture.layer.items():
            name = _LAYER_NAME.format(layer=layer, name=rule.name)
            rules[f"{_HEAD_OF_LAYER}{layer}.{source}"] = (name, rule)
    tensors = {name: tensor for name, tensor in file.header.tensors.items() if name not in architecture.left_out}
    unknown = set(tensors) - set(rules)
    if unknown:
        raise file.refuse(f"its tensors {listed(unknown)} are not part of this architecture.")
    missing = {source for source, (_, rule) in rules.items() if not rule.optional} - set(tensors)
    if missing:
        raise MissingTensorError(f"'{file.source}': lacks the tensors {listed(missing)}. Download it again.")
    infos = {}
    for source, tensor in tensors.items():
        name, rule = rules[source]
        expected = tuple(sizes[axis] for axis in rule.shape)
        if tensor.shape != expected:
            axes = ", ".join(f"{axis}={sizes[axis]}" for axis in rule.shape)
            raise file.refuse(f"its tensor '{source}' is {tensor.shape}; its metadata implies ({axes}).")
        if tensor.type in UNREADABLE:
            raise _unreadable(file, tensor)
        infos[name] = _info(file.source, name, tensor, rule, sizes)
    return dict(sorted(infos.items()))


def _info(source: LocalFile, name: str, tensor: StoredTensor, rule: TensorRule, sizes: Mapping[str, int]) -> TensorInfo:
    heads = sizes[rule.heads] if rule.heads else 0
    is_plain = tensor.type in UNQUANTIZED
    encoding = GGMLBlocks(tensor.type, tensor.elements, tensor.block_bytes, heads, rule.offset)
    return TensorInfo(
        name,
        tensor.type if is_plain else "F32",
        tensor.shape,
        source,
        tensor.start,
        tensor.stop,
        None if is_plain and not heads and not rule.offset else encoding,
    )


def _unreadable(file: GGUFFile, tensor: StoredTensor) -> CheckpointError:
    return file.refuse(
        f"its tensor '{tensor.name}' is stored as {tensor.type}, which cannot be read. Use a file with another "
        "quantization."
    )
