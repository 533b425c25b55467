"""An export as a merged GGUF file: the tensors that the patch changes are merged as `portllm merge` does it.

Of a model that is a GGUF file, everything else stays as it is, so its metadata and its tokenizer are those that the
runtime knows. Of one in safetensors, a file is made: its metadata and its tokenizer are those of another GGUF file of
the model (see `portllm.exporting.gguf_template`), its special tokens and chat template the model's own. Matrices keep
their dtype; vectors are in float32, as llama.cpp wants them.
"""

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from portllm.checkpoint.gguf.file import GGUFFile
from portllm.checkpoint.gguf.header import ListPlace, read_gguf_header, read_gguf_list
from portllm.checkpoint.gguf.places import Place, architecture_of, gguf_file_of
from portllm.checkpoint.gguf.tensors import architectures
from portllm.checkpoint.open import side_file
from portllm.checkpoint.safetensors.writer import Entry
from portllm.exporting.gguf_template import placed_steps, read_vector
from portllm.exporting.plan import ExportPlan
from portllm.merging.plan import MergePlan, MergeStep
from portllm.merging.tensor import Target, TensorOptions, TensorResults, make_tensor, workspaces
from portllm.messages import errors_only
from portllm.patch.rounding import MergeSums
from portllm.patch.side_files import TEMPLATE_FILES, TOKENIZER_FILES, copy_into
from portllm.progress import Progress
from portllm.tensors.decoding import stored_rows
from portllm.tensors.encoding import GGMLBlocks
from portllm.tensors.info import TensorInfo, n_bytes_of
from portllm.tensors.numbers import decode_floats
from portllm.tensors.rounding import encode_floats

MODEL_FILES = (*TOKENIZER_FILES, *TEMPLATE_FILES, "config.json", "generation_config.json")
"""What the special tokens and the chat template are read from."""

CHAT_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, slots=True)
class Home:
    """Where a tensor of the file goes, and how its values stand for those of the model.

    Attributes:
        start: Its first byte.
        type: Its storage type.
        heads: Heads whose rows are reordered; 0 for none.
        offset: What is added to each value.
    """

    start: int
    type: str
    heads: int = 0
    offset: float = 0.0


def write_gguf_model(folder: Path, plan: ExportPlan, *, file: str, progress: Progress) -> Mapping[str, MergeSums]:
    """Write the merged file, and what rounding took of the patch by tensor.

    Raises:
        CheckpointError: The model's file cannot be read.
        NonFiniteError: A sum is no number in the dtype of its tensor.
    """
    made = _begun(folder / file, plan) if plan.merge is not None else _copied(folder / file, plan)
    sums: dict[str, MergeSums] = {}
    with open(folder / file, "r+b") as out, workspaces(TensorOptions(threads=1), [step for step, _ in made]) as free:
        bench = free.get()
        for done, (step, home) in enumerate(made, start=1):
            (result,) = make_tensor([Target(step, partial(_put, out.fileno(), step, home))], bench, lambda _: None)
            if not isinstance(result, TensorResults):
                raise result
            sums |= result.sums
            progress("export", done, len(made), "tensors")
    return sums


def _copied(file: Path, plan: ExportPlan) -> list[tuple[MergeStep, Home]]:
    """Copy the file of the model; what is left to write are the tensors that the patch changes."""
    source = None if plan.base is None else gguf_file_of(plan.base)
    assert plan.base is not None
    assert source is not None  # the plan refuses any other model
    shutil.copyfile(source, file)
    infos = {name: plan.base.infos[name] for name in sorted(plan.changes)}
    return [(_step(info, _home(info), plan), _home(info)) for info in infos.values()]


def _step(info: TensorInfo, home: Home, plan: ExportPlan) -> MergeStep:
    return MergeStep(Entry(info.name, home.type, info.shape), info, plan.changes[info.name])


def _home(info: TensorInfo) -> Home:
    encoding = info.encoding
    if not isinstance(encoding, GGMLBlocks):
        return Home(info.start, info.dtype)
    return Home(info.start, encoding.type, encoding.heads, encoding.offset)


def _begun(file: Path, plan: ExportPlan) -> list[tuple[MergeStep, Home]]:
    """Begin a file with everything but the values of the tensors, which are what is left to write."""
    from gguf import GGMLQuantizationType, GGUFType, GGUFWriter, LlamaFileType  # loads slowly

    assert plan.base is not None
    assert plan.merge is not None
    assert plan.template is not None
    architecture = architecture_of(plan.base)
    assert architecture is not None
    placed = [(_stored(step, place), place) for step, place in placed_steps(plan.merge) if place is not None]
    derived = [plan.template.header.tensors[name] for name in _derived(plan.template, architecture)]
    writer = GGUFWriter(file, architecture)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(plan.name)
    matrices = {step.entry.dtype for step, _ in placed if step.entry.dtype != "F32"}
    kind = f"MOSTLY_{min(matrices)}" if matrices else "ALL_F32"
    writer.add_file_type(LlamaFileType[kind])
    _add_metadata(writer, plan.template, architecture, plan.merge)
    for name, dtype, shape in (
        *((tensor.name, "F32", tensor.shape) for tensor in derived),
        *((place.name, step.entry.dtype, step.entry.shape) for step, place in placed),
    ):
        stored = (*shape[:-1], n_bytes_of(dtype, shape[-1:]))
        n_bytes = n_bytes_of(dtype, shape)
        writer.add_tensor_info(name, stored, np.dtype(np.uint8), n_bytes, raw_dtype=GGMLQuantizationType[dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    sizes = [GGUFWriter.ggml_pad(n_bytes_of("F32", tensor.shape), writer.data_alignment) for tensor in derived]
    sizes += [GGUFWriter.ggml_pad(n_bytes_of(s.entry.dtype, s.entry.shape), writer.data_alignment) for s, _ in placed]
    with open(file, "r+b") as out:
        out.truncate(GGUFWriter.ggml_pad(file.stat().st_size, writer.data_alignment) + sum(sizes))
        tensors = read_gguf_header(file).tensors
        for tensor in derived:
            _write(out.fileno(), tensors[tensor.name].start, memoryview(read_vector(plan.template, tensor).tobytes()))
    return [
        (step, Home(tensors[place.name].start, step.entry.dtype, place.heads, place.offset)) for step, place in placed
    ]


def _stored(step: MergeStep, place: Place) -> MergeStep:
    is_vector = len(step.entry.shape) == 1 or place.name.endswith("_norm.weight")
    dtype = "F32" if is_vector or step.entry.dtype == "F64" else step.entry.dtype
    return replace(step, entry=replace(step.entry, dtype=dtype))


def _derived(template: GGUFFile, architecture: str) -> list[str]:
    return [name for name in architectures()[architecture].left_out if name in template.header.tensors]


def _add_metadata(writer: object, template: GGUFFile, architecture: str, merge: MergePlan) -> None:
    """The model's special tokens and chat template; hyperparameters and tokens as the template has them."""
    from gguf import GGUFValueType, GGUFWriter, SpecialVocab

    assert isinstance(writer, GGUFWriter)
    with tempfile.TemporaryDirectory(prefix="portllm-") as kept, errors_only("gguf.vocab"):
        _write_model_files(Path(kept), merge)
        SpecialVocab(kept, n_vocab=template.length("tokenizer.ggml.tokens")).add_to_gguf(writer, quiet=True)
    given = set(writer.kv_data[0])
    for key, value in template.header.fields.items():
        if key in given or key.startswith(CHAT_TEMPLATE) or not key.startswith((f"{architecture}.", "tokenizer.")):
            continue
        if isinstance(value, ListPlace):
            items = read_gguf_list(template.source, value)
            if items:
                writer.add_key_value(key, items, GGUFValueType.ARRAY, GGUFValueType(value.kind))
        elif isinstance(value, int) and not isinstance(value, bool):
            writer.add_key_value(key, value, GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32)
        else:
            writer.add_key_value(key, value, GGUFValueType.get_type(value))


def _write_model_files(folder: Path, merge: MergePlan) -> None:
    """The configuration and the tokenizer of a merged model, as a merge into a folder would write them."""
    for name in MODEL_FILES:
        found = None if name in merge.beside.leave_out else side_file(merge.into, name)
        if found is not None:
            shutil.copyfile(found, folder / name)
    copy_into(folder, merge.beside.files)
    for name, text in merge.beside.texts.items():
        (folder / name).write_text(text, encoding="utf-8")


def _put(out: int, step: MergeStep, home: Home, place: int, data: memoryview) -> None:
    """Write some rows of a tensor where the file has them, with what it adds to their values."""
    if home.offset:
        data = memoryview(encode_floats(decode_floats(bytes(data), home.type) + home.offset, home.type))
    if not home.heads:
        _write(out, home.start + place, data)
        return
    shape = step.entry.shape
    row_bytes = n_bytes_of(home.type, shape[1:])
    rows = np.arange(place // row_bytes, (place + len(data)) // row_bytes)
    places = stored_rows(rows, n_rows=shape[0], n_heads=home.heads)
    for row, stored in enumerate(places.tolist()):  # next to each other they are not
        _write(out, home.start + stored * row_bytes, data[row * row_bytes : (row + 1) * row_bytes])


def _write(out: int, place: int, data: memoryview) -> None:
    while data:
        count = os.pwrite(out, data, place)
        data, place = data[count:], place + count
