"""Exports as safetensors: PEFT's folder in its plain form, one file alone, and mlx-lm's folder."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from portllm.checkpoint.safetensors.writer import Entry, Shard, ShardWriter
from portllm.exporting.factors import Factors
from portllm.exporting.plan import ExportPlan
from portllm.patch.adapter_folder import CONFIG_FILE, MLX_FILE, TENSOR_FILE, name_base
from portllm.patch.adapter_keys import Role, render_key
from portllm.patch.new_adapter import canonical_config
from portllm.patch.side_files import copy_into
from portllm.tensors.tensors import encode

_IN_LAYER = re.compile(r".*?\.layers\.(?P<layer>\d+)\.(?P<path>.*)")


def write_lora(folder: Path, plan: ExportPlan, factors: Iterable[Factors]) -> None:
    """PEFT's folder: one rank, alpha equal to it, a list of targets, no patterns."""
    fields = canonical_config({slot.module: plan.rank for slot in plan.slots})
    named = name_base({**fields, "target_modules": plan.targets}, plan.base_name, plan.base_revision)
    _write_json(folder / CONFIG_FILE, named)
    copy_into(folder, plan.patch.beside)
    write_file(folder, plan, factors, file=TENSOR_FILE)


def write_file(folder: Path, plan: ExportPlan, factors: Iterable[Factors], *, file: str) -> None:
    """One file with PEFT's keys."""
    shapes: dict[str, tuple[int, int]] = {}
    for slot in plan.slots:
        shapes[render_key(slot.module, Role.A)] = (plan.rank, slot.shape[1])
        shapes[render_key(slot.module, Role.B)] = (slot.shape[0], plan.rank)
    pairs = (
        (render_key(found.module, role), factor)
        for found in factors
        for role, factor in ((Role.A, found.a), (Role.B, found.b))
    )
    _write_tensors(folder, file, plan.dtype, shapes, pairs)


def write_mlx(folder: Path, plan: ExportPlan, factors: Iterable[Factors]) -> None:
    """mlx-lm's folder: A and B transposed under the modules' own names, rank and scale once, paths inside a layer."""
    places = [match for slot in plan.slots if (match := _IN_LAYER.fullmatch(slot.module))]
    config = {
        "fine_tune_type": "lora",
        "num_layers": 1 + max(int(match["layer"]) for match in places),
        "lora_parameters": {
            "rank": plan.rank,
            "scale": 1.0,
            "dropout": 0.0,
            "keys": sorted({match["path"] for match in places}),
        },
    }
    _write_json(folder / CONFIG_FILE, config)
    shapes: dict[str, tuple[int, int]] = {}
    for slot in plan.slots:
        shapes[f"{slot.module}.lora_a"] = (slot.shape[1], plan.rank)
        shapes[f"{slot.module}.lora_b"] = (plan.rank, slot.shape[0])
    pairs = (
        (f"{found.module}.{name}", factor.T)
        for found in factors
        for name, factor in (("lora_a", found.a), ("lora_b", found.b))
    )
    _write_tensors(folder, MLX_FILE, plan.dtype, shapes, pairs)


def _write_json(file: Path, values: Mapping[str, object]) -> None:
    file.write_text(json.dumps(dict(sorted(values.items())), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tensors(
    folder: Path, file: str, dtype: str, shapes: Mapping[str, tuple[int, int]], pairs: Iterator[tuple[str, Tensor]]
) -> None:
    shard = Shard(file, tuple(Entry(name, dtype, shape) for name, shape in sorted(shapes.items())))
    with ShardWriter(folder, shard) as writer:
        for name, tensor in pairs:
            writer.write(name, 0, encode(tensor))
