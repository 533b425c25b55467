"""One task of lm-evaluation-harness: what it asks of each row, and which answer is right.

The prompt, the choices, the delimiter between them and the metrics are the harness's own, by the task file in its
package. It is asked zero-shot.
"""

import difflib
import functools
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import DataError
from portllm.evaluating.harness.local_rows import local_source
from portllm.evaluating.harness.package import TASK_FILES, ConfigurableTask, Dataset, TaskManager, quiet_harness
from portllm.running.examples import Example

RIGHT = ("acc", "exact_match", "acc_norm")
"""Metrics that say of each row whether its answer is right; the first that a task has counts."""

_NAMED = re.compile(rb"""^["']?task["']?:[ ]*["']?([^"'\s#]+)["']?[ ]*(?:#.*)?\r?$""", re.MULTILINE)

KINDS = ("multiple_choice", "loglikelihood", "generate_until")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a task asks of one row.

    Attributes:
        pairs: For each possible answer, what the model is given and how it goes on, as they are strung together.
        right: Which of them is right.
        row: The row itself, as the harness has it.
    """

    pairs: tuple[tuple[str, str], ...]
    right: int
    row: Mapping[str, object]

    @property
    def example(self) -> Example:
        """The right answer as an example to train on.

        Raises:
            DataError: The two are strung together without whitespace.
        """
        return as_example(*self.pairs[self.right])


def as_example(context: str, continuation: str) -> Example:
    r"""Context and continuation as an `Example`, whose prompt and completion make the same text.

    The harness counts whitespace at the end of a context as the continuation's. One space there is what
    `completion_text` puts in; other whitespace ends the prompt.

    Raises:
        DataError: There is no whitespace between the two.

    Example:
        >>> as_example("Answer:", " yes")
        Example(prompt='Answer:', completion='yes')
        >>> as_example("Answer: ", "yes")
        Example(prompt='Answer:', completion='yes')
        >>> as_example("Answer:", "\nyes")
        Example(prompt='Answer:\n', completion='yes')
    """
    prompt = context.rstrip()
    rest = context[len(prompt) :] + continuation
    completion = rest.lstrip()
    between = rest[: len(rest) - len(completion)]
    if not between or not prompt or not completion:
        raise DataError(
            f"task: '{continuation[:60]}' follows '{context[-60:]}' without whitespace; training on such rows is "
            "not supported. Only score the task."
        )
    return Example(prompt=prompt if between == " " else prompt + between, completion=completion)


class HarnessTask:
    """A task of the harness with its rows.

    Args:
        name: As the harness calls it.
        data: A folder of JSONL files, by tasks; without it, the rows come from the hub.

    Raises:
        DataError: There is no such task, its rows cannot be had, or it tells no right answers from wrong ones.
    """

    def __init__(self, name: str, *, data: Path | None = None) -> None:
        self.name = name
        self.inner = _load(name, data)
        self.metric = next((metric for metric in RIGHT if metric in self.inner.aggregation()), "")
        _refuse(
            name,
            {
                "has no answers, only text to score": self.inner.OUTPUT_TYPE not in KINDS,
                f"has no per-row accuracy, only {', '.join(self.inner.aggregation())}": not self.metric,
                "evaluates each row several times": self.inner.config.repeats > 1,
            },
        )

    @property
    def generates(self) -> bool:
        """Whether the model writes its answer, instead of choosing one."""
        return bool(self.inner.OUTPUT_TYPE == "generate_until")

    @property
    def stock_max_new_tokens(self) -> int:
        """Tokens that the task lets a model write; the harness's own default where it says nothing."""
        return int((self.inner.config.generation_kwargs or {}).get("max_gen_toks", 256)) if self.generates else 0

    def training_questions(self, rows: int | None = None) -> list[Question]:
        """The questions of the training split, the first so many.

        Raises:
            DataError: There is none, or it has fewer rows.
        """
        if not self.inner.has_training_docs():
            raise DataError(f"task '{self.name}': has no training rows. Add a train.jsonl, or only score it.")
        return self._questions(self.inner.training_docs(), rows, "to train on")

    def scored_questions(self, rows: int | None = None) -> list[Question]:
        """The questions of the split that the harness scores, the first so many.

        Raises:
            DataError: It has fewer rows.
        """
        return self._questions(self.inner.eval_docs, rows, "to score")

    def _questions(self, docs: Dataset | list[dict[str, object]], rows: int | None, purpose: str) -> list[Question]:
        if rows is not None and len(docs) < rows:
            raise DataError(
                f"task '{self.name}': has {len(docs)} rows {purpose}, fewer than the {rows} requested. Request fewer."
            )
        count = len(docs) if rows is None else rows
        with quiet_harness():
            return [self._question(docs[index], index) for index in range(count)]

    def _question(self, row: Mapping[str, object], index: int) -> Question:
        context = self.inner.fewshot_context(row, num_fewshot=0, gen_prefix=self.inner.doc_to_prefix(row))
        if self.generates:
            return Question(pairs=((context, self._written_answer(row)),), right=0, row=row)
        asked = self.inner.construct_requests(row, context)
        requests = asked if isinstance(asked, list) else [asked]
        pairs = tuple((str(request.args[0]), str(request.args[1])) for request in requests)
        right = self._right_choice(row) if self.inner.OUTPUT_TYPE == "multiple_choice" else 0
        if not 0 <= right < len(pairs):
            raise DataError(
                f"task '{self.name}', row {index + 1}: its correct answer is not among its {len(pairs)} choices. "
                "Rows without a label cannot be scored; choose another split."
            )
        return Question(pairs=pairs, right=right, row=row)

    def _right_choice(self, row: Mapping[str, object]) -> int:
        # Where the choices stand in the prompt (WinoGrande), the harness keeps the right one where the prompt would be.
        found = self.inner.doc_to_text(row) if self.inner.multiple_input else self.inner.doc_to_target(row)
        answer = found[0] if isinstance(found, list) and found else found
        if isinstance(answer, str):
            choices = self.inner.doc_to_choice(row)
            return choices.index(answer) if answer in choices else -1
        return int(answer) if isinstance(answer, int) else -1

    def _written_answer(self, row: Mapping[str, object]) -> str:
        target = self.inner.doc_to_target(row)
        if self.inner.config.doc_to_choice is not None:
            target = self.inner.doc_to_choice(row)[target]
        return f"{self.inner.config.target_delimiter}{target[0] if isinstance(target, list) else target}"


def _refuse(name: str, reasons: Mapping[str, bool]) -> None:
    for reason, holds in reasons.items():
        if holds:
            raise DataError(f"task '{name}': {reason}. Choose another task.")


def _load(name: str, data: Path | None) -> ConfigurableTask:
    stock = _task_file(name)
    with tempfile.TemporaryDirectory() as folder, quiet_harness():
        place = Path(folder)
        manager = TaskManager(include_path=stock.parent, include_defaults=False)
        says = manager.task_index[name].cfg
        _refuse(
            name,
            {
                "is implemented in Python in the harness": "class" in says,
                "executes code generated by the model, which is not supported": bool(says.get("unsafe_code")),
                "uses images or audio": "doc_to_image" in says or "doc_to_audio" in says,
            },
        )
        changes: dict[str, object] = {"num_fewshot": 0}
        if data is not None:
            changes |= local_source(says, data / name, place)
        # The harness's way to change a task: a file that includes the other. JSON is YAML.
        file = place / "task.yaml"
        config = {"include": str(stock), "task": name, **changes}
        file.write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
        try:
            return manager.load(str(file))["tasks"][name]
        except Exception as error:
            where = "the hub" if data is None else f"'{data / name}'"
            raise DataError(
                f"task '{name}': lm-evaluation-harness cannot load it with rows from {where}: "
                f"{type(error).__name__}: {error}. "
                + ("Without network access, pass a" if data is None else "Correct the rows, or pass another")
                + " folder of JSONL files with --data."
            ) from error


def _task_file(name: str) -> Path:
    files = _task_files()
    if name not in files:
        near = difflib.get_close_matches(name, files, n=3)
        raise DataError(
            f"task '{name}': lm-evaluation-harness has no such task; groups of tasks are not supported. "
            + (f"Similar names: {', '.join(near)}. " if near else "")
            + "`lm-eval ls subtasks` lists all."
        )
    return files[name]


@functools.cache
def _task_files() -> Mapping[str, Path]:
    """The task files in the harness's package, by name: a look at 14,000 files, a tenth of the time of parsing them."""
    found: dict[str, Path] = {}
    for file in sorted(TASK_FILES.rglob("*.yaml")):
        if named := _NAMED.search(file.read_bytes()):
            found.setdefault(named[1].decode(), file)  # of two, the harness takes the first
    return found
