"""What a patch does on the evolved model, from unlabeled prompts: forward passes, and a backward pass if asked.

Each model is loaded once, one after the other, and run once without a patch however many patches there are; each patch
adds a pass on each model. What is kept between the two is small: what deltas read at a few tokens of each prompt, the
last token's states, and one row of logits for each prompt and patch.
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from portllm.arrays import Float, Float32
from portllm.checking.prompts.measures import Outputs, TextMeasures
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.vocabulary import has_same_tokenizer
from portllm.errors import DataError, Refusal, refuse
from portllm.files.input_file import unchanged
from portllm.matching.changes import oriented
from portllm.matching.compatibility import unmatchable
from portllm.matching.port_plan import PortPlan, plan_port
from portllm.matching.update import Update
from portllm.measures.fidelity import Fidelity, measure_fidelity
from portllm.measures.outputs import measure_distance, measure_shift
from portllm.measures.similarity import linear_cka
from portllm.measures.terms import Terms
from portllm.patch.adapter_folder import files_of
from portllm.patch.delta import LowRankDelta
from portllm.patch.low_rank import load_delta
from portllm.patch.patch import Patch
from portllm.porting.port import run_port
from portllm.probing.expansion import terms_of
from portllm.probing.passes import Carried, Host, Passes
from portllm.probing.settings import TextSettings
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder, encode_prompts
from portllm.running.examples import Border
from portllm.running.folder import model_folder
from portllm.running.model import Device, choose_device, load_tokenizer
from portllm.running.moments import Moments
from portllm.running.observation import Observation, spread_positions
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load

Logits = Float32[Tensor, "prompts _"]
"""Base and evolved model may have different numbers of tokens."""

LEAST_PROMPTS = 2
"""One prompt says nothing of how far answers differ from prompt to prompt."""


def measure_text(
    base: Checkpoint,
    evolved: Checkpoint,
    patches: Sequence[Patch[TensorInfo]],
    prompts: Sequence[str],
    *,
    border: Border | None = None,
    settings: TextSettings | None = None,
    allow_other_base: bool = False,
    device: Device = "auto",
    progress: Progress = silent,
) -> tuple[TextMeasures, ...]:
    """Measure what patches do on the evolved model, carried over by plain addition, beside what they did on the base.

    Args:
        base: The model that the patches were made on.
        evolved: A later version of it, with the same tokenizer.
        patches: What may be ported.
        prompts: Of the domain that the patches are for, as they would be given to the model; nobody has to answer them.
        border: How answers follow the prompts.
        settings: How much is looked at.
        allow_other_base: Accept a `base` other than the one a patch names.
        device: Where models run.
        progress: Progress callback (prompts).

    Returns:
        What was measured of each patch, in their order.

    Raises:
        PlanRefusedError: A patch does not fit, with every reason.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        DataError: There are fewer than two prompts, one has no tokens, or the models have different tokenizers.
        NonFiniteError: A model answers with an infinity or NaN.
        InputChangedError: A file changed while it was read.
    """
    settings = settings or TextSettings()
    if len(prompts) < LEAST_PROMPTS:
        raise DataError(
            f"prompts: {len(prompts)} were given; expected at least {LEAST_PROMPTS}, better a few hundred, since "
            "the measures are means over them. Provide more prompts like those the model will serve."
        )
    if not has_same_tokenizer(base, evolved):
        raise DataError(
            f"{base.name} and {evolved.name} have different tokenizers, so their outputs cannot be compared token "
            "by token. Compare answers instead: portllm evaluate or certify."
        )
    update = Update(base, evolved)
    plans = [plan_port(patch, update, allow_other_base=allow_other_base) for patch in patches]
    refuse(
        refusal
        for plan in plans
        for refusal in (*plan.refusals, *unmatchable(plan.patch, base, option="PATCH"), *_own_parts(plan))
    )
    read = [*base.files, *evolved.files, *(file for patch in patches for file in files_of(patch))]
    with unchanged(read), tempfile.TemporaryDirectory(prefix="portllm-check-") as scratch:
        carried = [
            Carried(plan.patch, run_port(plan, Path(scratch) / str(number)), _linear_deltas(oriented(plan.patch, base)))
            for number, plan in enumerate(plans)
        ]
        return _measure(base, evolved, carried, prompts, border, settings, device=device, progress=progress)


def _own_parts(plan: PortPlan) -> Iterator[Refusal]:
    """Why a patch has no place on models that are compared token by token: it has what neither of them has."""
    if plan.carried_tokens is not None or plan.own:
        what = "a head" if plan.carried_tokens is None else "tokens"
        way = "" if plan.own else " Compare answers instead: portllm evaluate or certify."
        yield Refusal(
            "--text",
            f"{plan.patch.name} has {what} of its own, which neither model has, so what they say of each token cannot "
            f"be compared. Check it without --text.{way}",
        )


def _linear_deltas(patch: Patch[TensorInfo]) -> dict[str, LowRankDelta[TensorInfo]]:
    """Those whose inputs are vectors; an embedding's are tokens, the same in both models."""
    return {module: delta for module, delta in patch.deltas.items() if not delta.is_embedding}


def _measure(
    base: Checkpoint,
    evolved: Checkpoint,
    carried: Sequence[Carried],
    prompts: Sequence[str],
    border: Border | None,
    settings: TextSettings,
    *,
    device: Device,
    progress: Progress,
) -> tuple[TextMeasures, ...]:
    where = choose_device(device)
    before, after = (
        Host(model.name, model_folder(model, progress=progress), device=where, settings=settings)
        for model in (base, evolved)
    )
    encoder = Encoder(load_tokenizer(before.folder), border)
    rows, n_cut = encode_prompts(encoder, prompts, room=settings.max_tokens)
    passes = Passes(rows, settings, where, n_passes=2 + 2 * len(carried), progress=progress)
    factors = _stacked(carried)
    taught = passes.begun(before, [each.patch for each in carried], encoder)
    old = passes.bare(before, factors)
    at_base = [
        passes.moments(before, each, logits, curvature=True) for each, logits in zip(carried, taught, strict=True)
    ]
    before.release()
    new = passes.bare(after, factors)
    said = []
    for each, specialist in zip(carried, taught, strict=True):
        ported = passes.patched(after, each.ported)
        said.append(_outputs(specialist=specialist, base=old.logits, evolved=new.logits, ported=ported))
    at_evolved = [
        passes.moments(after, each, logits, curvature=False) for each, logits in zip(carried, taught, strict=True)
    ]
    similarity = [linear_cka(*states) for states in zip(_arrays(old.states), _arrays(new.states), strict=True)]
    return tuple(
        TextMeasures(
            patch=each.patch.name,
            n_prompts=len(passes.rows),
            n_cut=n_cut,
            n_tokens=sum(len(spread_positions(len(row), settings.positions)) for row in passes.rows),
            shared=encoder.decode(passes.shared),
            outputs=outputs,
            modules=_fidelities(number, carried, old, new),
            similarity=tuple(value for value in similarity if value is not None),
            terms=_terms(each, *moments, base=base, evolved=evolved),
        )
        for number, (each, outputs, moments) in enumerate(
            zip(carried, said, zip(at_base, at_evolved, strict=True), strict=True)
        )
    )


def _stacked(carried: Sequence[Carried]) -> dict[str, list[Tensor]]:
    """By module, the factors A of all patches that change it, in the order of the patches."""
    found: dict[str, list[Tensor]] = {}
    for each in carried:
        for module, delta in each.deltas.items():
            found.setdefault(module, []).append(load(delta.a))
    return found


def _fidelities(number: int, carried: Sequence[Carried], old: Observation, new: Observation) -> dict[str, Fidelity]:
    """By module, the fidelity of one of the patches."""
    found = {}
    for module, delta in carried[number].deltas.items():
        if module not in old.reads or module not in new.reads:
            continue
        place = sum(module in other.deltas for other in carried[:number])
        b = load(delta.b).double().numpy()
        fidelity = measure_fidelity(
            old.reads[module][place].numpy(), new.reads[module][place].numpy(), delta.scale**2 * (b.T @ b)
        )
        if fidelity is not None:
            found[module] = fidelity
    return found


def _outputs(*, specialist: Logits, base: Logits, evolved: Logits, ported: Logits) -> Outputs:
    """What the four say of the tokens that both models have a row for."""
    width = min(base.shape[1], evolved.shape[1])
    tuned, old, new, carried = (side[:, :width].numpy() for side in (specialist, base, evolved, ported))
    return Outputs(
        specialist_to_base=measure_distance(tuned, old),
        specialist_to_evolved=measure_distance(tuned, new),
        specialist_to_ported=measure_distance(tuned, carried),
        ported_to_evolved=measure_distance(carried, new),
        base_to_evolved=measure_distance(old, new),
        shift=measure_shift(old, tuned, new, carried),
    )


def _terms(
    carried: Carried, at_base: Moments | None, at_evolved: Moments | None, *, base: Checkpoint, evolved: Checkpoint
) -> dict[str, Terms] | None:
    if at_base is None or at_evolved is None:
        return None
    deltas = {module: load_delta(delta) for module, delta in carried.deltas.items()}
    return terms_of(deltas, at_base, at_evolved, base=base, evolved=evolved)


def _arrays(states: Sequence[Float32[Tensor, "prompts width"]]) -> list[Float[np.ndarray, "prompts width"]]:
    return [state.numpy() for state in states]
