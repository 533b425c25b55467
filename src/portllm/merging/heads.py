"""A head that only the patch has, merged: the model of its class, with the head's tensors as they are."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import CheckpointError, MissingExtraError, Refusal
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.patch import Patch
from portllm.patch.side_files import labels_in
from portllm.tensors.info import TensorInfo

TASK_NAMES: Mapping[str, str] = {
    "SEQ_CLS": "classifies sequences", "TOKEN_CLS": "classifies tokens", "QUESTION_ANS": "answers questions",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MergedHead:
    """What a head changes of the output of a merge.

    Attributes:
        tensors: Those of the head, by name.
        leave_out: Tensors of the model that the output does not have.
        config_changes: Fields of `config.json`.
        notes: What a user should know.
        refusals: Why there is no such model.
    """

    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    leave_out: frozenset[str] = frozenset()
    config_changes: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def plan_head(patch: Patch[TensorInfo], own: Collection[str], into: Checkpoint) -> MergedHead:
    """Say what becomes of a model that gets a patch's own head.

    Args:
        patch: What is merged.
        own: Its tensors that the model does not have; none for most.
        into: The model.
    """
    if not own:
        return MergedHead()
    tensors = {name: patch.values[name].values for name in sorted(own)}
    where, task = next(iter(tensors)), patch.config.fields.get("task_type")
    if task not in TASK_NAMES:
        return _refused(
            where,
            f"only the patch has it, and the adapter's task_type is {task!r}: which class of model has such a head is "
            f"not said. Set task_type in adapter_config.json to one of {', '.join(TASK_NAMES)}, or serve the patch as "
            "an adapter.",
        )
    n_labels = _n_labels(tensors)
    if n_labels is None:
        return _refused(where, "which of the tensors of the patch's head gives the labels is not clear.")
    try:
        from portllm.running.classifiers import classifier_of  # loads transformers

        found = classifier_of(into.config, task=str(task), n_labels=n_labels)
    except (MissingExtraError, CheckpointError) as error:
        return _refused(where, f"only the patch has it, and its class of model is asked of transformers. {error}")
    if found is None:
        return _refused(
            where,
            f"only the patch has it, and transformers has no class that {TASK_NAMES[str(task)]} for the model type "
            f"{into.config.get('model_type')!r} of {into.name}. Serve the patch as an adapter.",
        )
    leave_out = frozenset(
        name for name, info in into.infos.items() if info is into.head and into.current_name(name) not in found.tensors
    )
    missing = sorted(_missing(found.tensors, {*tensors, *map(into.current_name, into.infos)}))
    if missing:
        return _refused(
            where,
            f"a {found.name} also has {', '.join(missing)}, which neither the patch nor {into.name} has: the adapter "
            "was trained with random numbers there. Save it again with these modules in modules_to_save.",
        )
    labels = _labels(patch, into, n_labels)
    labelled = f"with {n_labels} label{'s' if n_labels > 1 else ''}"
    return MergedHead(
        tensors,
        leave_out,
        {
            "architectures": [found.name],
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        },
        (f"the output is a {found.name}, {labelled}; its head is the patch's: {', '.join(tensors)}.",),
    )


def _refused(where: str, why: str) -> MergedHead:
    return MergedHead(refusals=(Refusal(where, why),))


def _n_labels(tensors: Mapping[str, TensorInfo]) -> int | None:
    """How many outputs the last of a head's linear modules has: the one whose outputs no other one takes."""
    matrices = [info.shape for name, info in tensors.items() if name.endswith(WEIGHT) and len(info.shape) == 2]
    last = [rows for rows, _ in matrices if len(matrices) == 1 or rows not in {columns for _, columns in matrices}]
    return last[0] if len(last) == 1 else None


def _missing(wanted: Collection[str], there: Collection[str]) -> Iterator[str]:
    """Tensors outside the layers that a class has and an output does not, by whatever prefix."""
    for name in wanted:
        if any(part.isdigit() for part in name.split(".")):
            continue
        if not any(name == other or name.endswith(f".{other}") or other.endswith(f".{name}") for other in there):
            yield name


def _labels(patch: Patch[TensorInfo], into: Checkpoint, count: int) -> list[str]:
    """The names of the labels: as the patch tells them, or the model, or as transformers calls labels without names."""
    for told in (patch.labels, labels_in(into.config)):
        if len(told) == count:
            return list(told)
    return [f"LABEL_{number}" for number in range(count)]
