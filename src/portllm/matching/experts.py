"""What a patch of the experts of a layer does to a model, however that stores them. Headers only."""

from collections.abc import Iterator

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.experts import Experts
from portllm.errors import Refusal
from portllm.matching.storage import unaddable
from portllm.patch.delta import Change, ExpertDelta, ExpertsDelta
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo


def expert_changes(name: str, delta: ExpertsDelta[TensorInfo], checkpoint: Checkpoint) -> dict[str, Change[TensorInfo]]:
    """What the deltas of all experts do, by the names of the model's tensors."""
    whole = checkpoint.stored(name)
    if whole is not None:
        return {whole.name: delta}
    changes: dict[str, Change[TensorInfo]] = {}
    for number, matrices in enumerate(checkpoint.experts.get(checkpoint.current_name(name), ())):
        start = 0
        for info in matrices:
            changes[info.name] = ExpertDelta(delta, number, start, start + info.shape[0])
            start += info.shape[0]
    return changes


def expert_mismatches(patch: Patch[TensorInfo], checkpoint: Checkpoint) -> Iterator[Refusal]:
    """Why the deltas of experts cannot be added to a model's weights, and which of them are missing."""
    no_experts = "no class that its type is loaded into has such a parameter"
    why = checkpoint.why_unknown if checkpoint.family is None else no_experts
    for name, delta in patch.experts.items():
        if name.rpartition(".")[2] not in checkpoint.expert_parts:
            yield Refusal(
                name,
                "the patch changes all experts of a layer at once, but the layout of experts in "
                f"{checkpoint.name} is unknown: {why}.",
            )
            continue
        whole = checkpoint.stored(name)
        stored = ((whole,),) if whole is not None else checkpoint.experts.get(checkpoint.current_name(name), ())
        if unusable := [*unaddable(name, name, (info for matrices in stored for info in matrices), checkpoint)]:
            yield from unusable
        elif problem := _problem(delta, whole, stored, checkpoint):
            yield Refusal(name, problem)
    there = set(map(checkpoint.current_name, patch.experts))
    for name in sorted(checkpoint.parameters - there):
        module, _, parameter = name.rpartition(".")
        if parameter in patch.config.parameters_of(module):
            yield Refusal(
                name,
                f"adapter_config.json names it and {checkpoint.name} has it, but the patch has no tensors for it. "
                "Part of the adapter is missing, or it was made for another model.",
            )


def _problem(
    delta: ExpertsDelta[TensorInfo], whole: TensorInfo | None, stored: Experts, checkpoint: Checkpoint
) -> str | None:
    """Why one delta does not fit, or None."""
    if not stored:
        return f"the patch changes it, but {checkpoint.name} has no such tensor, neither stacked nor per expert."
    if whole is not None:
        shape = whole.shape
    else:
        widths = {info.shape[1:] for matrices in stored for info in matrices}
        heights = {sum(info.shape[0] for info in matrices) for matrices in stored}
        shape = (len(stored), *sorted(heights), *(size for width in sorted(widths) for size in width))
    if shape == delta.shape:
        return None
    return (
        f"the delta is {_axes(delta.shape)}, but its weight in {checkpoint.name} is {_axes(shape)}. The shapes "
        "must be equal."
    )


def _axes(shape: tuple[int, ...]) -> str:
    if len(shape) != 3:
        return str(shape)
    return "(" + ", ".join(f"{name}={size}" for name, size in zip(("experts", "out", "in"), shape, strict=True)) + ")"
