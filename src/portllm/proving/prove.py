"""Prove that a runtime serves a patch: ask it and transformers the same, with and without the patch.

Log-probabilities are compared, since answers of two runtimes may be alike by chance. The bare base shows how far the
two are apart anyway; no more than that may a served patch be off. See `docs/prove.md`.
"""

import contextlib
import functools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from portllm import __version__
from portllm.checkpoint.builtin import locate
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import BUILTIN_PREFIX, ModelLike, open_checkpoint
from portllm.errors import NotFoundError, Refusal, RuntimeFailedError, refuse
from portllm.evaluating.plan import model_refusals
from portllm.exporting.export import export, given_of
from portllm.exporting.plan import plan_export
from portllm.matching.added_tokens import height_of, n_rows_of
from portllm.patch.adapter_folder import PatchLike, folder_of, load_patch
from portllm.patch.identify import identify
from portllm.patch.patch import Patch
from portllm.progress import Progress, silent
from portllm.proving.faults import Fault, faults, scaled
from portllm.proving.prompts import PROMPTS
from portllm.proving.proof import Changed, FaultFit, Proof
from portllm.proving.runtimes.contract import Answer, Model, Running, Runtime, Served
from portllm.proving.runtimes.server import Server
from portllm.proving.runtimes.table import python_of, runtime_named
from portllm.proving.statistics import Fit, Measured, Verdict, best_scale, fit, measure, places, rms
from portllm.running.data import Data, chat_template_for
from portllm.running.device import Device
from portllm.running.folder import check_runnable, model_folder
from portllm.serving import runtime as serving
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.proving.reference import Reference

LONGEST_PROMPT = 4096
"""Tokens of a prompt, longer ones being cut from the left; no runtime is asked for more."""

MORE_TOKENS = 16
"""Room that a runtime is given beside the longest prompt."""

MOST_ROWS = 32
"""Rows of a file that are asked."""

FAULT_PROMPTS = 12
"""Prompts by which faults are told apart; each fault costs one pass over them."""

N_NULLS = 3
"""Random patches that give the yardstick."""

SCALES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Factors of the scale from which the one that was served is looked for."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server that runs already, with the completions API of OpenAI.

    Attributes:
        url: Of the API, such as `http://localhost:8000/v1`.
        base: What it calls the base.
        patch: What it calls the patch.
    """

    url: str
    base: str
    patch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is known before anything is loaded.

    Attributes:
        base: The base.
        patch: The patch.
        folder: Folder of the base here.
        runtime: Where the patch is served: a runtime that is started, or a server that runs.
        python: The Python that the runtime runs under; None for a server.
        served_base: The base as the runtime takes it.
        export: The patch as the runtime takes it; None where it is still to be exported.
        prompts: What is asked.
        limit: How many rows of a file are asked, the first ones.
        allow_other_base: The base may be another one than the patch's.
    """

    base: Checkpoint
    patch: Patch[TensorInfo]
    folder: Path
    runtime: Runtime | Endpoint
    python: Path | None
    served_base: Path
    export: Path | None
    prompts: tuple[str, ...] | Data
    limit: int
    allow_other_base: bool


def prove(
    patch: PatchLike,
    *,
    base: ModelLike,
    runtime: str | Endpoint = "mistralrs",
    export: str | Path | None = None,
    served_base: str | Path | None = None,
    prompts: Sequence[str] | Data = PROMPTS,
    limit: int = MOST_ROWS,
    python: str | Path | None = None,
    allow_other_base: bool = False,
    device: Device = "auto",
    progress: Progress = silent,
) -> Proof:
    """Load base and patch in a runtime and compare its next-token log-probabilities with those computed here.

    Args:
        patch: The patch.
        base: The model it belongs to.
        runtime: Name of the runtime to start, or a server that runs already.
        export: What the runtime loads as the patch; by default it is exported for it first.
        served_base: What the runtime loads as the base; by default the base's folder.
        prompts: What is asked: texts, or the rows of a file as `read_data` reads them.
        limit: How many rows of a file are asked, the first ones.
        python: The Python of the environment that has the runtime.
        allow_other_base: Accept a model other than the one the patch belongs to.
        device: Where the patch runs here.
        progress: Progress callback (prompts).

    Raises:
        PlanRefusedError: The patch does not match the model, or the runtime has no place for a part of it.
        NotFoundError: The runtime is not installed.
        RuntimeFailedError: The runtime cannot load base or patch, ends, or gives no log-probabilities.
    """
    where = runtime if isinstance(runtime, Endpoint) else runtime_named(runtime)
    opened, checkpoint = load_patch(patch), open_checkpoint(base, progress=progress)
    check_runnable(checkpoint)
    refuse([*model_refusals("PATCH", opened, checkpoint, identify(checkpoint), allow_other_base=allow_other_base)])
    refuse(_of_added_tokens(opened, checkpoint))
    if isinstance(where, Runtime) and export is None:
        planned = plan_export(
            opened, serving.runtime_named(where.profile), base=checkpoint, allow_other_base=allow_other_base
        )
        refuse(planned.refusals)
    folder = model_folder(checkpoint, progress=progress)
    plan = _Plan(
        base=checkpoint,
        patch=opened,
        folder=folder,
        runtime=where,
        python=None if isinstance(where, Endpoint) else python_of(where, None if python is None else Path(python)),
        served_base=_served_base(checkpoint, folder, where, None if served_base is None else Path(served_base)),
        export=None if export is None else _given(Path(export)),
        prompts=prompts if isinstance(prompts, Data) else tuple(prompts),
        limit=limit,
        allow_other_base=allow_other_base,
    )
    return _run(plan, device=device, progress=progress)


def _of_added_tokens(patch: Patch[TensorInfo], base: Checkpoint) -> Iterator[Refusal]:
    """Why a patch has no base to be compared with: one of its vocabulary is a model that nobody has."""
    height, own = height_of(patch, base), n_rows_of(base)
    if height > own:
        yield Refusal(
            patch.name,
            f"added tokens give it {height} rows of the embedding, of which {base.name} has {own}: the bare base "
            "cannot serve them, so there is nothing to compare with. Merge the patch (portllm merge "
            f"{patch.name} --into {base.name} -o MODEL), and compare the models with portllm evaluate.",
        )


def _run(plan: _Plan, *, device: Device, progress: Progress) -> Proof:
    # They load torch, which no refusal needs.
    from portllm.proving.reference import Reference, ids_by_text
    from portllm.running.encoding import Encoder, encode_prompts
    from portllm.running.model import load_tokenizer
    from portllm.running.wording import word

    prompts = plan.prompts
    if isinstance(prompts, Data):
        template = chat_template_for(prompts, plan.patch, folder=plan.folder)
        prompts = word(prompts, plan.folder, template).prompts[: plan.limit]
    encoder = Encoder(load_tokenizer(plan.folder))
    rows, _ = encode_prompts(encoder, prompts, room=LONGEST_PROMPT)
    counts = list(map(len, rows))
    steps = _Steps(progress, 2 * len(prompts))
    with _started(plan, max(counts) + MORE_TOKENS, functools.cache(lambda: ids_by_text(encoder))) as (running, served):
        version = running.version
        served_base = _ask(running, "base", prompts, steps)
        served_patch = _ask(running, "patch", prompts, steps)
    reference = Reference(plan.folder, folder_of(plan.patch), rows, device=device)
    here = _Here(reference, reference.base(), reference.patched())
    measured = measure(
        served_base,
        served_patch,
        base=here.base,
        patched=here.patched,
        nulls=[reference.null(seed) for seed in range(N_NULLS)],
    )
    verdict: Verdict = measured.verdict
    fault: FaultFit | None = None
    hidden: tuple[str, ...] = ()
    if verdict in ("wrong", "no effect") or (verdict == "proven" and measured.is_noisy):
        fault, hidden = _explain(here, served_patch[:FAULT_PROMPTS], measured, progress)
        if fault is not None and verdict == "proven":
            verdict = "no effect" if fault.name == "not loaded" else "wrong"
    likeliest = [_likeliest(answers) for answers in (served_base, served_patch)]
    expected_base, expected = here.base.argmax(axis=1).tolist(), here.patched.argmax(axis=1).tolist()
    return Proof(
        program=__version__,
        runtime=plan.runtime.url if isinstance(plan.runtime, Endpoint) else plan.runtime.title,
        version=version,
        base=plan.base.name,
        patch=plan.patch.name,
        served=served,
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
            Changed(prompt, *(encoder.tokenizer.decode([token]) for token in tokens))
            for prompt, *tokens in zip(prompts, *likeliest, expected, strict=True)
        ),
    )


@contextlib.contextmanager
def _started(
    plan: _Plan, max_tokens: int, ids_by_text: Callable[[], Mapping[str, int]]
) -> Iterator[tuple[Running, str]]:
    """What is asked, and what it serves: a server as it is, or a runtime with the patch exported for it."""
    if isinstance(plan.runtime, Endpoint):
        names: Mapping[Model, str] = {"base": plan.runtime.base, "patch": plan.runtime.patch}
        server = Server(plan.runtime.url, names=names, ids_by_text=ids_by_text)
        with contextlib.closing(server):
            yield server, f"model '{plan.runtime.patch}'"
        return
    if plan.python is None:
        raise AssertionError("a runtime that is started has a Python")
    with tempfile.TemporaryDirectory(prefix="portllm-") as folder:
        given = plan.export
        if given is None:
            given = export(
                plan.patch,
                runtime=plan.runtime.profile,
                out=Path(folder) / "export",
                base=plan.base,
                allow_other_base=plan.allow_other_base,
            ).given
        served = Served(
            base=plan.served_base, patch=given, python=plan.python, max_tokens=max_tokens, ids_by_text=ids_by_text
        )
        with plan.runtime.start(served) as running:
            yield running, f"the export for {plan.runtime.profile}" if plan.export is None else str(plan.export)


def _given(export: Path) -> Path:
    if not export.exists():
        raise NotFoundError(f"'{export}': does not exist; expected the patch as 'portllm export' wrote it.")
    return given_of(export)


def _served_base(base: Checkpoint, folder: Path, runtime: Runtime | Endpoint, given: Path | None) -> Path:
    """What the runtime loads as the base."""
    if given is not None:
        if not given.exists():
            raise NotFoundError(f"'{given}': does not exist; expected the base as the runtime loads it.")
        return given
    if isinstance(runtime, Endpoint) or runtime.base == "folder":
        return folder
    if base.name.startswith(BUILTIN_PREFIX):
        return locate(base.name.removeprefix(BUILTIN_PREFIX))
    raise NotFoundError(
        f"{runtime.title} loads a GGUF file: name the one of '{base.name}' with --served-base, best in the precision "
        "of the model itself. llama.cpp's convert_hf_to_gguf.py makes one."
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
            factor, values = best_scale(
                seen, lambda each: seen.of(reference.patched(scaled(parts, each), first=n)), starts=SCALES
            )
            text = f"its scale were {factor:.3g} times what it is"
            fits.append((Fault("scale", text, scaled(parts, factor)), fit(seen, right, values)))
    if not fits:
        return None, hidden
    fault, best = min(fits, key=lambda pair: pair[1].error)
    if best.error > off / 2 and measured.verdict != "proven":
        return None, hidden
    is_named = best.error <= measured.tolerance
    return FaultFit(name=fault.name, text=fault.text, error=best.error, is_named=is_named), hidden
