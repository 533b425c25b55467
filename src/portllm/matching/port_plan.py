"""What a port will do, and every reason not to, from headers and the fingerprint's samples."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.tensor.info import TensorInfo
from portllm.checkpoint.vocabulary import read_vocabulary
from portllm.errors import Refusal
from portllm.files.source import Source
from portllm.matching.compatibility import altered_copies, base_mismatch, mismatches, oriented, tie_mismatch
from portllm.matching.token_rows import TokenMap, following, resized, token_changes, unmovable
from portllm.matching.update import Update
from portllm.methods.contract import Need, PortMethod
from portllm.methods.table import method_named
from portllm.patch.adapter_folder import files_of
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.patch import Patch
from portllm.patch.record import Choice, ModelIdentity


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

    @property
    def files(self) -> tuple[Source, ...]:
        """What is read; the output lies elsewhere."""
        return (*files_of(self.patch), *self.evolved.files, *(() if self.base is None else self.base.files))


def plan_port(
    patch: Patch[TensorInfo],
    *,
    evolved: Checkpoint,
    base: Checkpoint | None = None,
    method: str = "add",
    allow_other_base: bool = False,
) -> PortPlan:
    """Plan to carry a patch to an evolved model.

    Args:
        patch: What to carry.
        evolved: Where to.
        base: The model it belongs to. Needed where the patch does not say; checked where it does.
        method: A row of `METHODS`.
        allow_other_base: Take `base` for the patch's base though its fingerprint says otherwise.

    Raises:
        UnknownMethodError: There is no such method.
    """
    return plan_port_on(patch, Update(base, evolved), method=method, allow_other_base=allow_other_base)


def plan_port_on(
    patch: Patch[TensorInfo], update: Update, *, method: str = "add", allow_other_base: bool = False
) -> PortPlan:
    """As `plan_port`, where several patches go through one update: what does not depend on the patch is read once."""
    chosen = method_named(method)
    base, evolved = update.base, update.evolved
    patch = oriented(patch, evolved)
    needs_weights = bool({Need.WEIGHTS, Need.STREAMS} & chosen.needs_for(patch))
    target = update.target
    by_token = token_changes(patch, evolved if base is None else base)
    tokens = update.tokens if by_token else None
    refusals = list(update.mismatches(patch if tokens is None else following(patch, by_token, tokens, resized)))
    refusals += () if tokens is None else unmovable(patch, by_token)
    given = update.source
    source = patch.record.base if patch.record else given
    if base is not None and given is not None:
        refusals += base_mismatch(
            patch, given, model=base, option="--base", allow_other_base=allow_other_base, evolved=target
        )
        refusals += altered_copies(patch, base)
        refusals += mismatches(patch, base) if needs_weights else ()
        refusals += tie_mismatch(patch, base, evolved)
        source = given
    elif not patch.is_relative:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} contains values that replace the base's (saved modules, biases, token rows or DoRA "
                "magnitudes). Porting them needs their difference from the base: pass the base with --base.",
            )
        )
    elif needs_weights:
        refusals.append(
            Refusal(
                "--base",
                f"method '{chosen.id}' reads the weights of the model that {patch.name} belongs to: pass it with "
                "--base.",
            )
        )
    elif by_token and read_vocabulary(evolved) is not None:
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} changes {by_token[0]}, whose rows belong to tokens. They are matched by token "
                "between the tokenizers of base and evolved model: pass the base with --base.",
            )
        )
    if source is None:
        source = target
        refusals.append(
            Refusal(
                "--base",
                f"{patch.name} has no patch.json, so the model it belongs to is unknown. Pass it with --base, or "
                f"record it once: portllm capture --adapter {patch.name} --base BASE -o PATCH.",
            )
        )
    evidence = _sampled_drift(patch, update) if base is not None and not refusals else {}
    return PortPlan(patch, chosen, source, target, base, evolved, tokens, evidence, tuple(sorted(refusals)))


def _sampled_drift(patch: Patch[TensorInfo], update: Update) -> dict[str, float]:
    """Drift of the patched weights, estimated from the windows that the fingerprints read."""
    sums = update.window_sums([module + WEIGHT for module in patch.deltas])
    if not sums.base_sq or not math.isfinite(sums.drift_sq):
        return {}
    return {"sampled_drift": float(f"{sums.relative:.3g}"), "sampled_cosine": float(f"{sums.cosine:.6g}")}
