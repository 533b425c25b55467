"""What the steps of a study do: each function is one kind, and returns what it found as JSON values."""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from blake3 import blake3

from portllm.capturing.adapter import capture_adapter
from portllm.checking.update.drift import measure_drift
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import on_disk, open_checkpoint
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.merging.merge import merge
from portllm.methods.table import METHODS
from portllm.patch.adapter_folder import folder_of, load_patch
from portllm.patch.patch import Patch
from portllm.porting.domain import Domain
from portllm.porting.drawn import Drawn
from portllm.porting.port import port, run_port
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoder
from portllm.running.examples import Template, read_texts
from portllm.running.folder import check_runnable, model_folder
from portllm.running.fused_lora import fuse
from portllm.running.model import Device, attach_adapter, choose_device, load_model, load_tokenizer
from portllm.running.text_loss import measure_text_loss
from portllm.study.definition.plan import (
    NEW_TEXT,
    OLD_TEXT,
    Identities,
    Step,
    distillation_of,
    link_of,
    model_name,
    text_of,
    unmeasured_by_themselves,
)
from portllm.study.definition.settings import RowsTask, Study, Text
from portllm.study.definition.variants import BASE
from portllm.study.parts.check import CheckSettings, measure_check
from portllm.study.parts.compared import measure_ports
from portllm.study.parts.control import ControlSettings, make_control
from portllm.study.parts.ported_by import PortedBy
from portllm.study.parts.rivals import ANSWER_TOKENS, DISTILLED, RIVALS
from portllm.study.parts.task import TaskSource
from portllm.study.parts.theory import measure_theory
from portllm.study.schedule.places import Places
from portllm.study.schedule.tasks import below, digest_examples, first, open_task
from portllm.tensors.info import TensorInfo
from portllm.training.distil_lora import TeacherFolders, distil_lora
from portllm.training.evolve import evolve
from portllm.training.evolve_lora import LoraEvolveSettings, train_on_text
from portllm.training.lessons import Labels
from portllm.training.train import Training

Found = Mapping[str, object]


@dataclass(frozen=True)
class StudyInputs:
    """What a study reads: opened before the first step, so that nothing is missing hours later.

    Attributes:
        base: The base.
        tasks: Sources of the tasks, by name.
        texts: What each evolution reads, by `text NAME`, and the texts that losses are measured on, by `text old` and
            `text new.NAME`.
    """

    base: Checkpoint
    tasks: Mapping[str, TaskSource]
    texts: Mapping[str, tuple[str, ...]]

    def identities(self) -> Identities:
        """What the results will come from."""
        data: dict[str, object] = {name: _digest(texts) for name, texts in self.texts.items()}
        data |= {f"train {name}": digest_examples(task.train_examples()) for name, task in self.tasks.items()}
        data |= {f"port {name}": _digest(tuple(task.port_prompts())) for name, task in self.tasks.items()}
        data |= {f"score {name}": task.identity for name, task in self.tasks.items()}
        data |= {f"theory {name}": [data[f"train {name}"], data[f"score {name}"]] for name in self.tasks}
        return Identities(fingerprint(self.base), data)


def open_inputs(study: Study, data: Path | None, *, progress: Progress = silent) -> StudyInputs:
    """Open everything that a study reads.

    Raises:
        CheckpointError: The base is not there, or cannot be run.
        DataError: A file is not there, or its rows do not fit.
        MissingExtraError: A task needs lm-evaluation-harness.
    """
    tasks = {name: open_task(settings, data) for name, settings in study.tasks.items()}
    texts = {
        f"text {name}": _read(Text(file=evolution.text, template=evolution.template), data)
        for name, evolution in study.evolutions.items()
        if evolution.text is not None
    }
    texts |= {
        f"text {NEW_TEXT}{name}": _read(evolution.new_text, data)
        for name, evolution in study.evolutions.items()
        if evolution.new_text is not None
    }
    if study.old_text is not None:
        texts[f"text {OLD_TEXT}"] = _read(study.old_text, data)
    base = open_checkpoint(study.base, progress=progress)
    check_runnable(base)
    return StudyInputs(on_disk(base, progress=progress), tasks, texts)


@dataclass(frozen=True)
class StepRunner:
    """Does the steps of a study.

    Attributes:
        study: The study.
        inputs: What it reads.
        places: Where outputs of steps lie.
        device: Where models run.
        progress: Progress callback within a step.
    """

    study: Study
    inputs: StudyInputs
    places: Places
    device: Device
    progress: Progress

    def do(self, step: Step) -> Found:
        """What a step finds; its output lies where the places say."""
        match step.kind:
            case "train":
                return self._train(step)
            case "evolve":
                return self._evolve(step)
            case "drift":
                return self._drift(step)
            case "read":
                return self._read(step)
            case "port":
                return self._port(step)
            case "compare":
                return self._compare(step)
            case "score":
                return self._score(step)
            case "check":
                return self._check(step)
            case "theory":
                return self._theory(step)

    def _model(self, name: str) -> Checkpoint:
        return self.inputs.base if name == BASE else open_checkpoint(self.places.folder(f"evolve_{name}"))

    def _train(self, step: Step) -> Found:
        examples = self.inputs.tasks[str(step.task)].train_examples()
        training = Training(
            base=self._model(step.model),
            lesson=Labels(examples, {"task": step.task, "data": f"blake3:{digest_examples(examples)}"}),
            out=self.places.folder(step.name),
            settings=replace(self.study.patch, seed=step.seed or 0),
            overwrite=True,
        )
        _, report = training.run(device=self.device, progress=self.progress)
        return asdict(report)

    def _evolve(self, step: Step) -> Found:
        name, evolution, link = link_of(self.study, step.model)
        before, out = self._model(model_name(name, link - 1)), self.places.folder(step.name)
        settings = replace(evolution.settings, seed=evolution.settings.seed + link - 1)
        if isinstance(settings, ControlSettings):
            make_control(before, settings, out, overwrite=True, progress=self.progress)
            return {}
        folder = model_folder(before)
        texts = self.inputs.texts[f"text {name}"][link - 1 :: evolution.links]
        if not isinstance(settings, LoraEvolveSettings):
            report = evolve(folder, texts, settings, out, device=self.device, overwrite=True, progress=self.progress)
            return asdict(report)
        with tempfile.TemporaryDirectory(prefix="portllm-evolve-") as scratch:
            adapter = Path(scratch) / "adapter"
            losses = train_on_text(folder, texts, settings, adapter, device=self.device, progress=self.progress)
            merged = merge(load_patch(adapter), into=before, out=out, overwrite=True, progress=self.progress)
        return {"losses": losses, "kept_gain": merged.total.kept_gain, "relative_size": merged.total.relative_size}

    def _drift(self, step: Step) -> Found:
        drift = measure_drift(self.inputs.base, self._model(step.model), progress=self.progress).total
        return {"relative": drift.relative, "cosine": drift.cosine}

    def _read(self, step: Step) -> Found:
        loss = measure_text_loss(
            model_folder(self._model(step.model)),
            self.inputs.texts[f"text {step.text}"],
            block_tokens=text_of(step, self.study).block_tokens,
            device=self.device,
            progress=self.progress,
        )
        return {"nats": loss.nats, "perplexity": loss.perplexity, "n_tokens": loss.n_tokens}

    def _port(self, step: Step) -> Found:
        patch, evolved = load_patch(self.places.folder(step.inputs[-1])), self._model(step.model)
        by = PortedBy.read(str(step.patch))
        if by.method == DISTILLED:
            return self._distil(step, patch, evolved)
        update = Update(self.inputs.base, evolved)
        plan = plan_port(patch, update, method=by.method if by.method in METHODS else "add", allow_other_base=False)
        plan = replace(plan, method=RIVALS.get(by.method, plan.method))
        domain = self._domain(step, by) if by.reads_prompts else None
        ported = run_port(plan, self.places.folder(step.name), overwrite=True, domain=domain)
        return dict(ported.record.ports[-1].evidence) if ported.record else {}

    def _domain(self, step: Step, by: PortedBy) -> Domain:
        task, settings = self.inputs.tasks[str(step.task)], self.study.tasks[str(step.task)]
        prompts: Sequence[str] | Drawn = task.port_prompts()[: by.n_prompts]
        if by.is_drawn and by.n_prompts and isinstance(settings, RowsTask):
            prompts = Drawn(by.n_prompts, Template(settings.prompt).parts)
        return Domain(
            prompts=prompts,
            max_tokens=task.longest,
            answer_tokens=ANSWER_TOKENS,
            device=self.device,
            progress=self.progress,
        )

    def _compare(self, step: Step) -> Found:
        evolved, methods = self._model(step.model), unmeasured_by_themselves(self.study)
        first, *ports = (load_patch(self.places.folder(name)) for name in step.inputs[-1 - len(methods) :])
        plan = plan_port(first, Update(self.inputs.base, evolved), method="add", allow_other_base=False)
        return measure_ports(plan, self._domain(step, PortedBy("align")), dict(zip(methods, ports, strict=True)))

    def _distil(self, step: Step, patch: Patch[TensorInfo], evolved: Checkpoint) -> Found:
        """The patch as it is added, trained on the old specialist's answers to the prompts."""
        settings = distillation_of(self.study, step.seed or 0)
        teacher = TeacherFolders(model_folder(self.inputs.base), folder_of(patch), ANSWER_TOKENS)
        with tempfile.TemporaryDirectory(prefix="portllm-distil-") as scratch:
            start, adapter = Path(scratch) / "start", Path(scratch) / "adapter"
            port(patch, evolved=evolved, base=self.inputs.base, out=start)
            report = distil_lora(
                model_folder(evolved),
                self.inputs.tasks[str(step.task)].port_prompts(),
                teacher,
                settings,
                adapter,
                device=self.device,
                start=start,
                progress=self.progress,
            )
            out = self.places.folder(step.name)
            capture_adapter(load_patch(adapter), base=evolved, out=out, method="train", settings={}, overwrite=True)
        return {"seconds_trained": report.seconds}

    def _check(self, step: Step) -> Found:
        return measure_check(
            self.inputs.base,
            self._model(step.model),
            load_patch(self.places.folder(step.inputs[-1])),
            self.inputs.tasks[str(step.task)].train_examples(),
            self.study.check or CheckSettings(),
            device=self.device,
            progress=self.progress,
        )

    def _theory(self, step: Step) -> Found:
        patch, retrained = (load_patch(self.places.folder(name)) for name in step.inputs[-2:])
        return measure_theory(
            self.inputs.base,
            self._model(step.model),
            patch,
            retrained,
            source=self.inputs.tasks[str(step.task)],
            settings=self.study.theory,
            device=self.device,
            progress=self.progress,
        )

    def _score(self, step: Step) -> Found:
        task = self.inputs.tasks[str(step.task)]
        device = choose_device(self.device)
        folder = model_folder(self._model(step.model))
        model = load_model(folder, device=device, dtype=self.study.dtype, longest=task.longest)
        if step.patch:
            model = fuse(attach_adapter(model, self.places.folder(step.inputs[-1]), name="patch").eval())
        done = 0

        def tick(rows: int) -> None:
            nonlocal done
            done += rows
            self.progress(f"score: {step.model} {step.patch or ''}".rstrip(), done, task.n_rows, "rows")

        return asdict(task.score(model, Encoder(load_tokenizer(folder)), device=device, tick=tick))


def _read(text: Text, data: Path | None) -> tuple[str, ...]:
    file = below(data, text.file)
    return first(read_texts(file, text.template), text.rows, file)


def _digest(texts: tuple[str, ...]) -> str:
    return blake3(repr(texts).encode()).hexdigest()
