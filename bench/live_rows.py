"""The rows of the live page: what runs models, compared with what a user would pick instead."""

from bench.live_inputs import LABELS, TASKS, TOKENS, WRITTEN
from bench.rows import PRIVATE, SECONDS, Row

ONCE = ((1, 2), (1.5, 3))
TIMES = {LABELS: ((2, 3), (4, 6)), TOKENS: ONCE, WRITTEN: ONCE}
"""What is to be reached, at least and at best, on one model and on six.

With labels of several tokens the harness reads a prompt again for each of them. With one token for each label, and
where answers are written, both read it once: what is left to save is loading, starting and padding.
"""


def _evaluate(task: str) -> tuple[Row, ...]:
    title, contest = f"evaluate, {TASKS[task]}", f"evaluate-{task}"
    on_one, on_six = TIMES[task]
    one, six = ("harness-1", "ours-1"), ("harness-6", "ours-6")

    def gain(what: str, jobs: tuple[str, str], quantity: str, must: float, aim: float) -> Row:
        return Row(f"harness / {title}, {what}", contest, *jobs, quantity, "ratio", must, aim, larger_is_better=True)

    return (
        gain("one model: time", one, SECONDS, *on_one),
        gain("six models: time", six, SECONDS, *on_six),
        gain("one model: private memory", one, PRIVATE, 1, 2),
        Row(f"{title}, six models: rate", contest, "ours-6", None, SECONDS, "number", None, None, per="rows"),
        Row(f"{title}: the same score as the harness", contest, *one, "score", "same", 1, 1, larger_is_better=True),
    )


ROWS = (
    *(row for task in TASKS for row in _evaluate(task)),
    Row("train / TRL: a step", "train", "train", "trl", "step_seconds", "ratio", 1, 0.8),
    Row("train / TRL: private memory", "train", "train", "trl", PRIVATE, "ratio", 1, 0.8),
    Row("align, the refit / one scoring pass: time", "align", "align", "pass", "pass_seconds", "ratio", 4, 2),
    Row("align, all of it / a program that scores once: time", "align", "align", "pass", SECONDS, "ratio", None, None),
    Row(
        "align, beyond its imports / a layer of each model and all states: private memory",
        "align", "align", "imports", PRIVATE, "difference", 1.5, 1.2, per="least_bytes",
    ),
    Row(
        "align through layers of Llama 2 7B, likewise: private memory",
        "align-wide", "align", "imports", PRIVATE, "difference", 1.5, 1.2, per="least_bytes",
    ),
    Row("certify: rate", "certify", "certify", None, SECONDS, "number", None, None, per="rows"),
    Row("check --text: rate", "check-text", "check", None, SECONDS, "number", None, None, per="rows"),
    Row("free text on four models: time", "text", "evaluate", None, SECONDS, "number", None, None),
)  # fmt: skip
