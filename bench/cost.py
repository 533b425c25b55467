"""What porting costs beside fine-tuning again, on the same model, data and machine: memory, time, trained parameters.

    python -m bench.cost [--runs 5] [--train-runs 3]

Each job is a process of its own, started as a user would start it; wall time and peak memory include the interpreter
and its imports. Fine-tuning is the demo's: SmolLM2-135M, LoRA on all seven linear layers, the rows and steps that made
the patch. Page cache warm. Writes `results/cost.json`, with the machine described, and the table `results/cost.md`.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.measure import Run, machine, measure, summarize
from portllm import load_patch
from portllm.demo.settings import COMPLETION, PROMPT, TRAIN
from portllm.demo.story import BASE, DATA, TRAINING_ROWS, tell
from portllm.kept import versions

HERE = Path(__file__).parent
WORK = HERE / "work"
PORTLLM = (sys.executable, "-m", "portllm")
PEFT_MERGE = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
model.merge_and_unload().save_pretrained(out)
"""


PAGE = """# What porting costs

{base} on {processor}, {cores} cores, no GPU. Medians over runs ({counts}), each a process
of its own with its imports, page cache warm; written by `make bench`. Fine-tuning again is the demo's: LoRA of rank
{rank} on all seven linear layers, batches of {batch_size} short rows. Ratios are to fine-tuning and use private memory;
memory is the peak. Load of the machine when it began: {load:.1f}.

{table}

Importing torch takes about 150 MB of private memory by itself: on a model as small as this one that is most of what a
merge needs. Fine-tuning's share grows with the model, a merge's does not.

The paper reports, for Mistral-7B on SST-2, 350.61 GB against 28.71 GB (12.2 x) and 40.65 against 0.0083 GPU hours
(arXiv 2410.10870, table 6, quoted second-hand). Its baseline sums the memory of several GPUs; this one is a single
process at a batch size that a user of this machine would take.
"""


@dataclass(frozen=True)
class Job:
    """One way to have the patch on the evolved model.

    Attributes:
        name: Stands in the table.
        command: The process.
        output: What it writes; removed before each run.
        n_trained: Parameters that it trains.
    """

    name: str
    command: tuple[str, ...]
    output: Path
    n_trained: int


def jobs() -> list[Job]:
    """The jobs, on the files of a demo that is run first where it has not been."""
    tell(WORK, on_step=lambda step: print(f"{step.name}: {step.kept.seconds:.1f} s"))
    patch, evolved, ported = WORK / "patch", WORK / "evolved", WORK / "ported"
    train = ("train", "--base", evolved, "--data", DATA / TRAINING_ROWS, "--prompt", PROMPT, "--completion", COMPLETION)
    settings = {
        "rank": TRAIN.rank, "alpha": TRAIN.alpha, "learning-rate": TRAIN.learning_rate, "epochs": TRAIN.epochs,
        "steps": TRAIN.steps, "batch-size": TRAIN.batch_size, "max-tokens": TRAIN.max_tokens, "seed": TRAIN.seed,
    }  # fmt: skip
    options = [part for name, value in settings.items() if value is not None for part in (f"--{name}", value)]
    out = WORK / "out"
    n_trained = load_patch(patch).n_params
    return [
        Job("fine-tune again (LoRA)", _portllm(*train, *options, "--device", "cpu", "-o", out), out, n_trained),
        Job("port, stays an adapter", _portllm("port", patch, "--evolved", evolved, "-o", out), out, 0),
        Job("merge the ported patch", _portllm("merge", ported, "--into", evolved, "-o", out), out, 0),
        Job(
            "the same with PEFT's merge_and_unload",
            (sys.executable, "-c", PEFT_MERGE, str(evolved), str(ported), str(out)),
            out,
            0,
        ),
    ]


def render(results: Sequence[dict[str, object]], described: dict[str, object]) -> str:
    """The table as Markdown; ratios are to fine-tuning again, medians of the same session."""
    first = _medians(results[0])
    lines = [
        "| job | trained parameters | wall time | private memory | resident memory | less time | less memory |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        own = _medians(result)
        saved = ["", ""] if result is results[0] else [
            f"{first['seconds'] / own['seconds']:.0f} x", f"{first['private_bytes'] / own['private_bytes']:.1f} x"
        ]  # fmt: skip
        cells = [
            str(result["name"]),
            f"{result['n_trained']:,}",
            f"{own['seconds']:.2f} s",
            f"{own['private_bytes'] / 1e6:.0f} MB",
            f"{own['resident_bytes'] / 1e6:.0f} MB",
            *saved,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    counts = ", ".join(f"{result['name']} {len(_runs(result))}" for result in results)
    return PAGE.format(
        base=BASE,
        processor=described["processor"],
        cores=described["cores"],
        counts=counts,
        rank=TRAIN.rank,
        batch_size=TRAIN.batch_size,
        load=described["load_before"],
        table="\n".join(lines),
    )


def main() -> None:
    """Run every job and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="of the short jobs")
    parser.add_argument("--train-runs", type=int, default=3, help="of fine-tuning")
    options = parser.parse_args()
    described = {**machine(HERE), "versions": dict(versions())}
    results = []
    for job in jobs():
        runs = options.train_runs if job.n_trained else options.runs
        measured = [_run(job) for _ in range(runs)]
        results.append({"name": job.name, "n_trained": job.n_trained, **summarize(measured)})
        print(f"{job.name}: {_medians(results[-1])}")
    folder = HERE / "results"
    folder.mkdir(exist_ok=True)
    content = {"machine": described, "model": BASE, "cache": "warm", "jobs": results}
    (folder / "cost.json").write_text(json.dumps(content, indent=2) + "\n")
    (folder / "cost.md").write_text(render(results, described))
    print(render(results, described))


def _run(job: Job) -> Run:
    shutil.rmtree(job.output, ignore_errors=True)
    return measure(job.command)


def _portllm(*arguments: object) -> tuple[str, ...]:
    return (*PORTLLM, *map(str, arguments))


def _medians(result: dict[str, object]) -> dict[str, float]:
    medians = result["median"]
    return medians if isinstance(medians, dict) else {}


def _runs(result: dict[str, object]) -> list[object]:
    runs = result["runs"]
    return runs if isinstance(runs, list) else []


if __name__ == "__main__":
    main()
