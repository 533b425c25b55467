"""A first patch: LoRA fine-tuning on a JSONL file, captured with the record of what it was trained on."""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PlanRefusedError, Refusal
from portllm.files.input_file import local_file, unchanged
from portllm.files.output_folder import check_apart, check_free
from portllm.files.record import encode
from portllm.matching.compatibility import base_refusals, mismatches
from portllm.patch.adapter_folder import digest_tensors, files_of, folder_of, load_patch
from portllm.patch.low_rank import is_plain_lora
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.running.examples import Example, ExampleFormat, read_examples, read_with_digest
from portllm.running.folder import model_folder
from portllm.running.model import Device
from portllm.training.lora import TrainReport, TrainSettings, train_lora


def train_on_rows(
    base: Checkpoint,
    *,
    data: Path,
    fmt: ExampleFormat,
    out: Path,
    settings: TrainSettings | None = None,
    start: Patch[TensorInfo] | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """Fine-tune a patch for a base and write it to `out`.

    Args:
        base: The model; a folder with configuration and tokenizer.
        data: JSONL rows.
        fmt: What of a row is prompt and what completion; recorded, so that `evaluate` asks the same way.
        out: The patch's folder.
        settings: Rank, learning rate and the like.
        start: A patch of this base to train on, such as a ported one; its rank, alpha and modules are kept.
        device: Where to train.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (steps).

    Returns:
        The patch, opened from `out`, and what training did.

    Raises:
        DataError: Rows do not fit.
        PlanRefusedError: `start` cannot be trained on.
        NotFoundError: The base is a single file, without configuration and tokenizer.
        OutputExistsError: `out` exists; said before any work is done.
    """
    check_free(out, overwrite=overwrite)
    check_apart(out, [local_file(data)])
    examples, digest = read_with_digest(data, lambda: read_examples(data, fmt))
    recorded = {"prompt": fmt.prompt, "completion": fmt.completion, "data": digest}
    return train_on(
        base,
        examples,
        out=out,
        recorded=recorded,
        settings=settings,
        start=start,
        device=device,
        overwrite=overwrite,
        progress=progress,
    )


def train_on(
    base: Checkpoint,
    examples: Sequence[Example],
    *,
    out: Path,
    recorded: Mapping[str, object],
    settings: TrainSettings | None = None,
    start: Patch[TensorInfo] | None = None,
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """As `train_on_rows`, on prompts and completions.

    Args:
        base: The model.
        examples: Prompts and completions.
        out: The patch's folder.
        recorded: What the patch's record says of them.
        settings: Rank, learning rate and the like.
        start: A patch of this base to train on, such as a ported one; its rank, alpha and modules are kept.
        device: Where to train.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (steps).
    """
    settings = settings or TrainSettings()

    def run(model: Path, adapter: Path) -> TrainReport:
        first = None if start is None else folder_of(start)
        return train_lora(model, examples, settings, adapter, device=device, start=first, progress=progress)

    return capture_training(
        base, run, out=out, recorded=recorded, settings=settings, start=start, overwrite=overwrite, progress=progress
    )


def capture_training(
    base: Checkpoint,
    run: Callable[[Path, Path], TrainReport],
    *,
    out: Path,
    recorded: Mapping[str, object],
    settings: TrainSettings,
    start: Patch[TensorInfo] | None,
    overwrite: bool,
    progress: Progress,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """Run a training of an adapter and write what came of it as a patch.

    Args:
        base: The model.
        run: Given its folder, and the adapter's to be.
        out: The patch's folder.
        recorded: What the record says of the rows and the loss.
        settings: What else shaped the patch.
        start: What the adapter began with, or None.
        overwrite: Replace `out` if it exists.
        progress: Progress callback (downloaded bytes).

    Raises:
        PlanRefusedError: `start` cannot be trained on.
        OutputExistsError: `out` exists; said before any work is done.
    """
    check_free(out, overwrite=overwrite)
    check_apart(out, [*base.files, *(() if start is None else files_of(start))])
    if start is not None and (refusals := sorted(set(start_refusals(start, base)))):
        raise PlanRefusedError(refusals)
    folder = model_folder(base, progress=progress)
    with tempfile.TemporaryDirectory(prefix="portllm-train-") as scratch:
        adapter = Path(scratch) / "adapter"
        with unchanged(() if start is None else files_of(start)):
            report = run(folder, adapter)
        ran = {"rows": report.n_rows, "rows_cut": report.n_cut_rows, "steps": report.steps}
        began = {} if start is None else _began_with(start)
        patch = capture_adapter(
            load_patch(adapter),
            base=base,
            out=out,
            method="train",
            settings={**asdict(settings), **began, **recorded, **ran},
            overwrite=overwrite,
        )
    return patch, report


def start_refusals(start: Patch[TensorInfo], base: Checkpoint) -> Iterator[Refusal]:
    """Why a patch cannot be trained on with a base."""
    yield from mismatches(start, base)
    yield from base_refusals(start, base, option="--init-from")
    if not is_plain_lora(start):
        yield Refusal(
            "--init-from",
            f"{start.name} contains more than LoRA deltas (a DoRA magnitude, experts, saved tensors, token rows "
            "or biases), but training can only continue from LoRA factors. Train a new patch.",
        )


def origin_of(patch: Patch[TensorInfo]) -> dict[str, object]:
    """What a record says of another patch: its name, its tensors, and where it comes from and was ported to."""
    record = {} if patch.record is None else encode(patch.record)
    known: dict[str, object] = {name: record[name] for name in ("base", "capture", "ports") if name in record}
    return {"name": patch.name, "tensors": dict(sorted(digest_tensors(patch).items())), **known}


def _began_with(start: Patch[TensorInfo]) -> dict[str, object]:
    """What of the settings is the first patch's, and which that was."""
    fields = start.config.fields
    return {
        "rank": fields["r"],
        "alpha": fields.get("lora_alpha", 8),
        "target_modules": fields["target_modules"],
        "use_rslora": bool(fields.get("use_rslora")),
        "init_from": origin_of(start),
    }
