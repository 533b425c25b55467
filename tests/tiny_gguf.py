"""A tiny llama-architecture GGUF file, and the weights it stands for, computed apart from the code under test.

Everything is drawn from a digest, so the file's bytes are the same for ever. No matrix is square, and query and
key projections differ in their number of heads: two layers, hidden 32, inner 64, four query heads and two key heads of
12 (query 48 x 32, key 24 x 32), 267 tokens. Weights are stored as F32, F16, Q8_0 and Q4_1.
"""

import json

import numpy as np
import torch
from blake3 import blake3
from gguf import GGMLQuantizationType, GGUFEndian, GGUFValueType, GGUFWriter, quantize
from safetensors.torch import load_file

HIDDEN, INNER, LAYERS, HEADS, KEY_HEADS, HEAD = 32, 64, 2, 4, 2, 12
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = "<think>"
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ċ Ċ", "Ġ t"]
TEMPLATE = "{% for message in messages %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endfor %}"


def byte_alphabet():
    """GPT-2's printable stand-in for each of the 256 bytes, in the order of the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    stand_ins = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        stand_ins.setdefault(byte, chr(256 + len(stand_ins) - len(printable)))
    return [stand_ins[byte] for byte in range(256)]


TOKENS = [*SPECIAL, *byte_alphabet(), *(merge.replace(" ", "") for merge in MERGES), USER_DEFINED]
KINDS = [3] * len(SPECIAL) + [1] * (256 + len(MERGES)) + [4]
VOCAB = len(TOKENS)

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": LAYERS,
    "llama.context_length": 64,
    "llama.embedding_length": HIDDEN,
    "llama.feed_forward_length": INNER,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": KEY_HEADS,
    "llama.attention.key_length": HEAD,
    "llama.attention.value_length": HEAD,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": HEAD,
    "llama.rope.freq_base": 50000.0,
    "llama.vocab_size": VOCAB,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": KINDS,
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.padding_token_id": 2,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}

LAYER_TENSORS = {
    "attn_norm": ("input_layernorm", (HIDDEN,), "F32"),
    "attn_q": ("self_attn.q_proj", (HEADS * HEAD, HIDDEN), "Q4_1"),
    "attn_k": ("self_attn.k_proj", (KEY_HEADS * HEAD, HIDDEN), "Q8_0"),
    "attn_v": ("self_attn.v_proj", (KEY_HEADS * HEAD, HIDDEN), "Q4_1"),
    "attn_output": ("self_attn.o_proj", (HIDDEN, HEADS * HEAD), "F16"),  # 48 columns are no whole number of blocks
    "ffn_norm": ("post_attention_layernorm", (HIDDEN,), "F32"),
    "ffn_gate": ("mlp.gate_proj", (INNER, HIDDEN), "Q8_0"),
    "ffn_up": ("mlp.up_proj", (INNER, HIDDEN), "F32"),
    "ffn_down": ("mlp.down_proj", (HIDDEN, INNER), "Q4_1"),
}


def tensor_table(*, untied=False):
    """Name in the file -> (name in the checkpoint, shape, storage)."""
    table = {
        "token_embd.weight": ("model.embed_tokens.weight", (VOCAB, HIDDEN), "Q8_0"),
        "output_norm.weight": ("model.norm.weight", (HIDDEN,), "F32"),
    }
    for layer in range(LAYERS):
        for stored, (name, shape, storage) in LAYER_TENSORS.items():
            table[f"blk.{layer}.{stored}.weight"] = (f"model.layers.{layer}.{name}.weight", shape, storage)
    if untied:
        table["output.weight"] = ("lm_head.weight", (VOCAB, HIDDEN), "F16")
    return table


def write_tiny_gguf(path, *, metadata=None, tensors=None, untied=False, endian=GGUFEndian.LITTLE):
    """Write the file; the float64 weights it stands for, by their names in a checkpoint.

    Args:
        path: The file to write.
        metadata: Entries to change; None leaves the key out.
        tensors: Arrays to store in place of, or beside, those of the table; None leaves the tensor out.
        untied: Give the file a head of its own.
        endian: Byte order.
    """
    writer = GGUFWriter(path, (METADATA | (metadata or {}))["general.architecture"] or "llama", endianess=endian)
    for key, value in (METADATA | (metadata or {})).items():
        if key != "general.architecture" and value is not None:
            _add(writer, key, value)
    weights = {}
    changed = dict(tensors or {})
    for stored, (name, shape, storage) in tensor_table(untied=untied).items():
        weights[name], data = draw(stored, shape, storage)
        if stored in changed:
            data = changed.pop(stored)
            if data is None:
                continue
            storage = "changed"
        for kind, heads in (("attn_q.weight", HEADS), ("attn_k.weight", KEY_HEADS)):
            if stored.endswith(kind) and storage != "changed":
                data = permute(data, heads)
        quantized = GGMLQuantizationType[storage] if storage.startswith("Q") else None
        writer.add_tensor(stored, data, raw_dtype=quantized)
    for stored, data in changed.items():
        writer.add_tensor(stored, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def permute(rows, heads):
    """llama.cpp's reordering of a query or key projection: the two halves of each head, interleaved."""
    half = len(rows) // heads // 2
    result = np.empty_like(rows)
    for head in range(heads):
        for i in range(half):
            result[head * 2 * half + 2 * i] = rows[head * 2 * half + i]
            result[head * 2 * half + 2 * i + 1] = rows[head * 2 * half + half + i]
    return result


def draw(seed, shape, storage):
    """Float64 values and how they are stored: an array of floats, or rows of quantized bytes."""
    count = int(np.prod(shape))
    if storage in ("F32", "F16"):
        words = np.frombuffer(_bytes(seed, 4 * count), "<u4")
        data = (words / 2**32 - 0.5).astype(np.float32 if storage == "F32" else np.float16).reshape(shape)
        return data.astype(np.float64), data
    n_blocks = count // 32
    steps = (np.frombuffer(_bytes(seed + " steps", n_blocks), np.uint8) / 4096 + 0.001).astype("<f2")
    header = steps.view(np.uint8).reshape(n_blocks, 2)
    if storage == "Q8_0":
        quants = np.frombuffer(_bytes(seed, count), np.int8).reshape(n_blocks, 32)
        values = steps[:, None].astype(np.float64) * quants
        stored = np.hstack([header, quants.view(np.uint8)])
    else:
        quants = (np.frombuffer(_bytes(seed, count), np.uint8) & 15).reshape(n_blocks, 32)
        least = (-8 * steps.astype(np.float64)).astype("<f2")
        values = steps[:, None].astype(np.float64) * quants + least[:, None].astype(np.float64)
        packed = quants[:, :16] | (quants[:, 16:] << 4)
        stored = np.hstack([header, least.view(np.uint8).reshape(n_blocks, 2), packed])
    return values.reshape(shape), stored.reshape(shape[0], -1)


def _bytes(seed, count):
    return blake3(seed.encode()).digest(count)


def _add(writer, key, value):
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""llama.cpp's names of what a layer of Llama has, written down from its converter."""


def convert_llama(folder, file, metadata=None, *, storage="BF16"):
    """What llama.cpp's converter makes of a tiny Llama in bfloat16: vectors in float32, rows of q and k reordered.

    Matrices whose rows fill whole blocks are then quantized to `storage`.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = GGUFWriter(file, "llama")
    sizes = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    said = {f"llama.{key}": value for key, value in sizes.items()} | (metadata or {})
    factors = said.pop("rope_freqs", None)
    for key, value in said.items():
        if value is not None:
            kind = GGUFValueType.UINT32 if type(value) is int else GGUFValueType.get_type(value)
            writer.add_key_value(key, value, kind)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stored = stored_name(name)
        if tensor.ndim == 1:
            writer.add_tensor(stored, tensor.float().numpy())
            continue
        rows = tensor.view(torch.int16).numpy().view(np.uint16)
        for kind, heads in (
            ("attn_q.weight", config["num_attention_heads"]),
            ("attn_k.weight", config["num_key_value_heads"]),
        ):
            if stored.endswith(kind):
                rows = permute(rows, heads)
        data, kind = rows.view(np.uint8), GGMLQuantizationType.BF16
        if storage != "BF16" and tensor.shape[1] % 32 == 0:
            kind = GGMLQuantizationType[storage]
            data = quantize((rows.astype(np.uint32) << 16).view(np.float32), kind)
        writer.add_tensor(stored, data, raw_shape=data.shape, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def stored_name(name):
    outer = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if name in outer:
        return outer[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"
