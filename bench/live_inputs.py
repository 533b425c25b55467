"""What the live contests read: the demo's models and patches, its rows, and tasks of lm-evaluation-harness on them."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from bench.inputs import OUTPUTS
from bench.shapes import LLAMA_2_7B
from bench.synthetic import write_adapter, write_checkpoint
from portllm.checkpoint.open import open_checkpoint
from portllm.demo.settings import COMPLETION, PROMPT
from portllm.demo.story import BASE, DATA, EVOLUTION_TEXT, HELD_OUT_ROWS, TRAINING_ROWS, tell
from portllm.running.folder import model_folder
from portllm.running.model import load_tokenizer

LABELS, TOKENS, WRITTEN = "labels", "tokens", "written"
TASKS = {LABELS: "9 labels", TOKENS: "7 labels of one token", WRITTEN: "written answers"}

WRITTEN_TOKENS = 32

WIDE = replace(LLAMA_2_7B, layers=3, vocabulary=49_152)
"""What a port of a model of 7 B holds at a time: layers as wide as its own, few of them, for the demo's tokens."""

WIDE_PROMPTS, WIDE_TEXTS = 32, 16


@dataclass(frozen=True)
class LiveInputs:
    """The demo's folder, and some files beside its own.

    Attributes:
        folder: Of the demo.
        n_rows: Held-out rows that are scored, at most.
        n_prompts: Prompts of an aligned port, at most.
    """

    folder: Path
    n_rows: int | None
    n_prompts: int

    def make(self) -> None:
        """Do the demo's steps that have not been done, and write rows and tasks."""
        tell(self.folder, on_step=lambda step: print(f"{step.name}: {step.kept.seconds:.1f} s", flush=True))
        if not self.base.exists():
            shutil.copytree(model_folder(open_checkpoint(BASE)), self.base)
        tokenizer = load_tokenizer(self.base)
        held_out, taught = _read(HELD_OUT_ROWS), _read(TRAINING_ROWS)
        short = {row[COMPLETION] for row in held_out if len(tokenizer(f" {row[COMPLETION]}")["input_ids"]) == 1}
        for task in TASKS:
            rows = [row for row in held_out if task != TOKENS or row[COMPLETION] in short][: self.n_rows]
            _write(self.rows(task), rows)
            self.task(task).parent.mkdir(exist_ok=True)
            self.task(task).write_text(json.dumps(_task(task, self.rows(task), rows)) + "\n")
        pairs = [{"prompt": PROMPT.format(**row), "completion": f" {row[COMPLETION]}"} for row in taught]
        _write(self.pairs, pairs)
        _write(self.prompts, [{"prompt": pair["prompt"]} for pair in pairs[: self.n_prompts]])

    def make_wide(self) -> None:
        """Write base, update and patch of the wide shape, with the demo's tokenizer and prompts, and general text."""
        prompts = self.prompts.read_text().splitlines(keepends=True)[:WIDE_PROMPTS]
        self.wide("prompts.jsonl").parent.mkdir(exist_ok=True)
        self.wide("prompts.jsonl").write_text("".join(prompts))
        texts = [row["question"] for row in _read(EVOLUTION_TEXT)[:WIDE_TEXTS]]
        self.wide("anchors.txt").write_text("".join(f"{' '.join(text.split())}\n" for text in texts))
        for name, drift in (("base", False), ("evolved", True)):
            if not self.wide(name).exists():
                write_checkpoint(WIDE, self.wide(name), drift=drift)
            for file in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(self.base / file, self.wide(name) / file)
        if not self.wide("patch").exists():
            write_adapter(WIDE, self.wide("patch"), rank=8)

    def wide(self, name: str) -> Path:
        """A model, a patch or a file of the wide shape."""
        return self.folder / "live" / "wide" / name

    def model(self, name: str) -> Path:
        """A model or a patch of the demo."""
        return self.folder / name

    @property
    def base(self) -> Path:
        """The demo's base as a folder that every tool can load."""
        return self.folder / "live" / "base"

    @property
    def pairs(self) -> Path:
        """The rows to train on, as prompts and completions."""
        return self.folder / "live" / "pairs.jsonl"

    @property
    def prompts(self) -> Path:
        """Prompts of an aligned port."""
        return self.folder / "live" / "prompts.jsonl"

    def rows(self, task: str) -> Path:
        """The rows of a task."""
        return self.folder / "live" / f"{task}.jsonl"

    def task(self, task: str) -> Path:
        """A task as lm-evaluation-harness reads it (YAML, of which JSON is a part)."""
        return self.folder / "live" / "tasks" / f"{task}.yaml"

    def output(self, name: str) -> Path:
        """Where a tool may write."""
        return self.folder / OUTPUTS / name

    def count(self, file: Path) -> int:
        """Rows of a file."""
        return len(file.read_text().splitlines())


def _task(name: str, file: Path, rows: list[dict[str, str]]) -> dict[str, object]:
    """The same prompts and labels as ours; a written answer ends with its line and must be the right one."""
    asked = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "doc_to_text": PROMPT.replace("{passage}", "{{passage}}"),
        "target_delimiter": " ",
    }
    if name != WRITTEN:
        labels = sorted({row[COMPLETION] for row in rows})
        kind = {"output_type": "multiple_choice", "doc_to_choice": labels, "doc_to_target": COMPLETION}
        return asked | kind | {"metric_list": [{"metric": "acc"}]}
    return asked | {
        "output_type": "generate_until",
        "doc_to_target": f"{{{{{COMPLETION}}}}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": WRITTEN_TOKENS, "do_sample": False},
        "filter_list": [{"name": "line", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match"}],
    }


def _read(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text().splitlines()]


def _write(file: Path, rows: list[dict[str, str]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
