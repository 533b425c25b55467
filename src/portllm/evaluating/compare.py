"""Compare base, patched base, evolved, ported and retrained models on the same rows.

Each base is loaded once; adapters are put on it one beside the other and switched.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from operator import eq
from pathlib import Path

from portllm.evaluating.metrics import (
    Estimate,
    Flips,
    Retention,
    accuracy,
    accuracy_change,
    flips,
    mean_loss,
    mean_words,
    retention,
)
from portllm.evaluating.names import BASE, EVOLVED, MERGED, PATCHED, PORTED, RETRAINED, is_port, is_rival, place
from portllm.evaluating.own_tokens import has_own_tokens, load_patched
from portllm.evaluating.plan import Contestants
from portllm.evaluating.scoring import Scored, Scores
from portllm.notebook import ShownInNotebook
from portllm.progress import Progress, silent
from portllm.running.device import Device, Dtype
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.fused_lora import fuse
from portllm.running.model import (
    PeftModel,
    PreTrainedModel,
    add_adapter,
    attach_adapter,
    choose_device,
    load_model,
    load_tokenizer,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparisonRow:
    """One model of a comparison.

    Attributes:
        name: Which of them, one of `portllm.evaluating.names`.
        score: Fraction of correct answers.
        loss: Nats per token of the correct completions.
        score_change: Change of the score against base + patch, row by row; None where that was not run.
        port_change: For a rival: change of the score against evolved + ported, row by row.
        flips: Answers that changed sides against base + patch; None where that was not run.
        agreement: Share of the rows that are answered as by base + patch, right or wrong; None likewise.
        score_retention: For a ported patch, adapter or merged: share of retraining's gain in score.
        loss_retention: The same for the loss.
        scores: The rows themselves.
    """

    name: str
    score: Estimate
    loss: Estimate
    score_change: Estimate | None
    port_change: Estimate | None
    flips: Flips | None
    agreement: Estimate | None
    score_retention: Retention | None
    loss_retention: Retention | None
    scores: Scores = field(repr=False)

    def __repr__(self) -> str:
        return f"ComparisonRow({self.name!r}, score={self.score.value:.4f}, loss={self.loss.value:.4f})"

    def to_json(self) -> dict[str, object]:
        """The numbers by name, without the single rows but those that turned wrong."""
        return {
            "name": self.name,
            "score": self.score.to_json(),
            "loss": self.loss.to_json(),
            "score_change": self.score_change.to_json() if self.score_change else None,
            "port_change": self.port_change.to_json() if self.port_change else None,
            "flips": self.flips.to_json() if self.flips else None,
            "agreement": self.agreement.to_json() if self.agreement else None,
            "score_retention": self.score_retention.to_json() if self.score_retention else None,
            "loss_retention": self.loss_retention.to_json() if self.loss_retention else None,
            "seconds": self.scores.seconds,
            "metrics": dict(self.scores.metrics),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnedRow:
    """A row that base + patch answers right and another model wrong, to be read.

    Attributes:
        row: Its number, counted from 1.
        prompt: What was asked.
        right: The right answer.
        before: What base + patch answers.
        after: What the other model answers.
    """

    row: int
    prompt: str
    right: str
    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(ShownInNotebook):
    """Models side by side on the same rows.

    Attributes:
        rows: Base, base + patch, evolved, ported, its rivals, merged, retrained, as far as they were given.
        kind: How answers were judged, as in `Scored`.
        labels: The possible answers, for `labels`.
        n_rows: Rows of the task.
        n_cut_rows: Number of rows whose prompt was truncated.
        seed: Random seed of the bootstrap behind the intervals of retention.
        examples: What each row asks, and the right answer.
    """

    rows: tuple[ComparisonRow, ...]
    kind: str
    labels: tuple[str, ...]
    n_rows: int
    n_cut_rows: int
    seed: int
    examples: tuple[Example, ...] = field(repr=False)

    def __repr__(self) -> str:
        scores = {row.name: round(row.score.value, 4) for row in self.rows}
        return f"Comparison({self.n_rows} rows, scores={scores})"

    def row(self, name: str) -> ComparisonRow | None:
        """The row of that name, or None where it was not run."""
        return next((row for row in self.rows if row.name == name), None)

    @property
    def right_answers(self) -> tuple[str, ...]:
        """The right answer of each row."""
        return tuple(example.completion for example in self.examples)

    def turned_wrong(self, name: str) -> tuple[TurnedRow, ...]:
        """The negative flips of a model, as text; none where it or base + patch was not run."""
        before, after = self.row(PATCHED), self.row(name)
        if before is None or after is None or after.flips is None:
            return ()
        return tuple(
            TurnedRow(
                row=index + 1,
                prompt=self.examples[index].prompt,
                right=self.examples[index].completion,
                before=before.scores.answers[index],
                after=after.scores.answers[index],
            )
            for index in after.flips.negative
        )

    def to_json(self) -> dict[str, object]:
        """In types that JSON has: everything but the single rows, of which those are there that a port turned wrong."""
        return {
            "rows": [row.to_json() | self._beside(row) for row in self.rows],
            "kind": self.kind,
            "labels": list(self.labels),
            "n_rows": self.n_rows,
            "n_cut_rows": self.n_cut_rows,
            "seed": self.seed,
        }

    def _beside(self, row: ComparisonRow) -> dict[str, object]:
        """What only some rows have: answers that a port turned wrong, and the length of written ones."""
        turned = {"turned_wrong": list(map(asdict, self.turned_wrong(row.name)))} if is_port(row.name) else {}
        return turned | ({"words": mean_words(row.scores.answers)} if self.kind == "text" else {})


def compare(
    contestants: Contestants,
    task: Scored,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    seed: int = 0,
    progress: Progress = silent,
) -> Comparison:
    """Runs every model that is given over the task and sets the results side by side.

    Args:
        contestants: Folders of the models and adapters.
        task: Rows, and how to judge.
        device: Device to run on.
        dtype: What models compute in.
        seed: Of the resampling.
        progress: Told of the rows done, all models together; the label names the one that is running.

    Raises:
        CheckpointError: A model cannot be loaded.
        AdapterFormatError: An adapter does not fit its model.
        DataError: A completion does not fit into `task.max_tokens`.
    """
    scores = score_all(contestants, task, device=device, dtype=dtype, progress=progress)
    return set_side_by_side(scores, task, seed=seed)


def score_all(
    contestants: Contestants,
    task: Scored,
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    progress: Progress = silent,
) -> dict[str, Scores]:
    """What each model makes of the task, by the name of its row; arguments and errors as for `compare`.

    The merged checkpoint is a third load; base and evolved are loaded once each, whatever their adapters.
    """
    where = choose_device(device)
    parts = (contestants.base, contestants.patch, contestants.evolved, contestants.ported)
    others = (*contestants.rivals.values(), contestants.merged, contestants.retrained)
    total = task.n_rows * sum(part is not None for part in (*parts, *others))
    done = 0
    scores: dict[str, Scores] = {}

    def run(name: str, model: PreTrainedModel | PeftModel, encoder: Encoder) -> None:
        def tick(n_rows: int) -> None:
            nonlocal done
            done += n_rows
            progress(f"evaluate: {name}", done, total, "rows")

        progress(f"evaluate: {name}", done, total, "rows")
        scores[name] = task.score(model, encoder, device=where, tick=tick)

    def run_family(folder: Path, name: str, adapters: dict[str, Path | None]) -> None:
        encoder = Encoder(load_tokenizer(folder))
        model = load_model(folder, device=where, dtype=dtype, longest=task.longest)
        run(name, model, encoder)
        given = {name: adapter for name, adapter in adapters.items() if adapter is not None}
        own = {name: adapter for name, adapter in given.items() if has_own_tokens(adapter, folder)}
        for adapter_name, model_with in _switched(model, {n: a for n, a in given.items() if n not in own}):
            run(adapter_name, model_with, encoder)
        del model  # before it is loaded again, with more rows
        for adapter_name, adapter in own.items():
            run(adapter_name, *load_patched(folder, adapter, device=where, dtype=dtype, longest=task.longest))

    run_family(contestants.base, BASE, {PATCHED: contestants.patch})
    if contestants.evolved is not None:
        ports = {PORTED: contestants.ported, **contestants.rivals}
        run_family(contestants.evolved, EVOLVED, {**ports, RETRAINED: contestants.retrained})
    if contestants.merged is not None:
        run_family(contestants.merged, MERGED, {})
    return scores


def set_side_by_side(scores: Mapping[str, Scores], task: Scored, *, seed: int = 0) -> Comparison:
    """The comparison that follows from the scores of each model, by the name of its row. Pure.

    Args:
        scores: As from `score_all`, the base's at least.
        task: What was scored.
        seed: Of the resampling.
    """
    return Comparison(
        rows=tuple(_row(name, scores, seed=seed) for name in sorted(scores, key=place)),
        kind=task.kind,
        labels=task.labels if task.kind == "labels" else (),
        n_rows=task.n_rows,
        n_cut_rows=scores[BASE].n_cut_rows,
        seed=seed,
        examples=tuple(task.examples),
    )


def _switched(model: PreTrainedModel, adapters: dict[str, Path]) -> Iterator[tuple[str, PeftModel]]:
    """The model with each adapter in turn the one that counts."""
    patched: PeftModel | None = None
    for index, (name, folder) in enumerate(adapters.items()):
        inner_name = f"adapter_{index}"  # peft uses it in module names, where it must not have blanks or dots
        if patched is None:
            patched = attach_adapter(model, folder, name=inner_name)
        else:
            add_adapter(patched, folder, name=inner_name)
            patched.set_adapter(inner_name)
        yield name, fuse(patched.eval())


def _row(name: str, scores: Mapping[str, Scores], *, seed: int) -> ComparisonRow:
    own = scores[name]
    reference = scores.get(PATCHED) if name not in (BASE, PATCHED) else None
    evolved, retrained = scores.get(EVOLVED), scores.get(RETRAINED)
    first = scores.get(PORTED) if is_rival(name) else None

    def kept(of: Callable[[Scores], tuple[float, ...]], *, lower_is_better: bool) -> Retention | None:
        if not is_port(name) or evolved is None:
            return None
        if retrained is None:
            return Retention(value=None, low=None, high=None, reason="no retrained patch was given")
        return retention(
            evolved=of(evolved),
            ported=of(own),
            retrained=of(retrained),
            lower_is_better=lower_is_better,
            seed=seed,
        )

    return ComparisonRow(
        name=name,
        score=accuracy(own.correct),
        loss=mean_loss(own.losses),
        score_change=accuracy_change(own.correct, reference.correct) if reference else None,
        port_change=accuracy_change(own.correct, first.correct) if first else None,
        flips=flips(reference.correct, own.correct) if reference else None,
        agreement=accuracy(tuple(map(eq, own.answers, reference.answers))) if reference else None,
        score_retention=kept(lambda rows: rows.correct, lower_is_better=False),
        loss_retention=kept(lambda rows: rows.losses, lower_is_better=True),
        scores=own,
    )
