"""An export as llama.cpp's adapter: one GGUF file with its names and its order of rows."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from portllm.checkpoint.gguf.places import Place, architecture_of, place_of
from portllm.exporting.factors import Factors
from portllm.exporting.plan import ExportPlan
from portllm.patch.adapter_tensors import WEIGHT
from portllm.tensors.decoding import stored_rows
from portllm.tensors.info import n_bytes_of
from portllm.tensors.tensors import encode


def write_gguf_lora(folder: Path, plan: ExportPlan, factors: Iterable[Factors], *, file: str) -> None:
    """The GGUF file of an adapter; alpha is the rank, so that llama.cpp scales by 1."""
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, Keys  # loads slowly

    assert plan.base is not None
    architecture = architecture_of(plan.base)
    assert architecture is not None
    writer = GGUFWriter(folder / file, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, float(plan.rank))
    writer.add_name(plan.name)
    bytes_of = np.dtype(np.uint8)
    for slot in plan.slots:
        name = _place(slot.module, plan).name
        for factor, (height, width) in (("lora_a", (plan.rank, slot.shape[1])), ("lora_b", (slot.shape[0], plan.rank))):
            n_bytes = n_bytes_of(plan.dtype, (width,))
            shape = (height, n_bytes)
            writer.add_tensor_info(
                f"{name}.{factor}", shape, bytes_of, height * n_bytes, raw_dtype=GGMLQuantizationType[plan.dtype]
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for found in factors:
        heads = _place(found.module, plan).heads
        for rows in (found.a, reordered(found.b, heads) if heads else found.b):
            writer.write_tensor_data(np.frombuffer(encode(rows), np.uint8))
    writer.close()


def _place(module: str, plan: ExportPlan) -> Place:
    place = None if plan.base is None else place_of(module + WEIGHT, plan.base)
    assert place is not None  # the plan refuses modules without one
    return place


def reordered(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order in which a GGUF file has them.

    Example:
        >>> reordered(torch.arange(8.0).reshape(8, 1), 2).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]
    """
    places = torch.from_numpy(stored_rows(np.arange(len(rows)), n_rows=len(rows), n_heads=heads))
    turned = torch.empty_like(rows)
    turned[places] = rows
    return turned
