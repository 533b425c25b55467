"""Checkpoints and adapters of a shape, made by seeded code: the same call writes the same bytes.

Weights have the size of trained ones and are written in blocks, every byte of them: a sparse file would be read from no
disk. The delta is a LoRA's of rank 16 on all seven linear layers, 0.3 to 0.5 % of the norm of its weight.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.shapes import SEVEN, Shape
from portllm.checkpoint.safetensors.writer import Entry, ShardWriter, lay_out, write_index
from portllm.files.output_folder import staged_folder

WEIGHT_SIZE = 0.02
"""Standard deviation of a weight's values: about that of Llama's linear layers."""

DRIFT = 0.01
"""|W1 - W0| / |W0|: a small update."""

SMALLEST_DELTA, LARGEST_DELTA = 0.003, 0.005
"""|Δ| / |W0|, drawn anew for each layer."""

RANK, SCALE = 16, 2
DECAY = 0.85
"""Of one direction of a delta to the next: the spectrum falls, as a trained one's does."""

BLOCK_ELEMENTS = 1 << 24


def write_checkpoint(shape: Shape, folder: Path, *, delta: bool = False, drift: bool = False) -> None:
    """Write a model: the base, or the base after fine-tuning (`delta`) or after an update (`drift`)."""
    entries = {name: Entry(name, "BF16", size) for name, size in shape.tensors.items()}
    with staged_folder(folder, overwrite=False) as part:
        shards = lay_out(entries, shard_bytes=shape.shard_bytes)
        for shard in shards:
            with ShardWriter(part, shard) as file:
                for entry in shard.entries:
                    _write_tensor(file, shape, entry, delta=delta, drift=drift)
        write_index(part, shards)
        (part / "config.json").write_text(json.dumps(shape.config, indent=2) + "\n")


def write_adapter(shape: Shape, folder: Path, *, seed: int = 0, rank: int = RANK) -> None:
    """Write a LoRA adapter as PEFT does, in float32; seed 0 of rank 16 is the delta that a tuned checkpoint holds."""
    tensors = {}
    for module, (d_out, d_in) in shape.modules.items():
        a, b = _factors(module, d_out, d_in, seed, rank)
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": SCALE * rank, "lora_dropout": 0.0,
        "bias": "none", "target_modules": list(SEVEN), "base_model_name_or_path": None, "inference_mode": True,
    }  # fmt: skip
    with staged_folder(folder, overwrite=False) as part:
        save_file(tensors, part / "adapter_model.safetensors", metadata={"format": "pt"})
        (part / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _write_tensor(file: ShardWriter, shape: Shape, entry: Entry, *, delta: bool, drift: bool) -> None:
    rows, columns = entry.shape[0], entry.shape[1] if len(entry.shape) > 1 else 1
    is_norm = len(entry.shape) == 1  # its values lie around one
    module = entry.name.removesuffix(".weight")
    adapted = delta and module in shape.modules
    a, b = _factors(module, rows, columns, 0, RANK) if adapted else (torch.empty(0), torch.empty(0))
    step = max(1, BLOCK_ELEMENTS // columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        size = (stop - start, columns)
        block = _normal(f"base {entry.name} {start}", size) * WEIGHT_SIZE
        block = (block + is_norm).bfloat16()
        if adapted:
            block = (block.float() + SCALE * (b[start:stop] @ a)).bfloat16()
        if drift:
            moved = _normal(f"drift {entry.name} {start}", size) * (DRIFT * (1 if is_norm else WEIGHT_SIZE))
            block = (block.float() + moved).bfloat16()
        file.append(memoryview(block.view(torch.int16).numpy().reshape(-1)))


def _factors(module: str, d_out: int, d_in: int, seed: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A of shape (rank, d_in) and B of shape (d_out, rank), such that scale·B·A has the size of a trained delta."""
    share = SMALLEST_DELTA + (LARGEST_DELTA - SMALLEST_DELTA) * (_seed(f"share {module} {seed}") / 2**32)
    falling = DECAY ** torch.arange(rank)
    a = _normal(f"A {module} {seed}", (rank, d_in)) * d_in**-0.5
    b = _normal(f"B {module} {seed}", (d_out, rank)) * (falling / falling.norm())
    return a, b * (share * WEIGHT_SIZE * d_in**0.5 / SCALE)


def _normal(name: str, size: tuple[int, int]) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(_seed(name)))


def _seed(name: str) -> int:
    return zlib.crc32(name.encode())
