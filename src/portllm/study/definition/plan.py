"""Which steps a study has, and what the result of each depends on: values in, values out, nothing is touched."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypeAlias

from portllm.study.definition.settings import Evolution, Study, Text
from portllm.study.definition.variants import BASE, PATCHED, RETRAINED
from portllm.study.parts.ported_by import PortedBy
from portllm.study.parts.rivals import DISTILLED, UNMEASURED
from portllm.training.settings import TrainSettings

Kind: TypeAlias = Literal["train", "evolve", "drift", "read", "port", "compare", "score", "check", "theory"]
Makes: TypeAlias = Literal["patches", "checkpoints"]


@dataclass(frozen=True, slots=True)
class Identities:
    """What a study's results come from.

    Attributes:
        base: Fingerprint of the base.
        data: Identity of each piece of data, by the name that `data_of` gives it.
    """

    base: str
    data: Mapping[str, Any]


OLD_TEXT, NEW_TEXT = "old", "new."


@dataclass(frozen=True, slots=True)
class Step:
    """A piece of work, done whole or not at all.

    Attributes:
        kind: `train` makes a patch for a model. `evolve` makes a model of the one before it. `drift` measures how far
            a model is from the base. `read` measures a model's loss on a text. `port` carries the base's patch to a
            model. `compare` measures ports of rivals on the prompts that port methods read. `score` answers the rows of
            a task. `check` measures what is known of the patch before it is ported. `theory` measures what separates
            ported and retrained patch.
        model: The model: `base`, or `EVOLUTION.LINK`; for `evolve` the one that is made.
        task: Of `train`, `port`, `compare`, `score`, `check` and `theory`.
        seed: Of a patch.
        patch: Of `score`: none; `patched`, the base's own; `retrained`, the evolved model's own; or the method by
            which it was ported. Of `port`: the method.
        text: Of `read`: `old`, or `new.EVOLUTION`.
        inputs: Names of the steps whose outputs it reads.
    """

    kind: Kind
    model: str
    task: str | None = None
    seed: int | None = None
    patch: str | None = None
    text: str | None = None
    inputs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Its own in the study, and that of its record; no part of it has an underscore."""
        seed = None if self.seed is None else f"s{self.seed}"
        return "_".join(part for part in (self.kind, self.model, self.task, seed, self.patch, self.text) if part)

    @property
    def makes(self) -> Makes | None:
        """What it writes besides its record."""
        return {"train": "patches", "port": "patches", "evolve": "checkpoints"}.get(self.kind)  # type: ignore[return-value]


def model_name(evolution: str, link: int) -> str:
    """The name of the model after so many updates.

    Example:
        >>> model_name("wiki", 2), model_name("wiki", 0)
        ('wiki.2', 'base')
    """
    return f"{evolution}.{link}" if link else BASE


def link_of(study: Study, model: str) -> tuple[str, Evolution, int]:
    """The evolution that made a model, by name and value, and which of its links."""
    name, _, link = model.partition(".")
    return name, study.evolutions[name], int(link)


def steps_of(study: Study) -> tuple[Step, ...]:
    """All steps, each after those it needs.

    What one model needs stands together, so that it can be dropped early, and of that what one task needs, from the
    base's patch on: a study that is stopped has whole rows of its table.
    """
    return tuple(_steps(study))


def _steps(study: Study) -> Iterator[Step]:
    yield from _read(study, BASE, (), tuple(study.evolutions))
    first = model_name(next(iter(study.evolutions)), 1)
    for name, evolution in study.evolutions.items():
        before: tuple[str, ...] = ()
        for link in range(1, evolution.links + 1):
            model = model_name(name, link)
            evolve = Step("evolve", model, inputs=before)
            before = (evolve.name,)
            yield evolve
            yield Step("drift", model, inputs=before)
            yield from _read(study, model, before, (name,))
            for task in study.tasks:
                if model == first:
                    yield from _on_base(study, task)
                yield Step("score", model, task=task, inputs=before)
                for seed in study.seeds:
                    yield from _on_evolved(study, model, task, seed, before)
                for seed in study.retrain_seeds:
                    yield from _retrained(model, task, seed, before)


def _on_base(study: Study, task: str) -> Iterator[Step]:
    yield Step("score", BASE, task=task)
    for seed in study.seeds:
        train = Step("train", BASE, task=task, seed=seed)
        yield train
        yield Step("score", BASE, task=task, seed=seed, patch=PATCHED, inputs=(train.name,))


def _on_evolved(study: Study, model: str, task: str, seed: int, before: tuple[str, ...]) -> Iterator[Step]:
    first = Step("train", BASE, task=task, seed=seed).name  # of a chain too it is the first patch that is ported
    for method in study.methods:
        port = Step("port", model, task=task, seed=seed, patch=method, inputs=(*before, first))
        yield port
        yield Step("score", model, task=task, seed=seed, patch=method, inputs=(*before, port.name))
    unmeasured = unmeasured_by_themselves(study)
    if unmeasured and study.tasks[task].port_rows > 0:
        ports = (Step("port", model, task=task, seed=seed, patch=method).name for method in unmeasured)
        yield Step("compare", model, task=task, seed=seed, inputs=(*before, first, *ports))
    retrain, score = _retrained(model, task, seed, before)
    yield from (retrain, score)
    if study.check is not None:
        yield Step("check", model, task=task, seed=seed, inputs=(*before, first))
    if study.theory is not None:
        yield Step("theory", model, task=task, seed=seed, inputs=(*before, first, retrain.name))


def unmeasured_by_themselves(study: Study) -> tuple[str, ...]:
    """The study's rivals that do not say how they compare with the old specialist on prompts."""
    read = ((method, PortedBy.read(method).method) for method in study.methods)
    return tuple(method for method, name in read if name in UNMEASURED)


def _retrained(model: str, task: str, seed: int, before: tuple[str, ...]) -> tuple[Step, Step]:
    """Training a patch on an evolved model, and scoring it."""
    train = Step("train", model, task=task, seed=seed, inputs=before)
    return train, Step("score", model, task=task, seed=seed, patch=RETRAINED, inputs=(*before, train.name))


def _read(study: Study, model: str, inputs: tuple[str, ...], evolutions: tuple[str, ...]) -> Iterator[Step]:
    if study.old_text is not None:
        yield Step("read", model, text=OLD_TEXT, inputs=inputs)
    for name in evolutions:
        if study.evolutions[name].new_text is not None:
            yield Step("read", model, text=f"{NEW_TEXT}{name}", inputs=inputs)


def settings_of(step: Step, study: Study) -> Mapping[str, object]:
    """What a step's result depends on besides models, patches and data, as JSON values."""
    match step.kind:
        case "train":
            return asdict(replace(study.patch, seed=step.seed or 0))
        case "evolve":
            _, evolution, link = link_of(study, step.model)
            # A later link reads in another order, too: the seed moves with the link.
            settings = replace(evolution.settings, seed=evolution.settings.seed + link - 1)
            return {"kind": evolution.kind, "link": link, "links": evolution.links, **asdict(settings)}
        case "port" if step.patch == DISTILLED:
            return {"method": step.patch, **asdict(distillation_of(study, step.seed or 0))}
        case "port":
            return {"method": step.patch}
        case "check" if study.check is not None:
            return asdict(study.check)
        case "theory" if study.theory is not None:
            return asdict(study.theory)
        case "read":
            return {"block_tokens": text_of(step, study).block_tokens}
        case "score" if study.dtype != "auto":  # which is what was before a study said it
            return {"dtype": study.dtype}
        case _:
            return {}


def distillation_of(study: Study, seed: int) -> TrainSettings:
    """How a patch is distilled: as those of the study are trained, in about the time that an aligned port takes.

    An aligned port of three candidates is eight times the work of reading the prompts once; an epoch is four times it,
    with the teacher's answers and a backward pass.
    """
    return replace(study.patch, epochs=2.0, steps=None, seed=seed)


def data_of(step: Step) -> str | None:
    """The name of the data that a step reads, in `Identities`."""
    match step.kind:
        case "train" | "score" | "theory":
            return f"{step.kind} {step.task}"
        case "check":
            return f"train {step.task}"  # whose prompts it reads
        case "compare":
            return f"port {step.task}"
        case "port" if PortedBy.read(str(step.patch)).reads_prompts:
            return f"port {step.task}"
        case "evolve":
            return f"text {step.model.partition('.')[0]}"
        case "read":
            return f"text {step.text}"
        case _:
            return None


def text_of(step: Step, study: Study) -> Text:
    """The text that a model reads in a step."""
    name = str(step.text)
    text = study.old_text if name == OLD_TEXT else study.evolutions[name.removeprefix(NEW_TEXT)].new_text
    if text is None:
        raise AssertionError("a step reads only what the study has")
    return text


def needed(steps: tuple[Step, ...], done: Mapping[str, bool], there: Mapping[str, bool]) -> tuple[Step, ...]:
    """The steps to do: those that are not done, and those whose output is gone and read by one of them.

    Args:
        steps: All, each after those it needs.
        done: Whether a step's record is there and is of the inputs that it has now.
        there: Whether what it wrote is still there.

    Returns:
        In the order of `steps`.
    """
    chosen: set[str] = set()
    read: set[str] = set()
    for step in reversed(steps):
        if not done[step.name] or (step.name in read and not there[step.name]):
            chosen.add(step.name)
            read.update(step.inputs)
    return tuple(step for step in steps if step.name in chosen)


def startable(left: tuple[Step, ...], running: Collection[Step]) -> tuple[Step, ...]:
    """The steps that can be begun beside those that run.

    What a step reads is there when no step that is left makes it. A step that makes again what one that runs is reading
    has to wait for that one: an evolved model that was removed may come back in other bits on a GPU, and what was made
    of it then is made again too.

    Args:
        left: The steps to do, as `needed` gives them; those that run are among them.
        running: Of these, those that have been begun.

    Returns:
        In the order of `left`.

    Example:
        >>> evolve, score = Step("evolve", "wiki.1"), Step("score", "wiki.1", inputs=("evolve_wiki.1",))
        >>> startable((evolve, score), ()) == (evolve,), startable((evolve, score), (evolve,)), startable((score,), ())
        (True, (), (Step(kind='score', model='wiki.1', ...),))
    """
    to_come = {step.name for step in left}
    begun = {step.name for step in running}
    read = {name for step in running for name in step.inputs}
    return tuple(step for step in left if step.name not in begun | read and to_come.isdisjoint(step.inputs))
