"""What PEFT stored of the base's own weights, held against a base: a copy, rows of a resized base, or trained values.

Where an adapter is made on a head or on rows of an embedding, and wherever the vocabulary was resized for it, PEFT
writes embedding and head beside the factors, up to three times (`X.weight`, `X.base_layer.weight`,
`X.original_module.weight`), in the dtype that the model had been loaded in. When it loads the adapter it writes them
over the model's. From headers and samples; a run compares whole what is taken for equal here.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual, looks_like_copy
from portllm.errors import Refusal
from portllm.matching.tensor_pairs import rows_of
from portllm.patch.adapter_tensors import BIAS, WEIGHT
from portllm.patch.delta import WholeValue
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo

SHOWN = 4


@dataclass(frozen=True, slots=True)
class HeldCopies:
    """An adapter without its copies of the base's weights.

    Attributes:
        patch: The adapter; what turned out to be trained is among its values, and copies with more rows than the
            base's are its `resized`.
        taken: What was taken for equal by samples.
        notes: What a user should know.
        refusals: Why the adapter is not one of this base.
    """

    patch: Patch[TensorInfo]
    taken: tuple[TakenForEqual, ...] = ()
    notes: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()


def hold_copies(patch: Patch[TensorInfo], base: Checkpoint) -> HeldCopies:
    """Hold an adapter's copies against the base that it is of."""
    found = _Found()
    patch = _without_values_of_other_bases(patch, base)
    for name, copies in patch.base_copies.items():
        for copy in copies:
            _hold(found, name, copy, patch, base)
    _keep_head_whole(found, patch, base)
    patch = _without_twins(found, patch, base)
    trained = {name: WholeValue(value) for name, value in {**found.trained, **found.halves}.items()}
    settled = replace(
        patch,
        base_copies={},
        resized=found.resized,
        values=dict(sorted({**patch.values, **trained}.items())),
        config=patch.config.saving({name.rpartition(".")[0] for name in trained}) if trained else patch.config,
    )
    return HeldCopies(settled, tuple(found.taken), tuple(_notes(found)), tuple(found.refusals))


@dataclass(slots=True)
class _Found:
    """What has been found so far."""

    resized: dict[str, TensorInfo] = field(default_factory=dict)
    trained: dict[str, TensorInfo] = field(default_factory=dict)
    halves: dict[str, TensorInfo] = field(default_factory=dict)
    copied: dict[str, None] = field(default_factory=dict)
    taken: list[TakenForEqual] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


def _hold(found: _Found, name: str, copy: TensorInfo, patch: Patch[TensorInfo], base: Checkpoint) -> None:
    """Say what one copy is."""
    weight, value = base.tensor(name), patch.values.get(name)
    if value is not None and looks_like_copy(copy, value.values):
        found.taken.append(TakenForEqual(copy, value.values, _two_values(name), rounded=True))
        return
    if weight is None:
        if value is None:
            found.refusals.append(Refusal(name, f"the patch has a value for it, but {base.name} has no such tensor."))
        return  # of a head that only the patch has, it is what training began with
    n_rows = weight.shape[0] if weight.shape else 0
    if copy.shape != weight.shape and (copy.shape[1:] != weight.shape[1:] or copy.shape[0] < n_rows):
        found.refusals.append(
            Refusal(name, f"the adapter contains it with shape {copy.shape}, but {base.name} has {weight.shape}.")
        )
        return
    begins = copy if copy.shape == weight.shape else rows_of(copy, 0, n_rows)
    if looks_like_copy(begins, weight):
        found.taken.append(TakenForEqual(begins, weight, _altered(name, base), rounded=True))
        found.copied[name] = None
        if copy.shape != weight.shape and value is None:
            _keep_resized(found, name, copy, patch, base)
    elif base.is_by_token(weight) and name not in _otherwise_changed(patch):
        found.trained[name] = copy
    else:
        found.refusals.append(_altered(name, base))


def _keep_resized(found: _Found, name: str, copy: TensorInfo, patch: Patch[TensorInfo], base: Checkpoint) -> None:
    """Keep a copy with more rows than the base has: one for each matrix, and a tied head's with its embedding's."""
    same = [other for other in patch.base_copies if base.tensor(other) is base.tensor(name)]
    names = [other for other in same if other not in patch.values] or [name]
    # PEFT finds it under factors; rows of a tied matrix are trained under the embedding's name.
    own = min(names, key=lambda other: (other.removesuffix(WEIGHT) not in patch.deltas, base.is_head(other)))
    # Beside the other half of a tied matrix that is held whole, PEFT cannot load rows of this one.
    is_half = len(names) < len(same) and own.removesuffix(WEIGHT) not in patch.deltas and own not in patch.rows
    kept = (found.halves if is_half else found.resized).setdefault(own, copy)
    if kept is copy:
        return
    if looks_like_copy(copy, kept):
        found.taken.append(TakenForEqual(copy, kept, _two_values(name), rounded=True))
    else:
        found.refusals.append(_two_values(name))


def _keep_head_whole(found: _Found, patch: Patch[TensorInfo], base: Checkpoint) -> None:
    """Keep a head with a bias whole where both have more rows than the base's: PEFT has no place for rows of a bias."""
    bias = next((name for name in found.resized if name.endswith(BIAS)), None)
    if bias is None:
        return
    head = next((name for name in (*found.halves, *found.resized) if base.is_head(name)), None)
    if head is None or head.removesuffix(WEIGHT) in patch.deltas or head in patch.rows:
        return
    found.halves |= {name: found.resized.pop(name) for name in (head, bias) if name in found.resized}


def _without_values_of_other_bases(patch: Patch[TensorInfo], base: Checkpoint) -> Patch[TensorInfo]:
    """The adapter with what was taken for the value of a tied head as a copy, where the base's head is its own."""
    if not patch.config.keeps_ties("modules_to_save") or base.tied_embedding is not None:
        return patch
    heads = {name: value.values for name, value in patch.values.items() if base.is_head(name)}
    copies = {name: (values,) for name, values in heads.items() if not patch.config.saves(name)}
    kept = {name: value for name, value in patch.values.items() if name not in copies}
    return replace(patch, values=kept, base_copies={**patch.base_copies, **copies})


def _otherwise_changed(patch: Patch[TensorInfo]) -> set[str]:
    return {*patch.values, *patch.rows, *(module + WEIGHT for module in patch.deltas)}


def _notes(found: _Found) -> Iterator[str]:
    if found.copied:
        yield (
            f"{_listed(found.copied)}: the adapter contains a copy of the base's own weight, which is no part of the "
            "patch."
        )
    if found.trained:
        yield (
            f"{_listed(found.trained)}: the adapter contains another value than the base has, though its "
            "configuration does not name it. It counts as trained."
        )


def _listed(names: Mapping[str, object]) -> str:
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + (f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else "")


def _altered(name: str, base: Checkpoint) -> Refusal:
    return Refusal(
        name.removesuffix(WEIGHT),
        f"the adapter contains a copy of its base's weight that differs from the weight of {base.name}: it "
        "belongs to another base, or trained this module in full, which is not supported.",
    )


def _without_twins(found: _Found, patch: Patch[TensorInfo], base: Checkpoint) -> Patch[TensorInfo]:
    """The adapter without the rows of a tied head that are those of its embedding, which PEFT stores for both."""
    tied = [name for name in patch.rows if base.tensor(name) is base.tied_embedding]
    head = next(filter(base.is_head, tied), None)
    if base.tied_embedding is None or head is None or len(tied) == 1:
        return patch
    mine, theirs = patch.rows[head], next(patch.rows[name] for name in tied if name != head)
    if mine.rows != theirs.rows or not looks_like_copy(mine.values, theirs.values):
        return patch
    found.taken.append(TakenForEqual(mine.values, theirs.values, _two_values(head)))
    return replace(patch, rows={name: rows for name, rows in patch.rows.items() if name != head})


def _two_values(name: str) -> Refusal:
    return Refusal(
        name,
        "the adapter has two different values for it, of which PEFT would load one. Save the adapter again with PEFT.",
    )
