"""One model over the rows of a task of lm-evaluation-harness, by the harness's own model class, filters and metrics.

What runs is the harness's `HFLM` on a model that is in memory already, with whatever adapter is switched on. Two
things are set: the softmax is taken in float32, and inputs may be bounded.
"""

import copy
import time
from collections import defaultdict
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from portllm.errors import CheckpointError, DataError
from portllm.evaluating.harness.package import HFLM, CacheHook, Instance, quiet_harness
from portllm.evaluating.harness.task import HarnessTask, Question
from portllm.evaluating.scoring import Scores, Tick
from portllm.foreign import PeftModel, PreTrainedModel, PreTrainedTokenizerBase, foreign, quiet

FLEXIBLE = "flexible-extract"
"""The filter that counts where a task reads an answer out of a text in more than one way."""

Metrics = dict[str, float]


def score_task(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    task: HarnessTask,
    questions: Sequence[Question],
    *,
    device: torch.device,
    max_tokens: int | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 16,
    tick: Tick = lambda _: None,
) -> Scores:
    """Answers the questions of a task with a model.

    Args:
        model: A causal language model in evaluation mode, with the adapter that counts switched on.
        tokenizer: Of the model.
        task: The task.
        questions: Of the task, those to answer.
        device: Where the model is.
        max_tokens: Most tokens of an input, cut from the left; never more than the model's own.
        max_new_tokens: Most tokens written; without it, what the task says.
        batch_size: Inputs of a forward pass.
        tick: Told how many rows are done.

    Raises:
        DataError: A choice or a right answer has no tokens, or more than an input may have.
    """
    began = time.perf_counter()
    lm = _Loaded(model, tokenizer, device=device, max_tokens=max_tokens, batch_size=batch_size)
    runs = 2 if task.generates else 1  # what is written, and what the right answer costs
    lm.set_cache_hook(_Ticks(tick, n_rows=len(questions), n_answers=runs * sum(len(each.pairs) for each in questions)))
    with torch.inference_mode(), quiet(), quiet_harness():
        if task.generates:
            requests, n_cut = _write(lm, task, questions, max_new_tokens=max_new_tokens)
            _, losses, _ = _weigh(lm, task, questions)
        else:
            requests, losses, n_cut = _weigh(lm, task, questions)
        correct, metrics = _judge(task, questions, requests)
    return Scores(
        answers=tuple(_answer(task, row) for row in requests),
        correct=tuple(correct),
        losses=losses,
        n_cut_rows=n_cut,
        seconds=time.perf_counter() - began,
        metrics=metrics,
    )


class _Loaded(HFLM):  # type: ignore[misc]
    """The harness's model class around a model in memory, which it leaves as it is.

    HFLM would tie the weights of a model that it is given again, also under an adapter that took them apart; so it is
    given where and what the model is, and the model afterwards.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        device: torch.device,
        max_tokens: int | None,
        batch_size: int,
    ) -> None:
        with quiet(), quiet_harness():
            super().__init__(
                pretrained=SimpleNamespace(device=device, config=model.config),
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
                softmax_dtype="float32",
                batch_size=batch_size,
            )
        self._model = model
        self._most = max_tokens
        self.lengths: list[tuple[int, int]] = []
        """Tokens of context and continuation, by the requests of the last `loglikelihood`."""

    @property
    def max_length(self) -> int:
        own = int(super().max_length)
        return own if self._most is None else min(own, self._most)

    def tok_encode(self, *arguments: object, **options: object) -> list[int]:
        with foreign(self._failed):
            ids: list[int] = super().tok_encode(*arguments, **options)
        return ids

    def tok_batch_encode(self, *arguments: object, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
        with foreign(self._failed):
            batch: tuple[torch.Tensor, torch.Tensor] = super().tok_batch_encode(*arguments, **options)
        return batch

    def _failed(self, why: str) -> CheckpointError:
        return CheckpointError(f"'{self.tokenizer.name_or_path}': its tokenizer fails on a text: {why}")

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **options: object
    ) -> list[tuple[float, bool]]:
        for (_, continuation), _, ids in requests:
            if not 0 < len(ids) <= self.max_length:
                raise DataError(
                    f"answer '{continuation[:60]}': has {len(ids)} tokens; expected 1 to {self.max_length}. "
                    "Allow more tokens, or choose another task."
                )
        self.lengths = [(len(context), len(ids)) for _, context, ids in requests]
        answers: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options)
        return answers


class _Ticks(CacheHook):  # type: ignore[misc]
    """Told by the harness of each answer; tells of rows."""

    def __init__(self, tick: Tick, *, n_rows: int, n_answers: int) -> None:
        super().__init__(None)
        self._tick, self._n_rows, self._n_answers = tick, n_rows, n_answers
        self._answers = self._rows = 0

    def add_partial(self, *_: object) -> None:
        self._answers += 1
        rows = self._answers * self._n_rows // self._n_answers
        if rows > self._rows:
            self._tick(rows - self._rows)
            self._rows = rows


Requests = list[list[Instance]]


def _weigh(lm: _Loaded, task: HarnessTask, questions: Sequence[Question]) -> tuple[Requests, tuple[float, ...], int]:
    """Every possible answer by the harness's `loglikelihood`; the loss of the right ones; how many rows were cut."""
    rows = [
        [_request("loglikelihood", task, index, question, place, pair) for place, pair in enumerate(question.pairs)]
        for index, question in enumerate(questions)
    ]
    flat = [request for row in rows for request in row]
    losses, cut = [], set()
    answers = lm.loglikelihood(flat, disable_tqdm=True)
    for request, answer, (before, after) in zip(flat, answers, lm.lengths, strict=True):
        request.resps.append(answer)
        if request.idx == questions[request.doc_id].right:
            losses.append(-answer[0] / after)
        if before + after > lm.max_length + 1:  # the last token is only predicted
            cut.add(request.doc_id)
    return rows, tuple(losses), len(cut)


def _write(
    lm: _Loaded, task: HarnessTask, questions: Sequence[Question], *, max_new_tokens: int | None
) -> tuple[Requests, int]:
    """What the model writes: the harness's `generate_until`; and how many rows were cut."""
    most = task.stock_max_new_tokens if max_new_tokens is None else max_new_tokens
    room = lm.max_length - most
    if room < 1:
        raise DataError(
            f"task '{task.name}': {most} tokens are to be generated and the limit is {lm.max_length}, so no room "
            "is left for the prompt. Generate fewer tokens, or raise the limit."
        )
    kwargs = {**(task.inner.config.generation_kwargs or {}), "max_gen_toks": most}
    rows = [
        [_request("generate_until", task, index, question, 0, (question.pairs[0][0], copy.deepcopy(kwargs)))]
        for index, question in enumerate(questions)
    ]
    flat = [row[0] for row in rows]
    for request, text in zip(flat, lm.generate_until(flat, disable_tqdm=True), strict=True):
        request.resps.append(text)
    return rows, sum(len(lm.tok_encode(request.args[0])) > room for request in flat)


def _request(
    kind: str, task: HarnessTask, index: int, question: Question, place: int, arguments: tuple[Any, ...]
) -> Instance:
    return Instance(
        request_type=kind,
        doc=dict(question.row),
        arguments=arguments,
        idx=place,
        metadata=(task.name, index, 1),
    )


def _judge(task: HarnessTask, questions: Sequence[Question], rows: Requests) -> tuple[list[bool], Metrics]:
    """Which rows are right, and the task's metrics over them, by the names that the harness prints."""
    task.inner._instances = [request for row in rows for request in row]
    task.inner.apply_filters()
    filters = list(rows[0][0].filtered_resps)
    counts = FLEXIBLE if FLEXIBLE in filters else filters[0]
    correct: list[bool] = []
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for name in filters:
        for question, row in zip(questions, rows, strict=True):
            found = task.inner.process_results(question.row, [request.filtered_resps[name] for request in row])
            if name == counts:
                correct.append(bool(found[task.metric]))
            for metric, value in found.items():
                values[metric, name].append(value)
    aggregation = task.inner.aggregation()
    return correct, {
        f"{metric},{name}": float(aggregation[metric](found))
        for (metric, name), found in values.items()
        if metric in aggregation
    }


def _answer(task: HarnessTask, row: list[Instance]) -> str:
    if task.generates:
        return str(row[0].resps[0])
    if task.inner.OUTPUT_TYPE == "loglikelihood":
        return str(row[0].args[1]) if row[0].resps[0][1] else ""
    choices = task.inner.doc_to_choice(row[0].doc)
    costs = np.array([request.resps[0][0] for request in row[: len(choices)]])
    lengths = [len(choice) if task.metric == "acc_norm" else 1 for choice in choices]
    return str(choices[int(np.argmax(costs / np.array(lengths)))])
