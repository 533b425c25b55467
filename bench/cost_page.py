"""The page of what porting costs, `results/cost.md`, with a picture for each model. Pure but for the files."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.chart import draw
from bench.cost_jobs import BASELINE
from bench.page import describe_machine

SST2_ROWS = 67_349
"""Of SST-2's training split in GLUE."""

HEAD = """# What porting costs

Written by `python -m bench.cost`; change the program, not this page.

Each job is a process of its own, started as a user would start it, and measured from outside: wall time and memory
include the interpreter and its imports. Numbers are medians over the runs. What a job reads was read just before, and
is in the page cache as far as memory holds it. Private memory is what the kernel cannot take back, at its peak;
resident memory counts pages of mapped files too. CUDA memory is torch's own count of its peak: allocated to tensors,
and reserved from the device. Energy is what the machine's own meters counted while the job ran, idle draw included;
most virtual machines have none.

Ratios are to fine-tuning again on the same model and machine. That of memory is of resident memory on a CPU:
transformers maps a model's files, so that weights which are not trained are no private memory, but every step reads
all of them. Of a merge, resident memory holds the libraries too, which is to its disadvantage. On a GPU the ratio is of
private and reserved CUDA memory together.

Fine-tuning again is what one user would run: one process on one device, LoRA on all seven linear layers. Where its
steps are counted, the weights are random values of a real model's shapes, in bfloat16, with gradient checkpointing; the
first step is not timed, and an epoch of SST-2 is extrapolated from the others:

    seconds = ceil(67,349 / rows of a batch) x median seconds of a step

The paper reports, for Mistral-7B on SST-2, 350.61 GB against 28.71 GB (12.2 x) and 40.65 against 0.0083 GPU hours
(arXiv 2410.10870, table 6, quoted second-hand). Its baseline can only be a sum over several GPUs, of a batch size and
length of training that we do not know: these numbers here are no measurement of the same thing.
"""


def render(records: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from the record of each model."""
    return "\n".join([HEAD, *(line for record in records.values() for line in _model(record))])


def files(folder: Path) -> dict[str, str]:
    """The page and the pictures of all records that are in the folder, by file name; small models first."""
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("cost-*.json"))]
    records = {record["name"]: record for record in sorted(found, key=lambda record: record["n_params"])}
    pictures = {f"cost-{name}.svg": draw(_title(it), {"cost": it["contest"]}) for name, it in records.items()}
    return {"cost.md": render(records), **pictures} if records else {}


def write_page(folder: Path) -> None:
    """Write the page and the pictures anew."""
    for name, text in files(folder).items():
        (folder / name).write_text(text)


def epoch_seconds(record: Mapping[str, Any]) -> float | None:
    """What an epoch of SST-2 would take by the timed steps; None where none were timed."""
    job = record["contest"]["jobs"].get(BASELINE)
    if job is None or "step_seconds" not in job["facts"]:
        return None
    return math.ceil(SST2_ROWS / record["baseline"]["batch"]) * statistics.median(job["facts"]["step_seconds"])


def _title(record: Mapping[str, Any]) -> str:
    return f"{record['name']}: {record['like']}"


def _model(record: Mapping[str, Any]) -> Iterator[str]:
    contest, baseline = record["contest"], record["baseline"]
    yield f"## {_title(record)}\n"
    yield f"{record['n_params']:,} parameters. {_fine_tuning(record)}\n"
    yield (
        "| job | runs | trained parameters | wall time | private | resident | CUDA allocated | CUDA reserved | energy "
        "| less time | less memory |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    compared = contest["jobs"].get(BASELINE)
    for name, job in contest["jobs"].items():
        is_another_way = compared is not None and job["facts"].get("n_trained") == 0  # to have the patch on the model
        yield _row(job, _saved(record, compared, job) if is_another_way else ("", ""))
        if name == BASELINE and (epoch := epoch_seconds(record)):
            batches = math.ceil(SST2_ROWS / baseline["batch"])
            yield f"| an epoch of SST-2, extrapolated: {batches:,} steps | | | {_lasting(epoch)} | | | | | | | |"
    yield ""
    for line in record["skipped"]:
        yield f"Skipped: {line}.\n"
    yield f"![Bars of wall time and private memory](cost-{record['name']}.svg)\n"
    machine = contest["machine"]
    meters = f"; meters of energy: {', '.join(machine['meters']) or 'none'}" if "meters" in machine else ""
    yield f"{describe_machine(machine)}{meters}; load when it began {machine['load_before']:.1f}.\n"
    if "note" in record:
        yield f"{record['note']}\n"


def _fine_tuning(record: Mapping[str, Any]) -> str:
    it = record["baseline"]
    where = "on the GPU" if it["device"] == "cuda" else "on the CPU"
    if "steps" not in it:
        return f"Fine-tuning is the demo's, whole: rank {it['rank']}, batches of {it['batch']} short rows, {where}."
    job = record["contest"]["jobs"].get(BASELINE)
    times = f"; a step takes {statistics.median(job['facts']['step_seconds']):.2f} s" if job else ""
    return (
        f"Fine-tuning: rank {it['rank']}, {it['n_trained']:,} parameters, batches of {it['batch']} rows of "
        f"{it['tokens']} tokens, {where}, {it['steps']} steps after one to warm up{times}."
    )


def _row(job: Mapping[str, Any], saved: tuple[str, str]) -> str:
    middle, facts = job["median"], job["facts"]
    joules = middle.get("joules")
    cells = [
        job["label"],
        str(len(job["runs"])),
        f"{facts['n_trained']:,}" if "n_trained" in facts else "",
        _lasting(middle["seconds"]),
        _size(middle["private_bytes"]),
        _size(middle["resident_bytes"]),
        _size(facts.get("cuda_allocated_bytes")),
        _size(facts.get("cuda_reserved_bytes")),
        "not told" if joules is None else f"{joules:,.0f} J",
        *saved,
    ]
    return f"| {' | '.join(cells)} |"


def _saved(record: Mapping[str, Any], baseline: Mapping[str, Any], job: Mapping[str, Any]) -> tuple[str, str]:
    """How much less time and memory a job takes than fine-tuning: all of it, or an epoch where only steps were run."""
    seconds = epoch_seconds(record) or baseline["median"]["seconds"]
    memory = _memory(record, baseline) / _memory(record, job)
    return f"{seconds / job['median']['seconds']:,.0f} x", f"{memory:.1f} x"


def _memory(record: Mapping[str, Any], job: Mapping[str, Any]) -> float:
    """What counts of a job in the ratio; on a GPU, pages that were mapped while a model was loaded do not."""
    if record["baseline"]["device"] == "cuda":
        return job["median"]["private_bytes"] + (job["facts"].get("cuda_reserved_bytes") or 0)
    return job["median"]["resident_bytes"]


def _size(n_bytes: float | None) -> str:
    return "" if n_bytes is None else f"{n_bytes / 1e6:,.0f} MB"


def _lasting(seconds: float) -> str:
    """Example: 3.72 s, 4.1 min, 40.7 h."""
    if seconds < 120:
        return f"{seconds:.2f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
