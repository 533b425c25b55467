"""The demo's steps: a clinic trains a patch, its provider updates the base, the patch is ported, aligned, measured.

Every number comes from the run, or from an earlier run's record whose key proves that it is the same work.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from blake3 import blake3

from portllm.checking.update.drift import measure_drift
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.demo.settings import (
    ALIGNED_PROMPTS,
    CHECKED_PROMPTS,
    COMPLETION,
    EVOLUTION_TEMPLATE,
    EVOLVE,
    MAX_TOKENS,
    MERGED_ROWS,
    PROMPT,
    SCORED_ROWS,
    TRAIN,
)
from portllm.errors import OutputError, OutputExistsError
from portllm.evaluating.compare import Comparison, score_all, set_side_by_side
from portllm.evaluating.names import BASE as ALONE
from portllm.evaluating.names import PORTED
from portllm.evaluating.plan import Contestants, plan_evaluation
from portllm.evaluating.scoring import Scores, Task
from portllm.files.kept_results import Kept, keep
from portllm.files.own_files import require_real
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.patch.written import checkpoint_identity, patch_identity
from portllm.porting.domain import Domain
from portllm.porting.port import port
from portllm.probing.check import check
from portllm.probing.settings import TextSettings
from portllm.progress import Progress, Unit, silent
from portllm.running.data import read_data
from portllm.running.examples import ExampleFormat, read_examples, read_prompts, read_texts
from portllm.running.folder import model_folder
from portllm.training.evolve import evolve
from portllm.training.lessons import read_labels
from portllm.training.train import Training

BASE = "builtin:smollm2-135m"
DATA = resources.files("portllm.demo") / "data"
TRAINING_ROWS = "clinic-train.jsonl"
HELD_OUT_ROWS = "clinic-heldout.jsonl"
EVOLUTION_TEXT = "mathematics.jsonl"
STEPS = "steps"
FORMAT = ExampleFormat(prompt=PROMPT, completion=COMPLETION)

FIRST_STEPS = 5
"""Steps of training, after one that warms up, from whose time that of the whole story is told."""

WHOLE = 410
"""The whole story takes about as long as so many steps of training.

Own measurements: 205 on a processor with AVX2 alone, 280 on a busy one that multiplies bfloat16, both without the step
`align`, which took 0.7 times as much processor time as all others.
"""

Estimate = Callable[[float], None]
"""Told how many seconds the whole story will take."""


@dataclass(frozen=True, slots=True)
class DemoStep:
    """One step that is done.

    Attributes:
        name: What was done.
        kept: What came of it, how long it took, and whether it is an earlier run's.
    """

    name: str
    kept: Kept


@dataclass(frozen=True, slots=True)
class Story:
    """The demo, told.

    Attributes:
        folder: Where its files are.
        steps: In order, by name.
        comparison: The models side by side.
    """

    folder: Path
    steps: Mapping[str, Kept]
    comparison: Comparison


def tell(
    folder: Path,
    *,
    on_step: Callable[[DemoStep], None],
    on_estimate: Estimate = lambda _: None,
    progress: Progress = silent,
) -> Story:
    """Do the steps that have not been done, and return what came of all.

    Args:
        folder: Where files go; created where it is missing.
        on_step: Told of each step when it is done.
        on_estimate: Told how long the whole story takes here, after the first steps of training, unless an earlier run
            did them.
        progress: Progress callback within a step.
    """
    if folder.is_dir() and os.listdir(folder) and not (folder / STEPS).is_dir():
        raise OutputExistsError(f"'{folder}': already exists and is not a demo's folder. Choose another with --output.")
    require_real(folder, STEPS)
    try:
        (folder / STEPS).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{folder}': cannot be written to: {error.strerror}.") from error
    teller = _Teller(folder, on_step, progress)
    base = open_checkpoint(BASE, progress=progress)
    teller.train("train", base, teller.patch, progress=estimating(progress, on_estimate))
    teller.evolve(base)
    evolved = open_checkpoint(teller.evolved)
    teller.check(base, evolved)
    teller.port(base, evolved)
    teller.align(base, evolved)
    teller.merge(evolved)
    teller.train("retrain", evolved, teller.retrained, progress=progress)
    task = held_out()
    comparison = teller.compare(base, evolved, task)
    teller.agree(comparison, task)
    return Story(folder, teller.steps, comparison)


def held_out() -> Task:
    """The passages that none of the models has seen, and how answers are judged."""
    with resources.as_file(DATA / HELD_OUT_ROWS) as rows:
        return Task(examples=tuple(read_examples(rows, FORMAT)[:SCORED_ROWS]), max_tokens=MAX_TOKENS)


def estimating(progress: Progress, on_estimate: Estimate) -> Progress:
    """The progress of a training, which also tells once how long the whole story takes, from its first steps."""
    began = 0.0

    def show(label: str, done: int, total: int, unit: Unit) -> None:
        nonlocal began
        progress(label, done, total, unit)
        if done == 1:
            began = time.perf_counter()
        elif done == 1 + FIRST_STEPS:
            on_estimate(WHOLE * (time.perf_counter() - began) / FIRST_STEPS)

    return show


class _Teller:
    """The steps, each with all that its result depends on: that is the key under which it is kept."""

    def __init__(self, folder: Path, on_step: Callable[[DemoStep], None], progress: Progress) -> None:
        self.steps: dict[str, Kept] = {}
        self._records = folder / STEPS
        self.patch, self.evolved = folder / "patch", folder / "evolved"
        self.ported, self.aligned, self.merged = folder / "ported", folder / "aligned", folder / "merged"
        self.retrained = folder / "retrained"
        self._on_step = on_step
        self._progress = progress

    def train(self, name: str, model: Checkpoint, out: Path, *, progress: Progress) -> None:
        def work() -> dict[str, object]:
            with resources.as_file(DATA / TRAINING_ROWS) as rows:
                lesson = read_labels(read_data(rows, prompt=PROMPT, completion=COMPLETION))
                training = Training(base=model, lesson=lesson, out=out, settings=TRAIN, overwrite=True)
                _, report = training.run(device="cpu", progress=progress)
            return {
                "steps": report.steps,
                "rows": report.n_rows,
                "n_trained": report.n_trained,
                "losses": report.losses,
            }

        inputs = {
            "base": fingerprint(model),
            "settings": asdict(TRAIN),
            "format": asdict(FORMAT),
            "rows": _digest(TRAINING_ROWS),
        }
        self._do(name, inputs, lambda: patch_identity(out), work)

    def evolve(self, base: Checkpoint) -> None:
        def work() -> dict[str, object]:
            with resources.as_file(DATA / EVOLUTION_TEXT) as rows:
                texts = read_texts(rows, EVOLUTION_TEMPLATE)
            report = evolve(
                model_folder(base), texts, EVOLVE, self.evolved, device="cpu", overwrite=True, progress=self._progress
            )
            drift = measure_drift(base, open_checkpoint(self.evolved), progress=self._progress).total
            return {
                "n_tokens": report.n_tokens,
                "losses": report.losses,
                "drift": drift.relative,
                "cosine": drift.cosine,
            }

        inputs = {
            "base": fingerprint(base),
            "settings": asdict(EVOLVE),
            "text": _digest(EVOLUTION_TEXT),
            "template": EVOLUTION_TEMPLATE,
        }
        self._do("evolve", inputs, lambda: checkpoint_identity(self.evolved), work)

    def check(self, base: Checkpoint, evolved: Checkpoint) -> None:
        def work() -> dict[str, object]:
            report = check(
                self.patch,
                base=base,
                evolved=evolved,
                text=_passages(CHECKED_PROMPTS),
                settings=TextSettings(max_tokens=MAX_TOKENS),
                device="cpu",
                progress=self._progress,
            )
            (found,) = report.patches
            return {
                "verdict": str(found.verdict.answer),
                "reasons": [reason.text for reason in found.verdict.reasons],
                "agreement": None if found.text is None else found.text.outputs.specialist_to_ported.agreement,
                "forecast": None if found.forecast is None else found.forecast.to_json(),
            }

        inputs = {
            "patch": patch_identity(self.patch),
            "base": fingerprint(base),
            "evolved": fingerprint(evolved),
            "rows": _digest(TRAINING_ROWS),
            "prompts": CHECKED_PROMPTS,
        }
        self._do("check", inputs, lambda: "", work)

    def port(self, base: Checkpoint, evolved: Checkpoint) -> None:
        def work() -> dict[str, object]:
            ported = port(load_patch(self.patch), evolved=evolved, base=base, out=self.ported, overwrite=True)
            return dict(ported.record.ports[-1].evidence) if ported.record else {}

        inputs = {
            "patch": patch_identity(self.patch),
            "base": fingerprint(base),
            "evolved": fingerprint(evolved),
        }
        self._do("port", inputs, lambda: patch_identity(self.ported), work)

    def align(self, base: Checkpoint, evolved: Checkpoint) -> None:
        def work() -> dict[str, object]:
            domain = Domain(
                prompts=_passages(ALIGNED_PROMPTS), max_tokens=MAX_TOKENS, device="cpu", progress=self._progress
            )
            ported = port(
                load_patch(self.patch),
                evolved=evolved,
                base=base,
                out=self.aligned,
                method="align",
                overwrite=True,
                domain=domain,
            )
            if ported.record is None:
                raise AssertionError("a port writes its record")
            step = ported.record.ports[-1]
            return {"method": step.method, **step.evidence}

        inputs = {
            "patch": patch_identity(self.patch),
            "base": fingerprint(base),
            "evolved": fingerprint(evolved),
            "rows": _digest(TRAINING_ROWS),
            "prompts": ALIGNED_PROMPTS,
        }
        self._do("align", inputs, lambda: patch_identity(self.aligned), work)

    def merge(self, evolved: Checkpoint) -> None:
        def work() -> dict[str, object]:
            report = merge(
                load_patch(self.ported), into=evolved, out=self.merged, overwrite=True, progress=self._progress
            )
            worst = report.worst
            return {
                "kept_gain": report.total.kept_gain,
                "rounding_loss": report.total.rounding_loss,
                "relative_size": report.total.relative_size,
                "worst": worst,
                "worst_kept_gain": report.tensors[worst].kept_gain if worst else 1.0,
            }

        inputs = {"patch": patch_identity(self.ported), "into": fingerprint(evolved)}
        self._do("merge", inputs, lambda: checkpoint_identity(self.merged), work)

    def compare(self, base: Checkpoint, evolved: Checkpoint, task: Task) -> Comparison:
        contestants = plan_evaluation(
            base=base,
            patch=load_patch(self.patch),
            evolved=evolved,
            ported=load_patch(self.ported),
            rivals=[load_patch(self.aligned)],
            retrained=load_patch(self.retrained),
        )

        def work() -> dict[str, object]:
            scores = score_all(contestants, task, device="cpu", progress=self._progress)
            return {name: asdict(score) for name, score in scores.items()}

        inputs = {
            "base": fingerprint(base),
            "evolved": fingerprint(evolved),
            "patches": list(map(patch_identity, (self.patch, self.ported, self.aligned, self.retrained))),
            "rows": _digest(HELD_OUT_ROWS),
            "task": asdict(task),
        }
        self._do("evaluate", inputs, lambda: "", work)
        scores = {name: Scores(**values) for name, values in _with_tuples(self.steps["evaluate"].result).items()}
        return set_side_by_side(scores, task)

    def agree(self, comparison: Comparison, task: Task) -> None:
        """Whether the merged model answers what the ported patch answers, on a few rows."""
        few = replace(task, examples=task.examples[:MERGED_ROWS])
        ported = next(row.scores for row in comparison.rows if row.name == PORTED)
        answers, losses = ported.answers[:MERGED_ROWS], ported.losses[:MERGED_ROWS]

        def work() -> dict[str, object]:
            folder = model_folder(open_checkpoint(self.merged))
            merged = score_all(Contestants(base=folder), few, device="cpu", progress=self._progress)[ALONE]
            return {
                "rows": few.n_rows,
                "same": sum(own == other for own, other in zip(merged.answers, answers, strict=True)),
                "loss_change": (sum(merged.losses) - sum(losses)) / few.n_rows,
            }

        inputs = {
            "merged": checkpoint_identity(self.merged),
            "task": asdict(few),
            "ported": [answers, losses],
        }
        self._do("agree", inputs, lambda: "", work)

    def _do(
        self,
        name: str,
        inputs: Mapping[str, object],
        identify: Callable[[], str],
        work: Callable[[], Mapping[str, object]],
    ) -> None:
        self.steps[name] = keep(self._records / f"{name}.json", inputs=inputs, identify=identify, work=work)
        self._on_step(DemoStep(name, self.steps[name]))


def _passages(count: int) -> list[str]:
    """The first passages to train on, as prompts without their answers."""
    with resources.as_file(DATA / TRAINING_ROWS) as rows:
        return read_prompts(rows, PROMPT, completion=None)[0][:count]


def _digest(name: str) -> str:
    return blake3((DATA / name).read_bytes()).hexdigest()


def _with_tuples(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores as they come from JSON, where a tuple has become a list."""
    return {
        name: {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        for name, values in result.items()
    }
