"""Quantized models: 4-bit folders that transformers and bitsandbytes write, and GGUF files of each architecture."""

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFWriter, quantize

from portllm.checkpoint.gguf.tensors import architectures

SIZES = {
    "head": 8, "heads": 4, "hidden": 256, "inner": 512, "inner_twice": 1024, "key": 16, "key_heads": 2, "layers": 2,
    "query": 32, "query_key_value": 64, "vocab": 40,
}  # fmt: skip
"""What `write_gguf` writes: rows of 256 where a block of the K-quants needs as many."""


def quantize_model(base, folder, *, kind="nf4", double=False, dtype=torch.bfloat16):
    """Loads the model of a folder in 4 bit and saves it; what transformers writes of it."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype=dtype).save_pretrained(folder)
    return folder


def write_gguf(path, name="llama", *, storage="Q8_0", metadata=None, title=None):
    """Writes a file of an architecture as llama.cpp's converter would; its float32 weights by their names here.

    Matrices whose rows fill whole blocks are stored as `storage`, the others as F16, vectors as F32.
    """
    architecture = architectures()[name]
    draw = np.random.default_rng(1)
    writer = GGUFWriter(path, title or name)
    values = {
        "block_count": SIZES["layers"], "embedding_length": SIZES["hidden"], "feed_forward_length": SIZES["inner"],
        "attention.head_count": SIZES["heads"], "attention.head_count_kv": SIZES["key_heads"],
        "attention.key_length": SIZES["head"], "attention.value_length": SIZES["head"], "vocab_size": SIZES["vocab"],
    }  # fmt: skip
    for key, value in {**{f"{name}.{key}": value for key, value in values.items()}, **(metadata or {})}.items():
        writer.add_uint32(key, value)
    rules = dict(architecture.outer)
    for layer in range(SIZES["layers"]):
        rules |= {f"blk.{layer}.{source}": rule for source, rule in architecture.layer.items()}
    weights = {}
    for source, rule in rules.items():
        if rule.optional:
            continue
        shape = tuple(SIZES[axis] for axis in rule.shape)
        data = draw.normal(size=shape).astype(np.float32)
        current = f"model.layers.{source.split('.')[1]}.{rule.name}" if source.startswith("blk.") else rule.name
        kind = "F32" if len(shape) == 1 else storage
        kind = kind if shape[-1] % BLOCKS[kind][0] == 0 else "F16"
        stored, weights[current] = _stored(data, kind)
        if rule.heads:
            stored = _permuted(stored, SIZES[rule.heads])
        if rule.offset:
            stored = weights[current].astype(np.float32) + np.float32(rule.offset)
            weights[current] = stored - np.float32(rule.offset)
        writer.add_tensor(source, stored, raw_dtype=None if kind in ("F32", "F16") else GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


BLOCKS = {
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22),
    "Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144),
    "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
"""Elements and bytes of a block."""


def random_blocks(kind, n_rows, width, *, seed=0):
    """Rows of blocks whose scales are ordinary numbers; any bytes are valid in the rest."""
    elements, n_bytes = BLOCKS[kind]
    draw = np.random.default_rng(seed)
    stored = draw.integers(0, 256, (n_rows * width // elements, n_bytes), dtype=np.uint8)
    scale = np.float16(0.01).view(np.uint16)
    places = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q4_1": (0, 2)}
    for place in places.get(kind, (0, 2) if kind == "Q5_1" else (0,)):
        stored[:, place : place + 2] = np.array([scale & 255, scale >> 8], np.uint8)
    return stored.reshape(n_rows, -1)


def _stored(data, kind):
    """What is stored of these values, and the values that it stands for."""
    from gguf import dequantize

    if kind in ("F32", "F16"):
        stored = data.astype(np.float32 if kind == "F32" else np.float16)
        return stored, stored.astype(np.float32)
    number = GGMLQuantizationType[kind]
    try:
        stored = quantize(data, number)
    except NotImplementedError:
        stored = random_blocks(kind, *data.shape)
    return stored, dequantize(stored, number)


def _permuted(rows, heads):
    from tests.tiny_gguf import permute

    return permute(rows, heads)


def quantize_mlp(base, folder, scheme):
    """A model's folder with the weights of its MLPs stored in FP8 or as GPTQ; the folder of the values they stand for.

    The rest is in bfloat16. The values are in float32, in a second folder.
    """
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    stored, values = {}, {}
    for name, tensor in load_file(base / "model.safetensors").items():
        if ".mlp." not in name:
            stored[name] = values[name] = tensor.bfloat16()
            continue
        parts, values[name] = IN_SCHEME[scheme](tensor.float())
        stored |= {name.removesuffix(".weight") + end: part.contiguous() for end, part in parts.items()}
    for where, tensors in ((folder, stored), (values_folder := folder.with_name(f"{folder.name}-values"), values)):
        shutil.copytree(base, where)
        save_file(tensors, where / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[scheme]}))
    return folder, values_folder


def _fp8(weight):
    """Blocks of 32 by 32, the last ones cut."""
    rows, columns = (-(-size // 32) for size in weight.shape)
    scale = torch.full((rows, columns), 0.004) * torch.arange(1, rows * columns + 1).reshape(rows, columns)
    whole = scale.repeat_interleave(32, 0)[: weight.shape[0]].repeat_interleave(32, 1)[:, : weight.shape[1]]
    codes = (weight / whole).to(torch.float8_e4m3fn)
    return {".weight": codes, ".weight_scale_inv": scale}, codes.float() * whole


def _gptq(weight):
    """Groups of 16 columns, zero points at 8."""
    from tests.checkpoint.safetensors.schemes import words

    groups = torch.arange(weight.shape[1]) // 16
    scales = torch.full((int(groups[-1]) + 1, weight.shape[0]), 0.1).half()
    codes = (weight.T / scales[groups] + 8).round().clamp(0, 15).long()
    parts = {
        ".qweight": words(codes.T, 4).T,
        ".qzeros": words(torch.full(scales.shape, 7), 4),
        ".scales": scales,
        ".g_idx": groups.int(),
    }
    return parts, (scales[groups] * (codes - 8)).T.float().contiguous()


IN_SCHEME = {"fp8": _fp8, "gptq": _gptq}
CONFIGS = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32], "activation_scheme": "dynamic"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True},
}
