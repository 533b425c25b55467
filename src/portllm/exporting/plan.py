"""Decide before reading: what an export will hold, and every part of the patch that the runtime has no place for."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath

from blake3 import blake3

from portllm.checkpoint.gguf.file import GGUFFile
from portllm.checkpoint.gguf.places import LAYERS, architecture_of, gguf_file_of, place_of
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import on_disk
from portllm.errors import Refusal
from portllm.exporting.gguf_template import OPTION as TEMPLATE
from portllm.exporting.gguf_template import placed_steps, template_refusals
from portllm.files.record import encode
from portllm.files.source import Source
from portllm.matching.added_tokens import height_of
from portllm.matching.base import base_mismatch, same_in
from portllm.matching.changes import changes_on, oriented
from portllm.matching.compatibility import mismatches
from portllm.merging.options import MergeOptions
from portllm.merging.plan import MergePlan, plan_merge
from portllm.patch.adapter_config import ALL_LINEAR, HEAD_NAMES
from portllm.patch.adapter_folder import digest_tensors, files_of
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import Change, LowRankDelta, RowValues
from portllm.patch.identify import identify
from portllm.patch.nothing import why_nothing
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.serving.runtime import Form, Part, Runtime
from portllm.tensors.encoding import is_plain
from portllm.tensors.info import TensorInfo, float_dtype

SHOWN = 3
_LAYER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Slot:
    """A module of the export.

    Attributes:
        module: Its name in the class that is served.
        shape: (d_out, d_in) of its weight.
        delta: What the patch adds to it; None for a module that gets zeros because the runtime wants it there.
    """

    module: str
    shape: tuple[int, int]
    delta: LowRankDelta[TensorInfo] | None


@dataclass(frozen=True, slots=True)
class ExportPlan:
    """A patch about to be written in the form that a runtime takes.

    Attributes:
        patch: The patch.
        runtime: The runtime.
        base: The model that is served, where it was given.
        base_identity: Its identity, or that of the base that the patch records; None where neither is known.
        name: The name to serve it under: the patch's, and a digest of patch, base and ports.
        slots: The modules of an export as an adapter, by name; empty where the patch goes as it is, or is merged.
        changes: Of an export as a merged model, what is done to each tensor.
        template: The GGUF file whose metadata and tokenizer a merged model gets; None where it is a copy of its own.
        merge: The merge that is written like it.
        rank: Of every module of the export.
        dtype: Of its factors.
        notes: What a user should know.
        refusals: Every reason not to run.
    """

    patch: Patch[TensorInfo]
    runtime: Runtime
    base: Checkpoint | None
    base_identity: ModelIdentity | None
    name: str
    slots: tuple[Slot, ...]
    changes: Mapping[str, Change[TensorInfo]]
    template: GGUFFile | None
    merge: MergePlan | None
    rank: int
    dtype: str
    notes: tuple[str, ...]
    refusals: tuple[Refusal, ...]

    @property
    def nothing(self) -> str | None:
        """Why the patch changes nothing; None where it does. Reads factors."""
        return why_nothing(self.patch)

    @property
    def files(self) -> tuple[Source, ...]:
        """What is read."""
        return (*files_of(self.patch), *(() if self.base is None else self.base.files))

    @property
    def n_modules(self) -> int:
        """How many modules or tensors the export changes."""
        return len(self.slots) or len(self.changes) or len(self.patch.deltas) + len(self.patch.experts)

    @property
    def patch_name(self) -> str:
        """The name of the patch, without the way to it."""
        return PurePath(self.patch.name).name

    @property
    def base_name(self) -> str:
        """What the export calls the model."""
        return "BASE" if self.base_identity is None else self.base_identity.name

    @property
    def base_revision(self) -> str | None:
        """The commit hash of a model of the hub, else None."""
        return None if self.base_identity is None else self.base_identity.revision

    @property
    def targets(self) -> list[str]:
        """`target_modules`: the last part of each module's name where that means these modules and no others."""
        modules = {slot.module for slot in self.slots}
        leaves = {_leaf(module) for module in modules}
        others = () if self.base is None else (module for module in self.base.linear if module not in modules)
        return sorted(modules if any(_leaf(module) in leaves for module in others) else leaves)


def plan_export(
    patch: Patch[TensorInfo],
    runtime: Runtime,
    *,
    base: Checkpoint | None = None,
    gguf: GGUFFile | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
) -> ExportPlan:
    """Plan to write a patch in the form that a runtime takes.

    Args:
        patch: What to export.
        runtime: Which runtime.
        base: The model that is served. Needed for forms that depend on it; checked wherever it is given.
        gguf: For a merged GGUF file of a model in safetensors: a file of that model, or of an older version of it.
        dtype: Of the factors; float32 where nothing is said, so that nothing is rounded twice. Of a merged GGUF file:
            of its matrices; those of the model where nothing is said.
        allow_other_base: Take `base` for the patch's base though its fingerprint says otherwise.

    Raises:
        UnsupportedDtypeError: There is no such dtype.
    """
    refusals: list[Refusal] = []
    if base is not None:
        patch = oriented(patch, base)
        # Rows of added tokens have no place in a file of the model; PEFT loads them on a base that is resized for them.
        n_rows = None if runtime.form is Form.GGUF_MODEL else height_of(patch, base)
        refusals += mismatches(patch, base, n_rows=n_rows)
        refusals += _of_other_base(patch, runtime, base, allow_other_base=allow_other_base)
    refusals += _unheld(patch, runtime, base)
    refusals += _misplaced(runtime, base, gguf, dtype)
    merge: MergePlan | None = None
    slots: tuple[Slot, ...] = ()
    changes: Mapping[str, Change[TensorInfo]] = {}
    rank = max((delta.rank for delta in patch.deltas.values()), default=0)
    if gguf is not None and base is not None and not refusals:
        base = on_disk(base)
        options = MergeOptions(dtype=None if dtype is None else float_dtype(dtype), allow_other_base=allow_other_base)
        merge = plan_merge(patch, into=base, options=options)
        changes = {name: step.change for name, step in merge.steps.items() if step.change is not None}
        refusals += merge.refusals or (*template_refusals(gguf, base, merge.beside.files), *_unplaceable(merge))
    elif runtime.form is Form.GGUF_MODEL and not refusals:
        changes = {} if base is None else changes_on(patch, base)
        refusals += _unmergeable(changes, patch, runtime, base)
    elif runtime.form is not Form.PEFT and not refusals:
        slots = tuple(_slots(patch, runtime, base))
        refusals += _unplaced(patch, runtime, base)
        taken = runtime.rank_for(rank)
        if taken is None:
            refusals.append(
                Refusal(
                    patch.name,
                    f"its largest rank is {rank}; {runtime.title} takes up to {runtime.max_rank or runtime.ranks[-1]}. "
                    f"Cut it with 'portllm combine {patch.name} ... --rank N', or merge it: {_merge(patch, base)}.",
                )
            )
        rank = taken or rank
    given = None if base is None else identify(base)
    named = given or (None if patch.record is None else patch.record.base)
    notes = tuple(_notes(patch, named, slots, rank))
    dtype = "F32" if dtype is None else float_dtype(dtype)
    refused = tuple(sorted(refusals))
    return ExportPlan(
        patch, runtime, base, named, _name(patch, named), slots, changes, gguf, merge, rank, dtype, notes, refused
    )


def _of_other_base(
    patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint, *, allow_other_base: bool
) -> Iterator[Refusal]:
    """Why a model is not the one that the patch belongs to; its GGUF file is, where the numbers are the same."""
    is_file = runtime.form in (Form.GGUF_LORA, Form.GGUF_MODEL) and gguf_file_of(base) is not None
    if is_file and patch.record is not None and same_in(base, patch.record.base) is not None:
        return
    yield from base_mismatch(patch, identify(base), model=base, option="--base", allow_other_base=allow_other_base)


def _unheld(patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint | None) -> Iterator[Refusal]:
    """The parts of a patch that a runtime has no place for, each with the modules that have it."""
    at = "" if runtime.form is Form.GGUF_MODEL else " in an adapter"
    for part, where in _parts(patch, base).items():
        if where and part not in runtime.holds:
            rest = f" and {len(where) - SHOWN} more" if len(where) > SHOWN else ""
            why = f": {runtime.why[part]}" if part in runtime.why else ""
            yield Refusal(
                f"{', '.join(where[:SHOWN])}{rest}",
                f"{runtime.title} takes no {part}{at}{why}. {_way(patch, runtime, base)}.",
            )


def _parts(patch: Patch[TensorInfo], base: Checkpoint | None) -> Mapping[Part, list[str]]:
    deltas = patch.deltas
    head = None if base is None else base.head_module
    experts = [module for module in deltas if ".experts." in module]
    linear = {module: delta for module, delta in deltas.items() if not delta.is_embedding}
    return {
        Part.DORA: [module for module, delta in deltas.items() if delta.magnitude is not None],
        Part.WHOLE: [name for name in patch.values if not name.endswith(".bias")],
        Part.BIASES: [name for name in patch.values if name.endswith(".bias")],
        Part.BIAS_DELTAS: list(patch.bias_deltas),
        Part.TOKEN_ROWS: list(patch.rows),
        Part.ADDED_TOKENS: list(patch.resized),
        Part.EXPERTS: [*patch.experts, *experts],
        Part.EMBEDDING: [module for module, delta in deltas.items() if delta.is_embedding],
        Part.HEAD: [module for module in linear if module == head or _leaf(module) in HEAD_NAMES],
        Part.CONV1D: [module for module, delta in linear.items() if delta.transposed],
    }


def _unplaced(patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint | None) -> Iterator[Refusal]:
    """Why a form cannot be written: the model is needed for it, or its architecture has no known places."""
    if runtime.form is Form.GGUF_LORA:
        if base is None:
            yield Refusal("--base", f"{runtime.title} names and orders tensors by architecture: pass the model.")
        elif architecture_of(base) is None:
            yield Refusal(
                "--base",
                f"the tensors of a GGUF file of model type '{base.config.get('model_type')}' are not known here. "
                f"Merge the patch and convert the result with llama.cpp: {_merge(patch, base)}.",
            )
        else:
            for module in patch.deltas:
                if place_of(base.current_name(module) + WEIGHT, base) is None:
                    yield Refusal(module, f"a GGUF file of {base.name} has no such tensor. {_merge(patch, base)}.")
        return
    if runtime.form is Form.MLX:
        names = patch.deltas if base is None else map(base.current_name, patch.deltas)
        for module in names:
            if not module.startswith(LAYERS):
                yield Refusal(
                    module,
                    f"what {runtime.title} calls it is not known: only '{LAYERS}N' are. {_way(patch, runtime, base)}.",
                )
    if base is None and runtime.every_layer and not _is_complete(patch, runtime):
        yield Refusal(
            "--base",
            f"{runtime.title} wants each module in every layer, and whether the patch has it in every layer is known "
            "from the model alone: pass it.",
        )


def _unmergeable(
    changes: Mapping[str, Change[TensorInfo]], patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint | None
) -> Iterator[Refusal]:
    """Why changes cannot be merged into the GGUF file of a model."""
    if base is None or gguf_file_of(base) is None:
        given = "" if base is None else f"{base.name} is no GGUF file. "
        yield Refusal(
            "--base",
            f"{given}{runtime.title} is given a GGUF file with the patch merged in. Beside a model in safetensors, "
            f"pass {TEMPLATE} OLD.gguf, any GGUF file of it or of an older version of it, also a quantized one: its "
            "metadata and its tokenizer are used. Or pass the model's own GGUF file in f16 or bf16 as --base.",
        )
        return
    shared = base.tied_embedding
    quantized = []
    for name, change in changes.items():
        info = base.stored(name)
        is_rows = isinstance(change, RowValues) and base.rows_reach_head
        if info is None or (info is shared and not is_rows):
            yield Refusal(
                name,
                f"head and embedding are one matrix in {base.name}, and the patch changes only one of them. Merge into "
                f"the folder of the model, which unties them, and convert the result: {_merge(patch, None)}.",
            )
        elif info.encoding is not None and not is_plain(info.encoding):
            quantized.append(f"{name} ({info.encoding.scheme})")
    if quantized:
        rest = f" and {len(quantized) - SHOWN} more" if len(quantized) > SHOWN else ""
        yield Refusal(
            f"{', '.join(quantized[:SHOWN])}{rest}",
            f"quantized in {base.name}: rounding the sum to it again would lose most of the patch. Pass the f16 or "
            "bf16 file that it was made from, and quantize the output with llama-quantize; or serve the adapter on the "
            f"quantized file: portllm export {patch.name} --for llamacpp --base {base.name} -o DIR.",
        )


def _misplaced(
    runtime: Runtime, base: Checkpoint | None, gguf: GGUFFile | None, dtype: str | None
) -> Iterator[Refusal]:
    """Options of a merged GGUF file that have no place here."""
    if gguf is not None and runtime.form is not Form.GGUF_MODEL:
        yield Refusal(TEMPLATE, "is for a merged GGUF file, which 'export --for ollama' writes.")
    elif gguf is not None and (base is None or gguf_file_of(base) is not None):
        yield Refusal(TEMPLATE, "is for a model in safetensors: pass that as --base, or a GGUF file as --base alone.")
    elif gguf is not None and base is not None and base.is_quantized:
        why = f"is quantized ({base.quantization}). Merge first, with --dtype bfloat16: the output is not quantized."
        yield Refusal(base.name, why)
    elif gguf is None and dtype is not None and runtime.form is Form.GGUF_MODEL:
        yield Refusal("--dtype", "a copy of a GGUF file keeps the types of its tensors.")


def _unplaceable(merge: MergePlan) -> Iterator[Refusal]:
    """Tensors of a merged model that a GGUF file has no place for."""
    for step, place in placed_steps(merge):
        if place is None:
            yield Refusal(step.entry.name, f"a GGUF file of {merge.into.name} has no such tensor.")


def _is_complete(patch: Patch[TensorInfo], runtime: Runtime) -> bool:
    """Whether the configuration alone says that each module is adapted in every layer, and so what goes with it."""
    fields = patch.config.fields
    leaves = {_leaf(module) for module in patch.deltas}
    if any(leaves & set(group) and not leaves >= set(group) for group in runtime.together):
        return False
    if fields.get("layers_to_transform") not in (None, []) or fields.get("exclude_modules"):
        return False
    targets = fields.get("target_modules")
    if isinstance(targets, list):
        return not any(re.search(r"(^|\.)\d+(\.|$)", str(name)) for name in targets)
    return isinstance(targets, str) and targets.lower() == ALL_LINEAR


def _slots(patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint | None) -> Iterator[Slot]:
    """The modules of an export: those of the patch, and those that have to be there with them."""
    deltas = {module if base is None else base.current_name(module): delta for module, delta in patch.deltas.items()}
    shapes: dict[str, tuple[int, int]] = {module: delta.shape for module, delta in deltas.items()}
    if base is not None and runtime.every_layer:
        kinds = {_LAYER.sub(".*.", module) for module in deltas}
        parents = {_leaf(kind): kind.rpartition(".")[0] for kind in kinds}
        for group in runtime.together:
            kinds |= {f"{parents[there]}.{leaf}" for there in group if there in parents for leaf in group}
        for module, info in base.linear.items():
            if _LAYER.sub(".*.", module) in kinds:
                shapes.setdefault(module, (info.shape[0], info.shape[1]))
    for module, shape in sorted(shapes.items()):
        yield Slot(module, shape, deltas.get(module))


def _notes(patch: Patch[TensorInfo], base: ModelIdentity | None, slots: tuple[Slot, ...], rank: int) -> Iterator[str]:
    if base is None:
        yield f"{patch.name} has no patch.json and no --base was given: nothing shows which model it belongs to."
    zeros = sum(slot.delta is None for slot in slots)
    if zeros:
        yield f"{zeros} modules that the patch leaves alone are written as zeros, because they must be there."
    ranks = sorted({slot.delta.rank for slot in slots if slot.delta is not None})
    if slots and ranks != [rank]:
        yield f"factors of rank {', '.join(map(str, ranks))} are padded with zeros to rank {rank}."


def _name(patch: Patch[TensorInfo], base: ModelIdentity | None) -> str:
    """The patch's name and a digest of all that its answers depend on, so that no cache of another one is used."""
    ports = () if patch.record is None else patch.record.ports
    fields = {name: patch.config.fields.get(name) for name in ("alpha_pattern", "lora_alpha", "r", "use_rslora")}
    generation = {
        "tensors": digest_tensors(patch),
        "fields": fields,
        "base": None if base is None else base.fingerprint,
        "ports": [encode(step) for step in ports],
    }
    digest = blake3(json.dumps(generation, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", PurePath(patch.name.partition("@")[0]).name.lower()).strip("-")
    return f"{slug or 'patch'}-{digest}"


def _merge(patch: Patch[TensorInfo], base: Checkpoint | None) -> str:
    return f"portllm merge {patch.name} --into {'BASE' if base is None else base.name} -o MODEL"


def _way(patch: Patch[TensorInfo], runtime: Runtime, base: Checkpoint | None) -> str:
    """The way to serve what an adapter has no place for."""
    merged = f"Serve the merged model: {_merge(patch, base)}"
    if runtime.form is Form.GGUF_LORA:
        return (
            f"{merged}; or write a merged GGUF file: portllm export {patch.name} --for ollama "
            f"--base {'BASE' if base is None else base.name} {TEMPLATE} OLD.gguf -o MODEL"
        )
    return merged


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
