"""Write how llama.cpp names the tensors of a model to `checkpoint/gguf/architectures.json`.

    python scripts/gen_gguf.py            write it
    python scripts/gen_gguf.py --check    exit with 1 if the file is not what the installed packages say

Which tensors a model has, and what their axes are, is asked of transformers, which builds it on the meta device; their
names in a file are asked of the `gguf` package. What llama.cpp does to their values is in neither: see `CHANGED`.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSOR, MODEL_TENSORS, TENSOR_NAMES, get_tensor_name_map

from portllm.checkpoint.gguf.tensors import FILE
from portllm.foreign import quiet

OUT = Path(__file__).parents[1] / "src" / "portllm" / "checkpoint" / "gguf" / FILE

REORDERED, NORMS_PLUS_ONE, AS_THEY_ARE = "reordered", "norms plus one", "as they are"
CHANGED: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "gemma": ("GemmaForCausalLM", NORMS_PLUS_ONE, ()),
    "gemma2": ("Gemma2ForCausalLM", NORMS_PLUS_ONE, ()),
    "gemma3": ("Gemma3ForCausalLM", NORMS_PLUS_ONE, ()),
    "granite": ("GraniteForCausalLM", REORDERED, ()),
    "llama": ("LlamaForCausalLM", REORDERED, ("mistral",)),
    "phi3": ("Phi3ForCausalLM", AS_THEY_ARE, ()),
    "qwen2": ("Qwen2ForCausalLM", AS_THEY_ARE, ()),
    "qwen3": ("Qwen3ForCausalLM", AS_THEY_ARE, ()),
    "smollm3": ("SmolLM3ForCausalLM", REORDERED, ()),
}
"""By architecture the class, what `modify_tensors` of llama.cpp's converter does to its values, and other model types
that have the same tensors.

Source: https://github.com/ggml-org/llama.cpp, convert_hf_to_gguf.py: `LlamaModel.permute`, which `GraniteModel` and
`SmolLM3Model` inherit, for query and key projections; `GemmaModel`, `Gemma2Model` and `Gemma3Model` add 1 to norms;
`Phi3MiniModel`, `Qwen2Model` and `Qwen3Model` change nothing. An architecture is added here once its part was read.
"""

HEADS = {"q_proj": "heads", "k_proj": "key_heads"}
SIZES = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 67, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 22, "num_hidden_layers": 1, "pad_token_id": 0,
}  # fmt: skip
"""Of the model that is built; no two of `AXES` are the same number."""

AXES = {
    "vocab": 211, "hidden": 96, "inner": 67, "inner_twice": 134, "head": 22, "query": 132, "key": 44,
    "query_key_value": 220,
}  # fmt: skip
DERIVED = (MODEL_TENSOR.ROPE_FREQS, MODEL_TENSOR.ROPE_FACTORS_LONG, MODEL_TENSOR.ROPE_FACTORS_SHORT)
"""Tensors of a file that follow from the configuration."""


def architecture(name: str) -> dict[str, Any]:
    """What is known of one architecture."""
    class_name, how, also = CHANGED[name]
    cls = getattr(transformers, class_name)
    number = next(MODEL_ARCH(number) for number, title in MODEL_ARCH_NAMES.items() if title == name)
    names = get_tensor_name_map(number, 1)  # one layer
    with quiet(), torch.device("meta"):
        model = cls(cls.config_class(**SIZES))
    outer, layer = {}, {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        stem, _, leaf = key.rpartition(".")
        stored, is_head = names.get_name(stem), key == "lm_head.weight"
        if stored is None and is_head:
            continue  # such a file has the embedding alone
        if stored is None:
            raise ValueError(f"{name}: the gguf package has no name for {key}")
        rule = {"name": key, "shape": shape_of(key, tuple(parameter.shape))}
        if how == REORDERED and leaf == "weight" and stem.rpartition(".")[2] in HEADS:
            rule["heads"] = HEADS[stem.rpartition(".")[2]]
        if how == NORMS_PLUS_ONE and stem.endswith("norm"):
            rule["offset"] = 1.0
        if is_head:
            rule["optional"] = True
        place, _, rest = stored.partition("blk.0.")
        if rest:
            layer[f"{rest}.{leaf}"] = {**rule, "name": key.removeprefix("model.layers.0.")}
        else:
            outer[f"{place}.{leaf}"] = rule
    return {
        "model_types": [model.config.model_type, *also],
        "model_class": class_name,
        "outer": outer,
        "layer": layer,
        "left_out": sorted(f"{TENSOR_NAMES[tensor]}.weight" for tensor in DERIVED if tensor in MODEL_TENSORS[number]),
    }


def shape_of(key: str, shape: tuple[int, ...]) -> list[str]:
    """The axes of a tensor by the names of sizes."""
    axes = {size: axis for axis, size in AXES.items()}
    if unknown := [size for size in shape if size not in axes]:
        raise ValueError(f"{key}: what its axis of {unknown[0]} is, is not known")
    return [axes[size] for size in shape]


def render() -> str:
    """The file: a line for each architecture."""
    lines = [f"{json.dumps(name)}: {json.dumps(architecture(name))}" for name in sorted(CHANGED)]
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(description="Write how llama.cpp names the tensors of a model, or check it.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the file is stale")
    check = parser.parse_args().check
    text = render()
    if check:
        return int(OUT.read_text(encoding="utf-8") != text)
    OUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
