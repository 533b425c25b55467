"""Write a patch in the form that a runtime takes."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm import __version__
from portllm.checkpoint.gguf.file import open_gguf
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import refuse
from portllm.exporting.plan import ExportPlan, plan_export
from portllm.files.json_file import read_json
from portllm.files.output_folder import check_free, staged_folder
from portllm.files.record import Blake3, Recorded, write_sealed
from portllm.files.seal import digest_file
from portllm.patch.adapter_folder import CARD_FILE, PatchLike, load_patch, write_patch
from portllm.patch.card import write_export_card
from portllm.patch.record import ModelIdentity
from portllm.patch.rounding import MergeSums
from portllm.progress import Progress, silent
from portllm.serving.runtime import Form, runtime_named

EXPORT_FILE = "export.json"
MODELFILE = "Modelfile"
"""What Ollama makes a model from."""


class ExportRecord(Recorded, frozen=True, tag_field="format", tag=1):
    """The content of `export.json`: what was exported for which runtime, and the digests of what was written.

    Attributes:
        program: Version of PortLLM that wrote it.
        runtime: The id of the runtime.
        read: The version of the runtime whose source was read for its form.
        name: The name to serve it under; of another patch, base or port it is another one.
        patch: The patch, as it was named.
        base: The model that it is served on, where that is known.
        file: What the runtime is given, a file of this folder; None where it is given the folder.
        rank: Of every module; None where the patch is as it was.
        dtype: Of the factors; None where the patch is as it was.
        kept_gain: Of a merged model, what rounding kept of the patch; None for an adapter.
        files: blake3 digest of each file beside this one.
    """

    program: str
    runtime: str
    read: str
    name: str
    patch: str
    base: ModelIdentity | None
    file: str | None
    rank: int | None
    dtype: str | None
    kept_gain: float | None
    files: Mapping[str, Blake3]


@dataclass(frozen=True, slots=True)
class Exported:
    """An export that was written.

    Attributes:
        folder: Where it is.
        record: The content of its `export.json`.
        n_modules: Modules that it has.
        serve: How the runtime is started or called with it.
        prove: The command that shows whether the runtime serves it as it is; None where none starts the runtime.
        notes: What a user should know.
    """

    folder: Path
    record: ExportRecord
    n_modules: int
    serve: str
    prove: str | None
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Exported({str(self.folder)!r}, runtime={self.record.runtime!r}, name={self.record.name!r})"

    @property
    def given(self) -> Path:
        """What the runtime is given: the folder, or a file in it."""
        return self.folder if self.record.file is None else self.folder / self.record.file


def export(
    patch: PatchLike,
    *,
    runtime: str,
    out: str | Path,
    base: ModelLike | None = None,
    gguf: str | Path | None = None,
    dtype: str | None = None,
    allow_other_base: bool = False,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Exported:
    """Write a patch to `out` in the form that a runtime takes; what it has no place for is refused by name.

    Args:
        patch: What to export.
        runtime: A row of the table in `docs/how-to/serve.md`, such as `vllm`.
        out: The folder to write.
        base: The model that is served; some forms depend on it.
        gguf: For a merged GGUF file of a model in safetensors: a GGUF file of that model or of an older version of it,
            in any quantization, whose metadata and tokenizer are used.
        dtype: Of the factors. In float32, the default, they are as exact as those of the patch; a runtime rounds them
            to the dtype that it computes in. With `gguf`: of the matrices; by default those of the model.
        allow_other_base: Take `base` for the patch's base though its fingerprint says otherwise.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (modules).

    Raises:
        PortLLMError: There is no such runtime.
        PlanRefusedError: The runtime has no place for a part of the patch, or the model is needed; lists every reason.
        NonFiniteError: A factor contains an infinity or NaN.
        OutputExistsError: `out` exists.
        OutputError: `out` cannot be written, or contains an input.
    """
    plan = plan_export(
        load_patch(patch),
        runtime_named(runtime),
        base=None if base is None else open_checkpoint(base),
        gguf=None if gguf is None else open_gguf(Path(gguf)),
        dtype=dtype,
        allow_other_base=allow_other_base,
    )
    return run_export(plan, Path(out), overwrite=overwrite, progress=progress)


def run_export(plan: ExportPlan, out: Path, *, overwrite: bool = False, progress: Progress = silent) -> Exported:
    """Carry out a plan; see `export`."""
    refuse(plan.refusals)
    check_free(out, overwrite=overwrite)
    with staged_folder(out, overwrite=overwrite, inputs=plan.files) as folder:
        sums = _write(plan, folder, file_of(plan), progress)
        write_export_card(folder, _card(plan), plan.patch, base=plan.base_identity, library=plan.runtime.library)
        is_plain = bool(plan.slots)
        record = ExportRecord(
            __version__,
            plan.runtime.id,
            plan.runtime.version,
            plan.name,
            plan.patch.name,
            plan.base_identity,
            file_of(plan),
            plan.rank if is_plain else None,
            plan.dtype if is_plain else None,
            None if sums is None else float(f"{sums.kept_gain:.6g}"),
            {entry.name: digest_file(entry) for entry in sorted(folder.iterdir()) if entry.name != CARD_FILE},
        )
        write_sealed(folder / EXPORT_FILE, record)
    return Exported(out, record, plan.n_modules, serve_command(plan, out), prove_command(plan, out), plan.notes)


def given_of(export: Path) -> Path:
    """What the runtime is given of an export on disk: a file of its folder where `export.json` names one.

    Raises:
        CheckpointError: `export.json` cannot be read.
    """
    record = export / EXPORT_FILE
    file = read_json(record).get("file") if record.is_file() else None
    return export / file if isinstance(file, str) and Path(file).name == file else export


def serve_command(plan: ExportPlan, out: Path) -> str:
    """How the runtime is started or called with an export."""
    file = out / (file_of(plan) or "")
    return plan.runtime.serve.format(base=plan.base_name, folder=out, file=file, name=plan.name, rank=plan.rank)


def prove_command(plan: ExportPlan, out: Path) -> str | None:
    """What shows whether the runtime serves an export as it is; None where `prove` starts no runtime that takes it."""
    if not plan.runtime.prove:
        return None
    is_file = plan.runtime.form in (Form.GGUF_LORA, Form.GGUF_MODEL)
    served = " --served-base BASE.gguf" if is_file else ""
    words = [plan.patch.name, "--base", plan.base_name, "--runtime", plan.runtime.prove, "--export", str(out)]
    return f"portllm prove {shlex.join(words)}{served}"


def _card(plan: ExportPlan) -> list[str]:
    """What the export's model card says of it; where it lies is for the reader to fill in."""
    runtime = plan.runtime
    form = "A merged model" if runtime.form is Form.GGUF_MODEL else "A LoRA patch"
    return [
        f"# {plan.name}",
        "",
        f"{form} in the form that {runtime.title} takes, written by PortLLM from `{plan.patch_name}`. `export.json` "
        "records what it was made of, and `portllm verify FOLDER` checks every byte.",
        "",
        "## How to load it",
        "",
        "```",
        serve_command(plan, Path("FOLDER")),
        "```",
        "",
        f"Exchanging it for a ported patch: {runtime.swap}.",
    ]


def file_of(plan: ExportPlan) -> str | None:
    """What the runtime is given, a file of the export; None where it is given the folder."""
    match plan.runtime.form:
        case Form.FILE:
            return f"{plan.name}.safetensors"
        case Form.GGUF_LORA | Form.GGUF_MODEL:
            return f"{plan.name}.gguf"
        case _:
            return None


def _write(plan: ExportPlan, folder: Path, file: str | None, progress: Progress) -> MergeSums | None:
    """Write what the runtime takes; for a merged model, what rounding took."""
    if plan.runtime.form is Form.PEFT:
        write_patch(folder, plan.patch, base_name=plan.base_name, base_revision=plan.base_revision)
        return None
    if plan.runtime.form is Form.GGUF_MODEL and file is not None:
        from portllm.exporting.gguf_model import write_gguf_model

        sums = write_gguf_model(folder, plan, file=file, progress=progress)
        (folder / MODELFILE).write_text(f"FROM ./{file}\n", encoding="utf-8")
        return sum(sums.values(), MergeSums())
    from portllm.exporting.adapter_files import write_file, write_lora, write_mlx  # loads torch
    from portllm.exporting.factors import each_factors

    factors = each_factors(plan.slots, rank=plan.rank, dtype=plan.dtype, progress=progress)
    match plan.runtime.form:
        case Form.LORA:
            write_lora(folder, plan, factors)
        case Form.MLX:
            write_mlx(folder, plan, factors)
        case Form.FILE if file is not None:
            write_file(folder, plan, factors, file=file)
        case Form.GGUF_LORA if file is not None:
            from portllm.exporting.gguf_adapter import write_gguf_lora

            write_gguf_lora(folder, plan, factors, file=file)
    return None
