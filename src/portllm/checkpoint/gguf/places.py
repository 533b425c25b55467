"""Where a GGUF file has the weight of a module of transformers: its name there, and the order of its rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.checkpoint.gguf.tensors import architectures
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX
from portllm.files.source import LocalFile
from portllm.tensors.encoding import GGMLBlocks

LAYERS = "model.layers."


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor of a GGUF file.

    Attributes:
        name: What it is called there.
        heads: Heads whose rows are reordered for rotary embedding; 0 where the rows are as transformers has them.
        offset: What llama.cpp adds to every value.
    """

    name: str
    heads: int
    offset: float = 0.0


def gguf_file_of(checkpoint: Checkpoint) -> Path | None:
    """The GGUF file that a model is opened from; None for another one."""
    paths = [file.path for file in checkpoint.files if isinstance(file, LocalFile)]
    return paths[0] if len(paths) == 1 and paths[0].suffix == GGUF_SUFFIX else None


def architecture_of(checkpoint: Checkpoint) -> str | None:
    """What `general.architecture` of a model's GGUF file is; None where its tensors are not known here."""
    model_type = checkpoint.config.get("model_type")
    return next((name for name, known in architectures().items() if model_type in known.model_types), None)


def place_of(tensor: str, checkpoint: Checkpoint) -> Place | None:
    """Where the GGUF file of a model has a tensor; None where it has none of that name.

    Args:
        tensor: Its current name.
        checkpoint: The model, of a known architecture.
    """
    name = architecture_of(checkpoint)
    if name is None:
        return None
    architecture = architectures()[name]
    prefix, rules = "", architecture.outer
    wanted = tensor
    if tensor.startswith(LAYERS):
        layer, _, wanted = tensor.removeprefix(LAYERS).partition(".")
        prefix, rules = f"blk.{layer}.", architecture.layer
    found = next(((stored, rule) for stored, rule in rules.items() if rule.name == wanted), None)
    if found is None:
        return None
    stored, rule = found
    return Place(prefix + stored, _heads(tensor, rule.heads, checkpoint) if rule.heads else 0, rule.offset)


def _heads(tensor: str, counted: str, checkpoint: Checkpoint) -> int:
    info = checkpoint.tensor(tensor)
    if info is not None and isinstance(info.encoding, GGMLBlocks):
        return info.encoding.heads
    config: Mapping[str, object] = checkpoint.config
    all_heads = config["num_attention_heads"]
    found = all_heads if counted == "heads" else config.get("num_key_value_heads") or all_heads
    assert isinstance(found, int)
    return found
