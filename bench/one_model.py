"""The pass of `portllm evaluate` over one model, which the command runs for each of its models.

python one_model.py MODEL ROWS REPORT [labels|text]
"""

import json
import sys
from pathlib import Path

from portllm.demo.settings import COMPLETION, PROMPT
from portllm.evaluating.compare import compare
from portllm.evaluating.plan import Contestants
from portllm.evaluating.scoring import Task
from portllm.running.examples import ExampleFormat, read_examples

model, rows, report, kind = sys.argv[1:]
examples = tuple(read_examples(Path(rows), ExampleFormat(prompt=PROMPT, completion=COMPLETION)))
comparison = compare(Contestants(base=Path(model)), Task(examples=examples, kind=kind), device="cpu")
Path(report).write_text(json.dumps(comparison.to_json()) + "\n")
