"""The ways to have a patch on an evolved model, as jobs that take turns: fine-tuning again, porting, merging."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bench.contests import PEERS, Contest, Facts, Job
from bench.inputs import OUTPUTS, Inputs
from bench.shapes import Shape
from portllm import load_patch
from portllm.demo.settings import COMPLETION, PROMPT, TRAIN
from portllm.demo.story import DATA, TRAINING_ROWS, tell

TITLE = "what porting costs"
BASELINE = "lora"
"""The name of the job that the others are compared with."""

RUNNING_BYTES = 1_500_000_000
"""What a process with torch, transformers and peft takes beside weights and what grows with the batch, amply."""


@dataclass(frozen=True)
class Baseline:
    """How one process fine-tunes: LoRA on all seven linear layers with gradient checkpointing.

    Attributes:
        rank: Of the factors.
        batch: Rows of a step.
        tokens: Of a row.
        steps: That are timed, after one that is not.
        device: `cpu` or `cuda`.
    """

    rank: int = 8
    batch: int = 8
    tokens: int = 64
    steps: int = 3
    device: str = "cpu"

    def memory(self, shape: Shape) -> int:
        """Bytes that it takes, about.

        The base in bfloat16; factors, their gradients and two moments in float32; the inputs of each block; logits in
        bfloat16, in float32, and their gradients.
        """
        n_tokens = self.batch * self.tokens
        blocks, logits = 2 * n_tokens * shape.hidden * shape.layers, 12 * n_tokens * shape.vocabulary
        return 2 * shape.n_params + 16 * shape.n_factors(self.rank) + blocks + logits + RUNNING_BYTES


def on_shape(inputs: Inputs, baseline: Baseline) -> Contest:
    """The jobs on random weights of a shape.

    Only the evolved model stays on the disk; the base is removed as soon as the adapter has become a patch of it.
    """
    patch = inputs.patch
    shutil.rmtree(inputs.base)
    evolved, ported = inputs.evolved, inputs.folder / "ported"
    shutil.rmtree(ported, ignore_errors=True)
    subprocess.run(_portllm("port", patch, "--evolved", evolved, "-o", ported), check=True, stdout=subprocess.DEVNULL)
    train, load = inputs.output("train"), inputs.output("load")
    asked = {name: getattr(baseline, name) for name in ("rank", "batch", "tokens", "steps", "device")}
    options = [part for name, value in asked.items() for part in (f"--{name}", str(value))]
    model_memory = 2 * inputs.shape.n_params + RUNNING_BYTES
    return Contest(
        TITLE,
        (
            Job(
                BASELINE, f"fine-tune again (PEFT, LoRA): {1 + baseline.steps} steps",
                (sys.executable, str(PEERS / "lora_steps.py"), str(evolved), str(train), *options),
                (evolved,), train, _report, is_slow=True, memory=(baseline.device, baseline.memory(inputs.shape)),
            ),
            *_ours(inputs.folder / OUTPUTS, patch, ported, evolved),
            _peft(inputs.output("peft"), ported, evolved, model_memory),
            Job(
                "load", "load it and write a token (transformers)",
                (sys.executable, str(PEERS / "load_model.py"), str(evolved), str(load), baseline.device),
                (evolved,), load, _report, memory=(baseline.device, model_memory),
            ),
        ),
    )  # fmt: skip


def on_demo(work: Path) -> Contest:
    """The jobs on the demo's files, which are made where they are not; its fine-tuning is whole, not a few steps."""
    tell(work, on_step=lambda step: print(f"{step.name}: {step.kept.seconds:.1f} s", flush=True))
    patch, evolved, ported, out = work / "patch", work / "evolved", work / "ported", work / OUTPUTS
    settings = {
        "rank": TRAIN.rank, "alpha": TRAIN.alpha, "learning-rate": TRAIN.learning_rate, "epochs": TRAIN.epochs,
        "steps": TRAIN.steps, "batch-size": TRAIN.batch_size, "max-tokens": TRAIN.max_tokens, "seed": TRAIN.seed,
    }  # fmt: skip
    options = [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]
    data = ("--data", DATA / TRAINING_ROWS, "--prompt", PROMPT, "--completion", COMPLETION)
    train = _portllm("train", "--base", evolved, *data, *options, "--device", "cpu", "-o", out / "train")
    load = (sys.executable, str(PEERS / "load_model.py"), str(evolved), str(out / "load"), "cpu")

    def trained(folder: Path) -> Facts:
        return {"n_trained": load_patch(folder).n_params}

    return Contest(
        TITLE,
        (
            Job(BASELINE, "fine-tune again (LoRA)", train, (evolved,), out / "train", trained, is_slow=True),
            *_ours(out, patch, ported, evolved),
            _peft(out / "peft", ported, evolved, 0),
            Job("load", "load it and write a token (transformers)", load, (evolved,), out / "load", _report),
        ),
    )


def _ours(out: Path, patch: Path, ported: Path, evolved: Path) -> tuple[Job, Job]:
    port = _portllm("port", patch, "--evolved", evolved, "-o", out / "port")
    merge = _portllm("merge", ported, "--into", evolved, "-o", out / "merge")
    return (
        Job("port", "portllm port: stays an adapter", port, (patch, evolved), out / "port", _nothing_trained),
        Job("merge", "portllm merge of the ported patch", merge, (ported, evolved), out / "merge", _nothing_trained),
    )


def _peft(out: Path, ported: Path, evolved: Path, memory: int) -> Job:
    command = (sys.executable, str(PEERS / "peft_merge.py"), str(evolved), str(ported), str(out))
    reads = (ported, evolved)
    label = "the same with PEFT's merge_and_unload"
    return Job("peft", label, command, reads, out, _nothing_trained, memory=("cpu", memory))


def _report(folder: Path) -> Facts:
    facts: Facts = json.loads((folder / "report.json").read_text())
    return facts


def _nothing_trained(_: Path) -> Facts:
    return {"n_trained": 0}


def _portllm(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "portllm", *map(str, arguments))
