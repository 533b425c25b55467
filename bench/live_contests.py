"""What runs models, beside what a user would pick instead: lm-evaluation-harness, TRL with PEFT, transformers."""

import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path

from bench.contests import PEERS, VERDICT_IS_NO, Contest, Facts, Job
from bench.inputs import OUTPUTS
from bench.live_inputs import LABELS, TASKS, WIDE, WIDE_PROMPTS, WRITTEN, WRITTEN_TOKENS, LiveInputs
from bench.peers.environment import install
from portllm.demo.settings import TRAIN

HERE = Path(__file__).parent
BATCH = 16
STEPS = 24
"""Of a training; the first is not timed."""

FEW = 8
"""Rows of free text that a new user tries first."""

FLOAT32 = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""All tools compute in float32, as on a processor with AVX2 alone: what torch and the libraries under it are told."""

MODELS = (
    ("base", None),
    ("base", "patch"),
    ("evolved", None),
    ("evolved", "ported"),
    ("merged", None),
    ("evolved", "retrained"),
)
"""The six that `evaluate` compares: a model, and an adapter on it."""


def evaluate(inputs: LiveInputs, *, task: str) -> Contest:
    """One model, and six, beside lm-evaluation-harness on the same rows, with the same labels."""
    rows = inputs.rows(task)
    n_rows = inputs.count(rows)
    kind = ("--judge", "text", "--max-new-tokens", WRITTEN_TOKENS) if task == WRITTEN else ()
    six = inputs.output("six.json")
    compare = _portllm(
        "evaluate", "--base", inputs.base, *_given(inputs, "patch", "evolved", "ported", "retrained", "merged"),
        "--data", rows, *kind, "--batch-size", BATCH, "--device", "cpu", "--json",
    )  # fmt: skip
    each = [_harness(inputs, task, f"model-{number}", *model) for number, model in enumerate(MODELS)]
    one, ours = inputs.output("harness"), inputs.output("one.json")
    pass_over = (sys.executable, str(HERE / "one_model.py"), str(inputs.model("merged")), str(rows), str(ours))
    reads = tuple(inputs.model(name) for name in ("merged", "evolved", "patch", "ported", "retrained"))
    scored = {"rows": n_rows}
    return Contest(
        f"evaluate, {TASKS[task]}, {n_rows} rows",
        (
            Job(
                "harness-1", "lm-evaluation-harness (hf), one model",
                _float32(_harness(inputs, task, "harness", "merged", None)),
                (inputs.model("merged"),), one, lambda folder: scored | _harness_score(folder, task),
            ),
            Job(
                "ours-1", "portllm evaluate's pass over one model",
                _float32((*pass_over, "text" if task == WRITTEN else "labels")),
                (inputs.model("merged"),), ours, lambda file: scored | _our_score(file, "base"),
            ),
            Job(
                "harness-6", "lm-evaluation-harness (hf), six models, one after another",
                _float32(("sh", "-c", " && ".join(map(shlex.join, each)))),
                (inputs.base, *reads), one.parent / "model-4",
                lambda folder: {"rows": 6 * n_rows} | _harness_score(folder, task), is_slow=True,
            ),
            Job(
                "ours-6", "portllm evaluate, six models",
                _float32(("sh", "-c", f"{shlex.join(compare)} > {shlex.quote(str(six))}")),
                (inputs.base, *reads), six,
                lambda file: {"rows": 6 * n_rows} | _our_score(file, "evolved + ported, merged"), is_slow=True,
            ),
        ),
    )  # fmt: skip


def train(inputs: LiveInputs) -> Contest:
    """Steps of LoRA fine-tuning beside TRL's trainer with PEFT: same rows, rank, rows of a step and learning rate."""
    theirs, ours = inputs.output("trl"), inputs.output("train")
    settings = {
        "rank": TRAIN.rank, "alpha": TRAIN.alpha, "learning_rate": TRAIN.learning_rate, "steps": STEPS,
        "batch_size": TRAIN.batch_size, "max_tokens": TRAIN.max_tokens, "seed": TRAIN.seed,
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", value)]
    warmup = {"warmup_steps": math.ceil(TRAIN.warmup * STEPS)}
    python = str(install("trl", inputs.folder) / "python")
    evolved = inputs.model("evolved")
    return Contest(
        f"train, rank {TRAIN.rank}, {TRAIN.batch_size} rows a step, {STEPS} steps",
        (
            Job(
                "trl", "TRL SFTTrainer with PEFT",
                _float32((
                    python, str(PEERS / "sft.py"), str(evolved), str(inputs.pairs), str(theirs),
                    json.dumps(settings | warmup),
                )),
                (evolved,), theirs, _trl_steps,
            ),
            Job(
                "train", "portllm train",
                _clocked(
                    ours / "events.json", "train", "--base", evolved, "--data", inputs.pairs, *options,
                    "--device", "cpu", "-o", ours / "patch",
                ),
                (evolved,), ours, _our_steps,
            ),
        ),
    )  # fmt: skip


def align(inputs: LiveInputs) -> Contest:
    """An aligned port beside one scoring pass of the old specialist on the same prompts, and beside its own imports."""
    theirs, ours = inputs.output("pass.json"), inputs.output("align")
    base, patch, evolved = inputs.base, inputs.model("patch"), inputs.model("evolved")
    return Contest(
        f"align, {inputs.count(inputs.prompts)} prompts",
        (
            _imports(),
            Job(
                "pass", "one scoring pass of the old specialist (transformers, PEFT)",
                _float32((sys.executable, *map(str, (PEERS / "scoring_pass.py", base, patch, inputs.prompts, theirs)))),
                (base, patch), theirs, _read,
            ),
            Job(
                "align", "portllm port --method align",
                _clocked(
                    ours / "events.json", "port", patch, "--base", base, "--evolved", evolved, "--method", "align",
                    "--text", inputs.prompts, "--prompt", "{prompt}", "--batch-size", BATCH, "--device", "cpu",
                    "-o", ours / "patch",
                ),
                (base, patch, evolved), ours, partial(_refit, inputs.base, inputs.prompts), is_slow=True,
                good=(0, VERDICT_IS_NO),
            ),
        ),
    )  # fmt: skip


def align_wide(inputs: LiveInputs) -> Contest:
    """An aligned port through layers as wide as those of a model of 7 B."""
    base, evolved, patch = (inputs.wide(name) for name in ("base", "evolved", "patch"))
    prompts, ours = inputs.wide("prompts.jsonl"), inputs.output("align-wide")
    return Contest(
        f"align, {WIDE.layers} layers of {WIDE.like}, {WIDE_PROMPTS} prompts",
        (
            _imports(),
            Job(
                "align", "portllm port --method align",
                _clocked(
                    ours / "events.json", "port", patch, "--base", base, "--evolved", evolved, "--method", "align",
                    "--text", prompts, "--prompt", "{prompt}", "--anchors", inputs.wide("anchors.txt"),
                    "--answer-tokens", 1, "--batch-size", BATCH, "--device", "cpu", "-o", ours / "patch",
                ),
                (base, patch, evolved), ours, partial(_refit, base, prompts), is_slow=True, good=(0, VERDICT_IS_NO),
            ),
        ),
    )  # fmt: skip


def _imports() -> Job:
    modules = "transformers, peft, portllm.cli.main, portllm.porting.domain, transformers.models.llama.modeling_llama"
    return Job("imports", "what align imports", _float32((sys.executable, "-c", f"import {modules}")), ())


def certify(inputs: LiveInputs) -> Contest:
    """A certificate: the old and the new specialist answer the same inputs."""
    out, rows = inputs.output("certificate"), inputs.rows(LABELS)
    command = _portllm(
        "certify", "--base", inputs.base, *_given(inputs, "patch", "evolved", "ported"), "--data", rows,
        "--device", "cpu", "-o", out,
    )  # fmt: skip
    reads = (inputs.base, *(inputs.model(name) for name in ("patch", "evolved", "ported")))
    job = Job("certify", "portllm certify", _float32(command), reads, out, lambda _: {"rows": inputs.count(rows)})
    return Contest("certify", (job,))


def check(inputs: LiveInputs) -> Contest:
    """A check that runs both models on prompts."""
    rows, patch, evolved = inputs.prompts, inputs.model("patch"), inputs.model("evolved")
    command = _portllm(
        "check", patch, "--base", inputs.base, "--evolved", evolved, "--text", rows, "--prompt", "{prompt}",
        "--device", "cpu",
    )  # fmt: skip
    job = Job(
        "check", "portllm check --text", _float32(command), (inputs.base, patch, evolved), inputs.folder / OUTPUTS,
        lambda _: {"rows": inputs.count(rows)}, good=(0, VERDICT_IS_NO),
    )  # fmt: skip
    return Contest("check --text", (job,))


def text(inputs: LiveInputs) -> Contest:
    """Free text on four models, as a new user tries it."""
    models = (*_given(inputs, "patch", "evolved", "ported"), "--data", inputs.rows(WRITTEN), "--limit", FEW)
    command = _portllm("evaluate", "--base", inputs.base, *models, "--judge", "text", "--device", "cpu")
    reads = (inputs.base, *(inputs.model(name) for name in ("patch", "evolved", "ported")))
    job = Job(
        "evaluate", "portllm evaluate --judge text", _float32(command), reads, inputs.folder / OUTPUTS,
        lambda _: {"rows": 4 * FEW},
    )  # fmt: skip
    return Contest(f"free text, {FEW} rows on four models", (job,))


CONTESTS: Mapping[str, Callable[[LiveInputs], Contest]] = {
    **{f"evaluate-{task}": partial(evaluate, task=task) for task in TASKS},
    "train": train,
    "align": align,
    "align-wide": align_wide,
    "certify": certify,
    "check-text": check,
    "text": text,
}


def _harness(inputs: LiveInputs, task: str, out: str, model: str, adapter: str | None) -> tuple[str, ...]:
    folder = inputs.base if model == "base" else inputs.model(model)
    asked = {"pretrained": folder, "dtype": "float32"} | ({"peft": inputs.model(adapter)} if adapter else {})
    return (
        "env", f"HF_DATASETS_CACHE={inputs.output('datasets')}",
        sys.executable, "-m", "lm_eval", "run", "--model", "hf",
        "--model_args", ",".join(f"{name}={value}" for name, value in asked.items()),
        "--tasks", task, "--include_path", str(inputs.task(task).parent), "--device", "cpu",
        "--batch_size", str(BATCH), "--output_path", str(inputs.output(out)),
    )  # fmt: skip


def _harness_score(folder: Path, task: str) -> Facts:
    (file,) = folder.rglob("results_*.json")
    found = json.loads(file.read_text())["results"][task]
    return {"score": round(found["exact_match,line" if task == WRITTEN else "acc,none"], 6)}


def _our_score(file: Path, name: str) -> Facts:
    rows = json.loads(file.read_text())["rows"]
    (score,) = (row["score"]["value"] for row in rows if row["name"] == name)
    return {"score": round(score, 6)}


def _trl_steps(folder: Path) -> Facts:
    report = _read(folder / "report.json")
    return {"step_seconds": statistics.median(report["step_seconds"]), "n_trained": report["n_trained"]}


def _our_steps(folder: Path) -> Facts:
    ends = [event[-1] for event in _read(folder / "events.json") if event[0].startswith("train") and event[1] > 0]
    return {"step_seconds": statistics.median(after - before for before, after in pairwise(ends))}


def _refit(base: Path, prompts: Path, folder: Path) -> Facts:
    """Seconds of the walk through all layers; bytes of one layer of each model and of the states of all rows."""
    events = _read(folder / "events.json")
    walked = [place for place, event in enumerate(events) if event[0].startswith("align")]
    cpu, wall = (events[walked[-1]][place] - events[walked[0] - 1][place] for place in (-2, -1))
    return {"pass_seconds": wall, "pass_cpu_seconds": cpu, "least_bytes": least_bytes(base, prompts)}


def least_bytes(base: Path, prompts: Path) -> int:
    """One layer of each of the two models, and a state of each for every token of every prompt, in float32."""
    from portllm.checkpoint.open import open_checkpoint
    from portllm.running.model import load_tokenizer

    model = open_checkpoint(str(base))
    tokenizer = load_tokenizer(base)
    layer = sum(math.prod(info.shape) for name, info in model.infos.items() if ".layers.0." in name)
    width = _read(base / "config.json")["hidden_size"]
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    n_tokens = sum(len(tokenizer(text)["input_ids"]) for text in texts)
    return 4 * 2 * (layer + n_tokens * width)


def _given(inputs: LiveInputs, *names: str) -> list[object]:
    return [part for name in names for part in (f"--{name}", inputs.model(name))]


def _clocked(report: Path, *arguments: object) -> tuple[str, ...]:
    return _float32((sys.executable, str(HERE / "clocked.py"), str(report), *map(str, arguments)))


def _portllm(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "portllm", *map(str, arguments))


def _float32(command: tuple[str, ...]) -> tuple[str, ...]:
    return ("env", *(f"{name}={value}" for name, value in FLOAT32.items()), *command)


def _read(file: Path) -> Facts:
    found: Facts = json.loads(file.read_text())
    return found
