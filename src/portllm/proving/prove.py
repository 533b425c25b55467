"""Prove that a runtime serves a patch: ask it and transformers the same, with and without the patch.

Log-probabilities are compared, since answers of two runtimes may be alike by chance. The bare base shows how far the
two are apart anyway; no more than that may a served patch be off. See `docs/prove.md`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from portllm import __version__
from portllm.checkpoint.open import ModelLike, open_checkpoint
from portllm.errors import PlanRefusedError, RuntimeFailedError
from portllm.evaluating.plan import model_refusals
from portllm.patch.adapter_folder import PatchLike, folder_of, load_patch
from portllm.patch.identify import identify
from portllm.progress import Progress, silent
from portllm.proving.faults import Fault, faults, scaled
from portllm.proving.prompts import PROMPTS
from portllm.proving.proof import Changed, FaultFit, Proof
from portllm.proving.runtimes.contract import Answer, Model, Running, Served
from portllm.proving.runtimes.table import RUNTIMES, python_of
from portllm.proving.statistics import Fit, Measured, Places, best_scale, fit, measure, places, rms
from portllm.running.device import Device
from portllm.running.folder import check_runnable, model_folder

if TYPE_CHECKING:
    from portllm.proving.reference import Reference

FAULT_PROMPTS = 12
"""Prompts by which faults are told apart; each fault costs one pass over them."""

N_NULLS = 3
"""Random patches that give the yardstick."""

SCALES = (0.0625, 0.125, 0.25, 0.5, 2.0, 4.0, 8.0, 16.0)
"""Factors of the scale from which the one that was served is looked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProvePlan:
    """All that is known before anything is loaded.

    Attributes:
        base: Folder of the base here.
        patch: Folder of the patch.
        served: What the runtime loads.
        runtime: Its name.
        names: What the user calls base, patch and what is served.
        prompts: What is asked.
    """

    base: Path
    patch: Path
    served: Served
    runtime: str
    names: tuple[str, str, str]
    prompts: tuple[str, ...]

    def start(self) -> AbstractContextManager[Running]:
        """The runtime, with base and patch loaded."""
        return RUNTIMES[self.runtime].start(self.served)


def prove(
    patch: PatchLike,
    *,
    base: ModelLike,
    runtime: str = "mistralrs",
    export: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    python: str | Path | None = None,
    allow_other_base: bool = False,
    device: Device = "auto",
    progress: Progress = silent,
) -> Proof:
    """Load base and patch in a runtime and compare its next-token log-probabilities with those computed here.

    Args:
        patch: The patch.
        base: The model it belongs to.
        runtime: Name of the runtime.
        export: What the runtime loads as the patch; by default the patch's own folder.
        prompts: What is asked.
        python: The Python of the environment that has the runtime.
        allow_other_base: Accept a model other than the one the patch belongs to.
        device: Where the patch runs here.
        progress: Progress callback (prompts).

    Raises:
        PlanRefusedError: The patch does not match the model.
        NotFoundError: The runtime is not installed.
        RuntimeFailedError: The runtime cannot load base or patch, ends, or gives no log-probabilities.
    """
    plan = plan_prove(
        patch,
        base=base,
        runtime=runtime,
        export=export,
        prompts=prompts,
        python=python,
        allow_other_base=allow_other_base,
        progress=progress,
    )
    return run_prove(plan, device=device, progress=progress)


def plan_prove(
    patch: PatchLike,
    *,
    base: ModelLike,
    runtime: str,
    export: str | Path | None = None,
    prompts: Sequence[str] = PROMPTS,
    python: str | Path | None = None,
    allow_other_base: bool = False,
    progress: Progress = silent,
) -> ProvePlan:
    """What `prove` would do, every reason not to checked; arguments and errors as there."""
    opened, checkpoint = load_patch(patch), open_checkpoint(base, progress=progress)
    check_runnable(checkpoint)
    refusals = list(
        model_refusals("PATCH", opened, checkpoint, identify(checkpoint), allow_other_base=allow_other_base)
    )
    if refusals:
        raise PlanRefusedError(refusals)
    row = RUNTIMES[runtime]
    served = Path(export) if export is not None else folder_of(opened)
    folder = model_folder(checkpoint, progress=progress)
    return ProvePlan(
        base=folder,
        patch=folder_of(opened),
        served=Served(base=folder, patch=served, python=python_of(row, None if python is None else Path(python))),
        runtime=runtime,
        names=(checkpoint.name, opened.name, str(served)),
        prompts=tuple(prompts),
    )


def run_prove(plan: ProvePlan, *, device: Device = "auto", progress: Progress = silent) -> Proof:
    """Carry out a plan; see `prove`."""
    from portllm.proving.reference import Reference  # loads torch, which no refusal needs

    steps = _Steps(progress, 2 * len(plan.prompts))
    with plan.start() as running:
        version = running.version
        served_base = _ask(running, "base", plan.prompts, steps)
        served_patch = _ask(running, "patch", plan.prompts, steps)
    reference = Reference(plan.base, plan.patch, plan.prompts, device=device)
    here = _Here(reference, reference.base(), reference.patched())
    measured = measure(
        served_base,
        served_patch,
        base=here.base,
        patched=here.patched,
        nulls=[reference.null(seed) for seed in range(N_NULLS)],
    )
    verdict, fault, hidden = measured.verdict, None, ()
    if verdict in ("wrong", "no effect") or (verdict == "proven" and measured.is_noisy):
        fault, hidden = _explain(here, served_patch[:FAULT_PROMPTS], measured, progress)
        if fault is not None and verdict == "proven":
            verdict = "no effect" if fault.name == "not loaded" else "wrong"
    likeliest = [_likeliest(answers) for answers in (served_base, served_patch)]
    expected_base, expected = here.base.argmax(axis=1).tolist(), here.patched.argmax(axis=1).tolist()
    counts = reference.n_prompt_tokens
    return Proof(
        program=__version__,
        runtime=plan.runtime,
        version=version,
        base=plan.names[0],
        patch=plan.names[1],
        served=plan.names[2],
        verdict=verdict,
        noise=measured.noise,
        effect=measured.effect,
        served_effect=measured.served_effect,
        error=measured.error,
        tolerance=measured.tolerance,
        gain=measured.gain.value,
        gain_error=measured.gain.error,
        null_errors=measured.null_errors,
        fault=fault,
        hidden=hidden,
        misread=sum(
            answer.n_prompt_tokens not in (None, count) for answer, count in zip(served_base, counts, strict=True)
        ),
        n_log_probs=sum(len(answer.top) for answer in (*served_base, *served_patch)),
        changed=sum(map(int.__ne__, *likeliest)),
        changed_here=sum(map(int.__ne__, expected_base, expected)),
        agreeing=sum(map(int.__eq__, likeliest[1], expected)),
        prompts=tuple(
            Changed(prompt=prompt, base=reference.text(before), patch=reference.text(after), expected=reference.text(right))
            for prompt, before, after, right in zip(plan.prompts, *likeliest, expected, strict=True)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Here:
    """The reference, and what it says of the right patch."""

    reference: "Reference"
    base: NDArray[np.float32]
    patched: NDArray[np.float32]


class _Steps:
    """Tells how many prompts have been answered."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def tick(self, label: str) -> None:
        self._done += 1
        self._progress(f"prove: {label}", self._done, self._total, "rows")


def _ask(running: Running, model: Model, prompts: Sequence[str], steps: _Steps) -> list[Answer]:
    answers = []
    for prompt in prompts:
        answer = running.ask(model, prompt)
        if not answer.top or not np.isfinite(list(answer.top.values())).all():
            raise RuntimeFailedError(
                f"the runtime gives {'no' if not answer.top else 'infinite or undefined'} log-probabilities for "
                f"{prompt!r}, so nothing can be compared. Use a server that gives them for completions."
            )
        answers.append(answer)
        steps.tick(model)
    return answers


def _likeliest(answers: Sequence[Answer]) -> list[int]:
    return [max(answer.top, key=answer.top.__getitem__) for answer in answers]


def _explain(
    here: _Here, served: Sequence[Answer], measured: Measured, progress: Progress
) -> tuple[FaultFit | None, tuple[str, ...]]:
    """The fault that explains best what is off, and those that the noise would hide."""
    reference, seen = here.reference, places(served)
    right, n = seen.of(here.patched), len(served)
    rank, alpha = reference.rank_and_alpha
    parts = reference.parts
    known = list(faults(parts, rank=rank, alpha=alpha, head_rows=reference.head_rows))
    fits: list[tuple[Fault, Fit]] = []
    for number, fault in enumerate(known, start=1):
        values = seen.of(reference.patched(fault.change, first=n))
        fits.append((fault, fit(seen, right, values)))
        progress("prove: faults", number, len(known), "steps")
    off = rms(seen.served - right)
    if measured.verdict == "proven":
        hidden = tuple(fault.name for fault, found in fits if found.is_hidden)
        fits = [pair for pair in fits if pair[1].is_seen]
    else:
        hidden = ()
        if min(found.error for _, found in fits) > measured.tolerance:
            factor, values = best_scale(seen, lambda each: seen.of(reference.patched(scaled(parts, each), first=n)), starts=SCALES)
            text = f"its scale were {factor:.3g} times what it is"
            fits.append((Fault("scale", text, scaled(parts, factor)), fit(seen, right, values)))
    if not fits:
        return None, hidden
    fault, best = min(fits, key=lambda pair: pair[1].error)
    if best.error > off / 2 and measured.verdict != "proven":
        return None, hidden
    is_named = best.error <= measured.tolerance
    return FaultFit(name=fault.name, text=fault.text, error=best.error, is_named=is_named), hidden
