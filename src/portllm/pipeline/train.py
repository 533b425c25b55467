"""A first patch: LoRA fine-tuning on a JSONL file, captured with the record of what it was trained on."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from blake3 import blake3

from portllm.checkpoint.header import TensorInfo
from portllm.checkpoint.reader import GGUF_SUFFIX, Checkpoint, on_disk
from portllm.checkpoint.writer import check_free
from portllm.errors import DataError, NotFoundError
from portllm.live.examples import Example, ExampleFormat, read_examples
from portllm.live.model import Device
from portllm.live.train import TrainReport, TrainSettings, train_lora
from portllm.patch.adapter_folder import load_patch
from portllm.patch.patch import Patch
from portllm.pipeline.capture import capture_adapter
from portllm.progress import Progress, silent


def train(
    base: Checkpoint,
    *,
    data: Path,
    fmt: ExampleFormat,
    out: Path,
    settings: TrainSettings | None = None,
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
        device: Where to train.
        overwrite: Replace `out` where it exists.
        progress: Told of every step.

    Returns:
        The patch, opened from `out`, and what training did.

    Raises:
        DataError: Rows do not fit.
        NotFoundError: The base is a single file, without configuration and tokenizer.
        OutputExistsError: `out` exists; said before any work is done.
    """
    check_free(out, overwrite=overwrite)
    recorded = {
        "prompt": fmt.prompt,
        "completion": fmt.completion,
        "data": f"blake3:{blake3(data.read_bytes()).hexdigest()}",
    }
    return train_on(
        base,
        read_examples(data, fmt),
        out=out,
        recorded=recorded,
        settings=settings,
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
    device: Device = "auto",
    overwrite: bool = False,
    progress: Progress = silent,
) -> tuple[Patch[TensorInfo], TrainReport]:
    """As `train`, on prompts and completions.

    Args:
        base: The model.
        examples: Prompts and completions.
        out: The patch's folder.
        recorded: What the patch's record says of them.
        settings: Rank, learning rate and the like.
        device: Where to train.
        overwrite: Replace `out` where it exists.
        progress: Told of every step.
    """
    check_free(out, overwrite=overwrite)
    folder = model_folder(base, progress=progress)
    settings = settings or TrainSettings()
    with tempfile.TemporaryDirectory(prefix="portllm-train-") as scratch:
        adapter = Path(scratch) / "adapter"
        report = train_lora(folder, examples, settings, adapter, device=device, progress=progress)
        ran = {"rows": report.n_rows, "rows_cut": report.n_cut_rows, "steps": report.steps}
        patch = capture_adapter(
            load_patch(adapter),
            base=base,
            out=out,
            method="train",
            settings={**asdict(settings), **recorded, **ran},
            overwrite=overwrite,
        )
    return patch, report


def recorded_format(patch: Patch[TensorInfo], *, prompt: str | None, completion: str | None) -> ExampleFormat:
    """How to ask a patch: as it was trained, but for what is given.

    Raises:
        DataError: Neither is known.
    """
    settings = patch.record.capture.settings if patch.record else {}
    prompt = prompt if prompt is not None else _text(settings.get("prompt"))
    completion = completion if completion is not None else _text(settings.get("completion"))
    if prompt is None or completion is None:
        raise DataError(
            f"'{patch.name}': does not say how its prompts were made, as it was not trained with 'portllm train'. "
            "Pass --prompt and --completion."
        )
    return ExampleFormat(prompt=prompt, completion=completion)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def model_folder(checkpoint: Checkpoint, *, progress: Progress = silent) -> Path:
    """The folder of a checkpoint that is to run; a model that stays on the hub is downloaded.

    Raises:
        NotFoundError: It is a single file, without configuration and tokenizer.
        RemoteError: It cannot be downloaded.
    """
    check_runnable(checkpoint)
    folder = on_disk(checkpoint, progress=progress).folder
    if folder is None:
        raise AssertionError("what can run has a folder once it is on disk")
    return folder


def check_runnable(checkpoint: Checkpoint) -> None:
    """Raise NotFoundError if a checkpoint is a single file, without configuration and tokenizer, or a GGUF file."""
    if any(str(file).endswith(GGUF_SUFFIX) for file in checkpoint.files):
        raise NotFoundError(
            f"'{checkpoint.name}': is a GGUF file, whose weights can be read but not run here. Give the folder of the "
            "model that it was made from."
        )
    if checkpoint.folder is None and not checkpoint.is_remote:
        raise NotFoundError(
            f"'{checkpoint.name}': is a single file; running a model needs its configuration and tokenizer too. Give "
            "the folder that holds them."
        )
