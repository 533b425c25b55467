"""Adapters on SmolLM2-135M of every kind that runtimes trip over, and exports of them that are broken on purpose."""

import json
import shutil

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SHAPES = {
    "self_attn.q_proj": (576, 576),
    "self_attn.k_proj": (192, 576),
    "self_attn.v_proj": (192, 576),
    "self_attn.o_proj": (576, 576),
    "mlp.up_proj": (1536, 576),
    "mlp.down_proj": (576, 1536),
}
"""(d_out, d_in) of one layer of SmolLM2-135M."""

LAYERS, HEAD_DIM = 30, 64

ADAPTERS = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "alpha pattern": {"alpha_pattern": {"q_proj": 32, "layers.3.mlp.down_proj": 4}},
    "mixed ranks": {"rank_pattern": {"v_proj": 4, "layers.3.mlp.up_proj": 12}},
    "some layers": {"layers_to_transform": list(range(4, 17))},
    "all of these": {
        "use_rslora": True,
        "alpha_pattern": {"q_proj": 32},
        "rank_pattern": {"v_proj": 4, "up_proj": 12},
        "layers_to_transform": list(range(4, 17)),
    },
}
"""Fields of the configurations, by what is special about them."""


def make_adapter(folder, **fields):
    """Writes a random adapter in PEFT's layout, whose effect is about two nats."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    config = {"r": 8, "lora_alpha": 16, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}} | fields
    tensors = {}
    for layer in fields.get("layers_to_transform", range(LAYERS)):
        for module, (d_out, d_in) in SHAPES.items():
            name = f"model.layers.{layer}.{module}"
            rank = own(config["rank_pattern"], name, config["r"])
            size = 0.25 / (rank**0.25 if config["use_rslora"] else 1)
            a = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            b = torch.randn(d_out, rank, generator=generator) * size / rank**0.5
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    leaves = sorted(module.rpartition(".")[2] for module in SHAPES)
    config |= {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": leaves, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def own(pattern, name, default):
    return next((value for key, value in pattern.items() if name.endswith(key)), default)


def spoiled(patch, folder, fault):
    """A copy of a plain adapter with a fault; exported, it is what a wrong export would be."""
    shutil.copytree(patch, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    match fault:
        case "without layer 7":
            for name in [name for name in tensors if ".layers.7." in name]:
                tensors[name] = torch.zeros_like(tensors[name])
        case "q_proj not permuted":
            for name in [name for name in tensors if name.endswith("q_proj.lora_B.weight")]:
                b = tensors[name]
                heads = b.view(-1, HEAD_DIM // 2, 2, b.shape[1])
                tensors[name] = heads.transpose(1, 2).reshape(b.shape).contiguous()
        case "scale":
            for name in [name for name in tensors if name.endswith("lora_B.weight")]:
                tensors[name] = tensors[name] * 1.5
        case _:
            raise ValueError(fault)
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


def rename_tensors(export):
    """Renames all tensors of an export, in its file or in the files of its folder."""
    for file in export.iterdir() if export.is_dir() else [export]:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            tensors = {name.replace("layers", "blocks"): value for name, value in load_file(file).items()}
            save_file(tensors, file, metadata=metadata)
        elif file.suffix == ".gguf":
            file.write_bytes(file.read_bytes().replace(b"blk.", b"bla."))


def wide_gguf(source, out):
    """A GGUF file with the values of another one in float32, so that its runtime rounds nothing."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize

    reader = GGUFReader(source)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        values = np.ascontiguousarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        writer.add_tensor(tensor.name, values, raw_dtype=GGMLQuantizationType.F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
