"""An export as a merged GGUF file: that of the model, with the values of the tensors that the patch changes replaced.

Nothing else of the file is touched, so its metadata and its tokenizer are those that the runtime knows. Each changed
tensor is merged as `portllm merge` does it, and its rows are written where the file has them.
"""

import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from portllm.checkpoint.gguf.places import gguf_file_of
from portllm.checkpoint.reading.decoding import stored_rows
from portllm.checkpoint.reading.numbers import decode_floats
from portllm.checkpoint.safetensors.writer import Entry
from portllm.checkpoint.tensor.encoding import GGMLBlocks
from portllm.checkpoint.tensor.info import TensorInfo, n_bytes_of
from portllm.checkpoint.tensor.rounding import encode_floats
from portllm.exporting.plan import ExportPlan
from portllm.merging.plan import MergeStep
from portllm.merging.tensor import Target, TensorOptions, TensorResults, make_tensor, workspaces
from portllm.patch.rounding import MergeSums
from portllm.progress import Progress


def write_gguf_model(folder: Path, plan: ExportPlan, *, file: str, progress: Progress) -> Mapping[str, MergeSums]:
    """Write the merged file, and what rounding took of the patch by tensor.

    Raises:
        CheckpointError: The model's file cannot be read.
        NonFiniteError: A sum is no number in the dtype of its tensor.
    """
    source = None if plan.base is None else gguf_file_of(plan.base)
    assert plan.base is not None
    assert source is not None  # the plan refuses any other model
    shutil.copyfile(source, folder / file)
    steps = [_step(plan.base.infos[name], plan) for name in sorted(plan.changes)]
    sums: dict[str, MergeSums] = {}
    with open(folder / file, "r+b") as out, workspaces(TensorOptions(threads=1), steps) as free:
        bench = free.get()
        for done, step in enumerate(steps, start=1):
            (result,) = make_tensor([Target(step, partial(_put, out.fileno(), step))], bench, lambda _: None)
            if not isinstance(result, TensorResults):
                raise result
            sums |= result.sums
            progress("export", done, len(steps), "tensors")
    return sums


def _step(info: TensorInfo, plan: ExportPlan) -> MergeStep:
    stored_as = info.encoding.type if isinstance(info.encoding, GGMLBlocks) else info.dtype
    return MergeStep(Entry(info.name, stored_as, info.shape), info, plan.changes[info.name])


def _put(out: int, step: MergeStep, place: int, data: memoryview) -> None:
    """Write some rows of a tensor where the file has them, with what it adds to their values."""
    info = step.source
    encoding = info.encoding
    if not isinstance(encoding, GGMLBlocks):
        _write(out, info.start + place, data)
        return
    if encoding.offset:
        data = memoryview(encode_floats(decode_floats(bytes(data), encoding.type) + encoding.offset, encoding.type))
    if not encoding.heads:
        _write(out, info.start + place, data)
        return
    row_bytes = n_bytes_of(encoding.type, info.shape[1:])
    rows = np.arange(place // row_bytes, (place + len(data)) // row_bytes)
    places = stored_rows(rows, n_rows=info.shape[0], n_heads=encoding.heads)
    for row, stored in enumerate(places.tolist()):  # next to each other they are not
        _write(out, info.start + stored * row_bytes, data[row * row_bytes : (row + 1) * row_bytes])


def _write(out: int, place: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(out, data, place)
        data, place = data[count:], place + count
