"""Compare base, patched, evolved, ported and retrained models, once all are known to match.

PEFT loads an adapter onto any model whose names and shapes agree. Here a patch is compared on the model that it
belongs to, or not at all.
"""

from collections.abc import Iterator
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import PlanRefusedError, Refusal
from portllm.evaluating.compare import Comparison, Contestants, compare
from portllm.evaluating.scoring import Scored, Task
from portllm.files.input_file import unchanged
from portllm.matching.compatibility import base_mismatch, mismatches, unmatchable
from portllm.patch.adapter_folder import PatchLike, files_of, folder_of, load_patch
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.progress import Progress, silent
from portllm.running.examples import read_examples
from portllm.running.folder import model_folder
from portllm.running.model import Device
from portllm.running.recorded import recorded_format


def evaluate(
    rows: Scored | str | Path,
    *,
    base: ModelLike,
    patch: PatchLike,
    evolved: ModelLike,
    ported: PatchLike,
    retrained: PatchLike | None = None,
    merged: ModelLike | None = None,
    allow_other_base: bool = False,
    device: Device = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Compare the models on the rows of a task; each base is loaded once.

    Args:
        rows: A JSONL file, with the prompt template of `patch` and its completions as labels; or a `Task`, which says
            how rows are prompted and judged; or a benchmark, as `HarnessRows`.
        base: The model that the patch was made on.
        patch: The patch.
        evolved: The updated base.
        ported: The patch ported to it.
        retrained: A patch trained on the evolved model; retention needs it.
        merged: The evolved model with the ported patch merged in, as a separate row.
        allow_other_base: Accept a model other than the one a patch was made on.
        device: Device to run on.
        seed: Random seed of the intervals' bootstrap.
        progress: Progress callback (rows).

    Raises:
        PlanRefusedError: A patch does not match its model; lists every reason.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        DataError: Rows are invalid.
        InputChangedError: A file of theirs changed meanwhile.
    """
    old, new = load_patch(patch), load_patch(ported)
    again = None if retrained is None else load_patch(retrained)
    before, after = (open_checkpoint(model, progress=progress) for model in (base, evolved))
    whole = None if merged is None else open_checkpoint(merged, progress=progress)
    if isinstance(rows, str | Path):
        rows = Task(examples=tuple(read_examples(rows, recorded_format(old, prompt=None, completion=None))))
    patches = [given for given in (old, new, again) if given is not None]
    models = [given for given in (before, after, whole) if given is not None]
    with unchanged(file for files in (*map(files_of, patches), *(model.files for model in models)) for file in files):
        contestants = plan_evaluation(
            base=before,
            patch=old,
            evolved=after,
            ported=new,
            retrained=again,
            merged=whole,
            allow_other_base=allow_other_base,
            progress=progress,
        )
        return compare(contestants, rows, device=device, seed=seed, progress=progress)


def plan_evaluation(
    *,
    base: Checkpoint,
    patch: Patch[TensorInfo],
    evolved: Checkpoint,
    ported: Patch[TensorInfo],
    retrained: Patch[TensorInfo] | None = None,
    merged: Checkpoint | None = None,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> Contestants:
    """The folders to compare, every fit checked; arguments and errors as for `evaluate`."""
    old, new = identify(base), identify(evolved)
    pairs = [("--patch", patch, base, old), ("--ported", ported, evolved, new)]
    pairs += [] if retrained is None else [("--retrained", retrained, evolved, new)]
    refusals = [refusal for pair in pairs for refusal in model_refusals(*pair, allow_other_base=allow_other_base)]
    if refusals:
        raise PlanRefusedError(refusals)
    return Contestants(
        base=model_folder(base, progress=progress),
        patch=folder_of(patch),
        evolved=model_folder(evolved, progress=progress),
        ported=folder_of(ported),
        retrained=None if retrained is None else folder_of(retrained),
        merged=None if merged is None else model_folder(merged, progress=progress),
    )


def model_refusals(
    option: str,
    patch: Patch[TensorInfo],
    model: Checkpoint,
    identity: ModelIdentity,
    *,
    allow_other_base: bool,
) -> Iterator[Refusal]:
    """Why peft must not, or cannot rightly, put a patch on a model; `option` named the patch."""
    yield from unmatchable(patch, model, option=option)
    yield from mismatches(patch, model)
    yield from base_mismatch(patch, identity, model=model, option=option, allow_other_base=allow_other_base)
