"""What is to be compared, and every reason not to, before a model is loaded.

PEFT loads an adapter onto any model whose names and shapes agree. Here a patch is compared on the model that it
belongs to, or not at all.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import PortLLMError, Refusal, refuse
from portllm.evaluating.names import rival
from portllm.matching.added_tokens import added_tokens, height_of, unexplained
from portllm.matching.base import base_mismatch
from portllm.matching.compatibility import mismatches, unmatchable
from portllm.patch.adapter_folder import folder_of
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.patch.record import ModelIdentity
from portllm.progress import Progress, silent
from portllm.running.folder import model_folder
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class Contestants:
    """The folders to compare; only what is given is run.

    Attributes:
        base: Checkpoint that the patch was made on.
        patch: The patch, as an adapter folder.
        evolved: Checkpoint of the later version.
        ported: The patch carried over to it, as an adapter folder.
        rivals: Other ports of it, as adapter folders, by what they are called.
        retrained: A patch trained on the evolved checkpoint with the same rows, as an adapter folder.
        merged: Checkpoint of the evolved model with the ported patch in its weights.

    Raises:
        PortLLMError: Something of the evolved model is given without it.
    """

    base: Path
    patch: Path | None = None
    evolved: Path | None = None
    ported: Path | None = None
    rivals: Mapping[str, Path] = field(default_factory=dict)
    retrained: Path | None = None
    merged: Path | None = None

    def __post_init__(self) -> None:
        orphans = [name for name in ("ported", "rivals", "retrained", "merged") if getattr(self, name)]
        if orphans and self.evolved is None:
            raise PortLLMError(
                f"comparison: {' and '.join(orphans)} given without the evolved model they belong to. Pass it as well."
            )


def plan_evaluation(
    *,
    base: Checkpoint,
    patch: Patch[TensorInfo],
    evolved: Checkpoint,
    ported: Patch[TensorInfo],
    rivals: Sequence[Patch[TensorInfo]] = (),
    retrained: Patch[TensorInfo] | None = None,
    merged: Checkpoint | None = None,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> Contestants:
    """The folders to compare, every fit checked; arguments and errors as for `evaluate`."""
    old, new = identify(base), identify(evolved)
    if not allow_other_base:
        refuse(confused(patch, (ported, *rivals), old, new))
    refusals = list(model_refusals("--patch", patch, base, old, evolved=new, allow_other_base=allow_other_base))
    pairs = [("--ported", each) for each in (ported, *rivals)]
    pairs += [] if retrained is None else [("--retrained", retrained)]
    for option, carried in pairs:
        refusals += model_refusals(option, carried, evolved, new, allow_other_base=allow_other_base)
    refuse(refusals)
    return Contestants(
        base=model_folder(base, progress=progress),
        patch=folder_of(patch),
        evolved=model_folder(evolved, progress=progress),
        ported=folder_of(ported),
        rivals=_named(rivals, ported),
        retrained=None if retrained is None else folder_of(retrained),
        merged=None if merged is None else model_folder(merged, progress=progress),
    )


def _named(rivals: Sequence[Patch[TensorInfo]], ported: Patch[TensorInfo]) -> dict[str, Path]:
    """The folders of rivals by what they are called: after their methods, numbered where another port has the same."""
    seen = Counter([_method(ported)])
    named: dict[str, Path] = {}
    for patch in rivals:
        method = _method(patch)
        seen[method] += 1
        named[rival(method if seen[method] == 1 else f"{method} {seen[method]}")] = folder_of(patch)
    return named


def _method(ported: Patch[TensorInfo]) -> str:
    """The id of the method that ported a patch."""
    if ported.record is None or not ported.record.ports:
        return "an unrecorded method"
    return ported.record.ports[-1].method.partition(":")[0]


def confused(
    patch: Patch[TensorInfo], ports: Sequence[Patch[TensorInfo]], base: ModelIdentity, evolved: ModelIdentity
) -> list[Refusal]:
    """That models or patches were given for others; of what follows from it nothing need be said.

    Args:
        patch: The patch of the base.
        ports: What it is said to have become on the evolved model.
        base: Identity of the base.
        evolved: Identity of the evolved model.
    """
    belongs = None if patch.record is None else patch.record.base.fingerprint
    if patch.record is None or belongs != evolved.fingerprint or belongs == base.fingerprint:
        return [_of_another(patch, each) for each in ports if not _is_of(patch, each)]
    steps = patch.record.ports[-1:]
    if ports and steps and steps[0].source.fingerprint == base.fingerprint:
        return [
            Refusal(
                "--patch",
                f"{patch.name} was ported from {base.name} to {evolved.name}: it is the ported patch. Pass --patch "
                f"{ports[0].name} --ported {patch.name}.",
            )
        ]
    return [
        Refusal(
            "--base",
            f"{evolved.name}, which was given as the evolved model, is the base that patch '{patch.name}' belongs to: "
            f"the two are swapped. Pass --base {evolved.name} --evolved {base.name}.",
        )
    ]


def _is_of(patch: Patch[TensorInfo], ported: Patch[TensorInfo]) -> bool:
    """Whether a patch may have been ported from another, by what both record of their making; an adapter knows none."""
    captures = [each.record.capture for each in (patch, ported) if each.record is not None]
    known = [capture for capture in captures if capture.method != "adapter"]
    return len(known) < 2 or known[0] == known[1]


def _of_another(patch: Patch[TensorInfo], ported: Patch[TensorInfo]) -> Refusal:
    return Refusal(
        "--ported",
        f"{ported.name} was not ported from {patch.name}: by their records, they were made in different ways. Pass "
        "--patch what it was ported from, or --allow-other-base to compare them all the same. What was trained on the "
        "evolved model goes to portllm evaluate --retrained.",
    )


def model_refusals(
    option: str,
    patch: Patch[TensorInfo],
    model: Checkpoint,
    identity: ModelIdentity,
    *,
    allow_other_base: bool,
    evolved: ModelIdentity | None = None,
) -> Iterator[Refusal]:
    """Why peft must not, or cannot rightly, put a patch on a model; `option` named the patch.

    Of a patch that belongs to the model given as `evolved`, it is said that the two are swapped.
    """
    yield from unmatchable(patch, model, option=option)
    yield from unexplained(patch, model, added_tokens(patch, model))
    yield from mismatches(patch, model, n_rows=height_of(patch, model))
    yield from base_mismatch(
        patch, identity, model=model, option=option, allow_other_base=allow_other_base, evolved=evolved
    )


def trained_on(digest: str, *patches: Patch[TensorInfo] | None, consequence: str) -> Iterator[Refusal]:
    """Why the rows of a file cannot test patches that were trained on that very file."""
    for patch in patches:
        if patch is not None and patch.record is not None and patch.record.capture.settings.get("data") == digest:
            yield Refusal("--data", f"is the file that {patch.name} was trained on. {consequence}")
            return
