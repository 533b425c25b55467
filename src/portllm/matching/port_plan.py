"""What a port will do, and every reason not to, from headers and the fingerprint's samples."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual
from portllm.checkpoint.vocabulary import read_vocabulary
from portllm.errors import Refusal
from portllm.files.source import Source
from portllm.matching.added_tokens import (
    added_tokens,
    height_of,
    n_rows_of,
    own_rows,
    sized,
    unexplained,
    unplaced,
    with_own_rows,
)
from portllm.matching.base import base_mismatch
from portllm.matching.base_copies import HeldCopies, hold_copies
from portllm.matching.carried_tokens import CarriedTokens, carry_tokens, orphaned, with_rows_of
from portllm.matching.changes import oriented
from portllm.matching.compatibility import mismatches, tie_mismatch
from portllm.matching.own_values import own_values, without
from portllm.matching.side_files import NO_SIDE_FILES, SideFiles, ported_side_files
from portllm.matching.token_rows import TokenMap, following, resized, token_changes, unmovable
from portllm.matching.update import Update
from portllm.methods.contract import Need, PortMethod
from portllm.methods.table import method_named
from portllm.patch.adapter_folder import files_of
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.nothing import why_nothing
from portllm.patch.patch import Patch
from portllm.patch.record import Choice, ModelIdentity
from portllm.tensors.info import TensorInfo


@dataclass(frozen=True, slots=True)
class PortPlan:
    """A patch about to be carried to an evolved model.

    Attributes:
        patch: The patch as it is.
        method: How it is carried.
        source: The base it belongs to.
        target: The evolved model.
        base: The base, where it is given; its weights are read for what the patch holds whole.
        evolved: The evolved model, opened.
        tokens: Where tokens have other rows in the evolved model and the patch changes such rows; else None.
        evidence: What was measured from the fingerprints' samples, and by `check` where the method was chosen by it.
        refusals: Every reason not to run.
        choice: Why this method, where it was chosen; None where it was named.
        own: Tensors that only the patch has, which go along as they are.
        taken: Copies of the base's weights in the adapter, which are compared whole.
        notes: What a user should know.
        carried_tokens: Where the tokens that only the patch has go; None where it has none.
        beside: The tokenizer and chat template that the ported patch gets.
    """

    patch: Patch[TensorInfo]
    method: PortMethod
    source: ModelIdentity
    target: ModelIdentity
    base: Checkpoint | None
    evolved: Checkpoint
    tokens: TokenMap | None
    evidence: Mapping[str, float]
    refusals: tuple[Refusal, ...]
    choice: Choice | None = None
    own: frozenset[str] = frozenset()
    taken: tuple[TakenForEqual, ...] = ()
    notes: tuple[str, ...] = ()
    carried_tokens: CarriedTokens | None = None
    beside: SideFiles = NO_SIDE_FILES

    @property
    def own_rows(self) -> list[int]:
        """The rows of the patch's vocabulary that are its own."""
        return [] if self.carried_tokens is None else sorted(self.carried_tokens.own)

    @property
    def nothing(self) -> str | None:
        """Why the patch changes nothing; None where it does. Reads factors."""
        return why_nothing(self.patch)

    @property
    def carried(self) -> Patch[TensorInfo]:
        """What of the patch a method carries: all that is of a tensor of the models."""
        return without(self.patch, self.own)

    @property
    def files(self) -> tuple[Source, ...]:
        """What is read; the output lies elsewhere."""
        return (*files_of(self.patch), *self.evolved.files, *(() if self.base is None else self.base.files))


def plan_port(
    patch: Patch[TensorInfo], update: Update, *, method: str = "add", allow_other_base: bool = False
) -> PortPlan:
    """Plan to carry a patch through an update; what does not depend on the patch is read once for several.

    Args:
        patch: What to carry.
        update: Where to; its base is needed where the patch does not say which it belongs to, and else checked.
        method: A row of `METHODS`.
        allow_other_base: Take the base for the patch's though its fingerprint says otherwise.

    Raises:
        UnknownMethodError: There is no such method.
    """
    chosen = method_named(method)
    base, evolved = update.base, update.evolved
    held = HeldCopies(replace(patch, base_copies={})) if base is None else hold_copies(patch, base)
    whole = oriented(held.patch, evolved)
    own = own_values(whole, evolved, *(() if base is None else (base,)))
    whole, carried, refusals = (whole, None, []) if base is None else _carried(whole, own, base, update)
    patch = without(whole, own)
    if carried is not None:
        patch = with_own_rows(patch, sorted(carried.own), sized, evolved if base is None else base)
    needs_weights = bool({Need.WEIGHTS, Need.STREAMS} & chosen.needs_for(patch))
    target = update.target
    by_token = token_changes(patch, evolved if base is None else base)
    tokens = carried.tokens if carried is not None else update.tokens if by_token else None
    moved = patch if tokens is None else following(patch, by_token, tokens, resized)
    refusals += update.mismatches(moved, n_rows=None if carried is None else carried.n_rows)
    refusals += () if tokens is None or tokens.keeps_rows else unmovable(patch, by_token)
    beside = ported_side_files(whole, base, evolved, {} if carried is None else carried.added)
    refusals += [*held.refusals, *beside.refusals]
    given = update.source
    source = patch.record.base if patch.record else given
    if base is not None and given is not None:
        refusals += base_mismatch(
            patch, given, model=base, option="--base", allow_other_base=allow_other_base, evolved=target
        )
        height = None if carried is None else height_of(whole, base)
        refusals += mismatches(patch, base, n_rows=height) if needs_weights else ()
        refusals += tie_mismatch(patch, base, evolved)
        source = given
    elif not patch.is_relative:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} contains values that replace the base's (saved modules, biases, token rows or DoRA "
                "magnitudes). Porting them needs their difference from the base: pass the base with --base.",
                is_of_input=True,
            )
        )
    elif needs_weights:
        refusals.append(
            Refusal(
                "--base",
                f"method '{chosen.id}' reads the weights of the model that {patch.name} belongs to: pass it with "
                "--base.",
                is_of_input=True,
            )
        )
    elif by_token and read_vocabulary(evolved) is not None:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} changes {by_token[0]}, whose rows belong to tokens. They are matched by token "
                "between the tokenizers of base and evolved model: pass the base with --base.",
                is_of_input=True,
            )
        )
    if source is None:
        source = target
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} has no patch.json, so the model it belongs to is unknown. Pass it with --base, or "
                f"record it once: portllm capture --adapter {patch.name} --base BASE -o PATCH.",
                is_of_input=True,
            )
        )
    evidence = _sampled_drift(patch, update) if base is not None and not refusals else {}
    return PortPlan(
        whole, chosen, source, target, base, evolved, tokens, evidence, tuple(sorted(refusals)), own=own,
        taken=held.taken, notes=(*held.notes, *beside.notes), carried_tokens=carried, beside=beside,
    )  # fmt: skip


def _carried(
    patch: Patch[TensorInfo], own: Collection[str], base: Checkpoint, update: Update
) -> tuple[Patch[TensorInfo], CarriedTokens | None, list[Refusal]]:
    """A patch, where the tokens that only it has go, and why they cannot."""
    added = added_tokens(patch, base)
    refusals = [*unexplained(patch, base, added), *unplaced(patch)]
    by_token = token_changes(without(patch, own), base)
    if refusals or not (by_token or patch.resized):
        return patch, None, refusals
    lost = orphaned(patch, base, update.tokens, by_token)
    if not (lost or added or own_rows(patch, base)):
        return patch, None, []
    found = carry_tokens(patch, base, update.evolved, {**added, **lost})
    if isinstance(found, Refusal):
        return patch, None, [found]
    stays = found.tokens.keeps_rows and found.n_rows == n_rows_of(base)
    has_all = not any(row < n_rows_of(base) for row in found.own)
    return (patch if stays or has_all else with_rows_of(base, patch)), found, []


def _sampled_drift(patch: Patch[TensorInfo], update: Update) -> dict[str, float]:
    """Drift of the patched weights, estimated from the windows that the fingerprints read."""
    sums = update.window_sums([module + WEIGHT for module in patch.deltas])
    if not sums.base_sq or not math.isfinite(sums.drift_sq):
        return {}
    return {"sampled_drift": float(f"{sums.relative:.3g}"), "sampled_cosine": float(f"{sums.cosine:.6g}")}
