"""Compare base, patched, evolved, ported and retrained models, once all are known to match."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import refuse
from portllm.evaluating.file_rows import FileRows
from portllm.evaluating.plan import plan_evaluation, trained_on
from portllm.files.input_file import unchanged
from portllm.patch.adapter_folder import PatchLike, files_of, load_patch
from portllm.progress import Progress, silent
from portllm.running.data import chat_template_for, read_data
from portllm.running.device import Device, Dtype

if TYPE_CHECKING:
    from portllm.evaluating.compare import Comparison
    from portllm.evaluating.scoring import Scored


def evaluate(
    rows: "Scored | FileRows | str | Path",
    *,
    base: ModelLike,
    patch: PatchLike,
    evolved: ModelLike,
    ported: PatchLike,
    rivals: Sequence[PatchLike] = (),
    retrained: PatchLike | None = None,
    merged: ModelLike | None = None,
    allow_other_base: bool = False,
    allow_training_data: bool = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> "Comparison":
    """Compare the models on the rows of a task; each base is loaded once.

    Args:
        rows: A data file, with prompts as `patch` was trained on, or as the shape of the rows says, and its completions
            as labels; or `FileRows` or a `Task`, which say how rows are judged; or a benchmark, as `HarnessRows`.
        base: The model that the patch was made on.
        patch: The patch.
        evolved: The updated base.
        ported: The patch ported to it.
        rivals: Other ports of it, such as by another method, set beside that one.
        retrained: A patch trained on the evolved model; retention needs it.
        merged: The evolved model with the ported patch merged in, as a separate row.
        allow_other_base: Accept a model other than the one a patch was made on.
        allow_training_data: Accept the file that a patch was trained on.
        device: Device to run on.
        dtype: What models compute in: `auto`, the stored dtype where the processor computes in it, or `float32`, so
            that no near tie is decided by rounding.
        seed: Random seed of the intervals' bootstrap.
        progress: Progress callback (rows).

    Raises:
        PlanRefusedError: A patch does not match its model, or was trained on the rows; lists every reason.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        DataError: Rows are invalid.
        InputChangedError: A file of theirs changed meanwhile.
    """
    old, new = load_patch(patch), load_patch(ported)
    others, again = list(map(load_patch, rivals)), None if retrained is None else load_patch(retrained)
    if isinstance(rows, str | Path):
        rows = FileRows(read_data(Path(rows), old))
    before, after = (open_checkpoint(model, progress=progress) for model in (base, evolved))
    whole = None if merged is None else open_checkpoint(merged, progress=progress)
    patches = [given for given in (old, new, *others, again) if given is not None]
    models = [given for given in (before, after, whole) if given is not None]
    if isinstance(rows, FileRows) and not allow_training_data:
        consequence = "Such rows say nothing about others. Pass other rows, or --allow-training-data."
        refuse(trained_on(rows.data.digest, *patches, consequence=consequence))
    with unchanged(file for files in (*map(files_of, patches), *(model.files for model in models)) for file in files):
        contestants = plan_evaluation(
            base=before,
            patch=old,
            evolved=after,
            ported=new,
            rivals=others,
            retrained=again,
            merged=whole,
            allow_other_base=allow_other_base,
            progress=progress,
        )
        template = chat_template_for(rows.data, old, folder=contestants.base) if isinstance(rows, FileRows) else None
        from portllm.evaluating.compare import compare  # loads torch, which no refusal needs

        task = rows.task(contestants.base, template) if isinstance(rows, FileRows) else rows
        return compare(contestants, task, device=device, dtype=dtype, seed=seed, progress=progress)
