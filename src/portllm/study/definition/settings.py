"""What a study's file says, as values: every field of a class is a key of its table."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from portllm.evaluating.scoring import Kind
from portllm.files.typed import EACH_ONCE
from portllm.running.device import Dtype
from portllm.running.examples import ExampleFormat, Template
from portllm.running.ranges import require_ranges
from portllm.study.parts.check import CheckSettings
from portllm.study.parts.control import ControlSettings, ReinitSettings, TwinSettings
from portllm.study.parts.theory import TheorySettings
from portllm.training.evolve import EvolveSettings
from portllm.training.evolve_lora import LoraEvolveSettings
from portllm.training.settings import TrainSettings

Artefact: TypeAlias = Literal["patches", "checkpoints"]
EvolutionSettings: TypeAlias = EvolveSettings | ControlSettings

EVOLUTIONS: Mapping[str, type[EvolutionSettings]] = {
    "full": EvolveSettings,
    "lora": LoraEvolveSettings,
    "twin": TwinSettings,
    "reinit": ReinitSettings,
}
"""The settings of each kind of evolution."""

WHOLE_ROW = "{text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsTask:
    """A task of the user's own rows, scored by the program itself.

    Attributes:
        train: JSONL file of the rows to train on, below the data folder.
        score: The same, of the rows to score.
        prompt: Template of the prompt.
        completion: Field that holds the completion.
        judge: Whether the likeliest label is the answer, or what the model writes.
        labels: All possible answers, where they are not those that occur.
        train_rows: How many rows to train on, from the file's beginning; None for all.
        score_rows: How many to score.
        port_rows: How many of the rows behind those to train on give prompts to methods that run models on some.
        max_tokens: Most tokens of a scored row.
        max_new_tokens: Most tokens written.
        batch_size: Rows of a forward pass.
    """

    train: str
    score: str
    prompt: str
    completion: str
    judge: Kind = "labels"
    labels: tuple[str, ...] = ()
    train_rows: int | None = None
    score_rows: int | None = None
    port_rows: int = 0
    max_tokens: int = 512
    max_new_tokens: int = 32
    batch_size: int = 16

    def __post_init__(self) -> None:
        ExampleFormat(prompt=self.prompt, completion=self.completion)
        _require_task_ranges(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessTask:
    """A task of lm-evaluation-harness, scored zero-shot by its own rules.

    Attributes:
        name: As the harness calls it.
        train_rows: How many rows of its training split to train on; None for all.
        score_rows: How many rows of its scored split to score.
        port_rows: How many of the rows behind those to train on give prompts to methods that run models on some.
        max_tokens: Most tokens of a scored row; None for what the model takes.
        max_new_tokens: Most tokens written; None for what the task says.
        batch_size: Rows of a forward pass.
    """

    name: str
    train_rows: int | None = None
    score_rows: int | None = None
    port_rows: int = 0
    max_tokens: int | None = None
    max_new_tokens: int | None = None
    batch_size: int = 16

    def __post_init__(self) -> None:
        _require_task_ranges(self)


TaskSettings: TypeAlias = RowsTask | HarnessTask


def _require_task_ranges(task: TaskSettings) -> None:
    apart = "0 without train_rows: rows to train on are not ported on"
    require_ranges(
        "task",
        ("train_rows", task.train_rows, "1 or more", task.train_rows is None or task.train_rows >= 1),
        ("score_rows", task.score_rows, "1 or more", task.score_rows is None or task.score_rows >= 1),
        ("port_rows", task.port_rows, "0 or more", task.port_rows >= 0),
        ("port_rows", task.port_rows, apart, task.port_rows == 0 or task.train_rows is not None),
        ("max_tokens", task.max_tokens, "2 or more", task.max_tokens is None or task.max_tokens >= 2),
        ("max_new_tokens", task.max_new_tokens, "1 or more", task.max_new_tokens is None or task.max_new_tokens >= 1),
        ("batch_size", task.batch_size, "1 or more", task.batch_size >= 1),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Plain text in a file.

    Attributes:
        file: JSONL, below the data folder.
        template: What of a row is the text.
        rows: How many rows, from the file's beginning; None for all.
        block_tokens: Tokens that a model is given at a time when its loss on the text is measured.
    """

    file: str
    template: str = WHOLE_ROW
    rows: int | None = None
    block_tokens: int = 256

    def __post_init__(self) -> None:
        Template(self.template)
        require_ranges(
            "text",
            ("rows", self.rows, "1 or more", self.rows is None or self.rows >= 1),
            ("block_tokens", self.block_tokens, "2 or more", self.block_tokens >= 2),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evolution:
    """What becomes of the base, once or several times, each time from where it was.

    Attributes:
        text: What a model that is trained reads; with several links, link `k` of `n` reads every `n`-th row from the
            `k`-th on. None for a control, which reads nothing.
        template: What of a row is the text.
        links: Updates, one after the other.
        new_text: Text like it that is not trained on, for the loss before and after.
        settings: Of the training, or of the control; its kind is the kind of evolution.
    """

    text: str | None = None
    template: str = WHOLE_ROW
    links: int = 1
    new_text: Text | None = None
    settings: EvolutionSettings

    def __post_init__(self) -> None:
        Template(self.template)
        reads = isinstance(self.settings, EvolveSettings)
        expected = "a file, which this kind requires" if reads else "none, since this kind reads no file"
        require_ranges(
            "evolution",
            ("links", self.links, "1 or more", self.links >= 1),
            ("text", self.text, expected, (self.text is not None) == reads),
            ("template", self.template, "none without text", reads or self.template == WHOLE_ROW),
        )

    @property
    def kind(self) -> str:
        """`lora`: factors are trained and merged. `full`: all weights are. `twin` and `reinit` are controls."""
        return next(kind for kind, cls in EVOLUTIONS.items() if type(self.settings) is cls)


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """An experiment: patches for a base, updates of that base, and the tasks that all are scored on.

    Attributes:
        title: Of its page.
        base: The model, by name; also in the results.
        seeds: One patch is trained for each task and seed, on the base and on every evolved model.
        retrain_seeds: Other seeds, of which a patch is trained on every evolved model alone: how far retraining is from
            itself.
        methods: How patches are ported, as `PortedBy.read` takes it.
        patch: How patches are trained.
        tasks: By name.
        evolutions: By name.
        old_text: Text on which the loss of every model is measured, to see what an update forgets.
        check: What `check` measures of each patch on each evolved model; None to leave that out.
        theory: What the paper's theory is measured with, for each ported patch; None to leave that out.
        dtype: What models compute in while they are scored. In bfloat16 rounding decides near ties: SmolLM2-135M with a
            patch of eight labels answers 6 % of 300 rows otherwise than in float32 (own measurement). `auto` is the
            stored dtype, where the processor computes in it.
        keep: Outputs that stay when no step that is left needs them.
        compare: The published table to set the results beside, by name, or several.
    """

    title: str
    base: str
    seeds: Annotated[tuple[int, ...], EACH_ONCE] = (0,)
    retrain_seeds: Annotated[tuple[int, ...], EACH_ONCE] = ()
    methods: Annotated[tuple[str, ...], EACH_ONCE] = ("add",)
    patch: TrainSettings = field(default_factory=TrainSettings)
    tasks: Mapping[str, TaskSettings]
    evolutions: Mapping[str, Evolution]
    old_text: Text | None = None
    check: CheckSettings | None = None
    theory: TheorySettings | None = None
    dtype: Dtype = "float32"
    keep: tuple[Artefact, ...] = ("patches", "checkpoints")
    compare: str | tuple[str, ...] | None = None
