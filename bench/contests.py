"""What is measured side by side: each contest is a few jobs that take turns, ours and those of others."""

import json
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.inputs import Inputs
from bench.peers.environment import install

PEERS = Path(__file__).parent / "peers"
RANK = 16
CHECKED = 100
FLEET = 200
VERDICT_IS_NO = 3

Facts = Mapping[str, Any]
"""JSON values."""


@dataclass(frozen=True)
class Job:
    """One command, and what is to be done around it.

    Attributes:
        name: Unique in its contest.
        label: For the page.
        command: The process.
        reads: Folders that are brought into the page cache, or out of it, before each run.
        output: What it writes.
        facts: What is found out about the output of a run, untimed; that of the last counts.
        is_slow: Takes minutes: fewer runs are made.
        good: Exit statuses of a run that did its work.
        memory: A device, `cpu` or `cuda`, and the bytes that must be free in its memory.
    """

    name: str
    label: str
    command: tuple[str, ...]
    reads: tuple[Path, ...]
    output: Path | None = None
    facts: Callable[[Path], Facts] | None = None
    is_slow: bool = False
    good: tuple[int, ...] = (0,)
    memory: tuple[str, int] = ("cpu", 0)

    @property
    def is_ours(self) -> bool:
        """Whether it is this program that is measured."""
        return self.label.startswith("portllm")


@dataclass(frozen=True)
class Contest:
    """Jobs that take turns.

    Attributes:
        title: For the page.
        jobs: In the order of the page.
        is_cold: What they read is dropped from the page cache before each run; else it is read into it.
    """

    title: str
    jobs: tuple[Job, ...]
    is_cold: bool = False


IMPORTS = Job(
    "imports",
    "portllm check, imported",
    (sys.executable, "-c", "import portllm.cli.main, portllm.cli.check, portllm.checking.check, portllm.checking.text"),
    (),
)
"""What `check` needs before it looks at a patch."""


def copy(inputs: Inputs, *, is_cold: bool = False) -> Contest:
    """A merge beside the fewest bytes that it could move: a copy of the model, brought to the disk."""
    source, target = shlex.quote(str(inputs.base)), shlex.quote(str(inputs.output("copy")))
    shell = f"cp -r {source} {target} && sync {target}/*"
    return Contest(
        "merge beside a copy",
        (
            Job("cp", "cp -r, fsync", ("sh", "-c", shell), (inputs.base,), inputs.output("copy")),
            _merge(inputs),
        ),
        is_cold,
    )


def copy_cold(inputs: Inputs) -> Contest:
    """The same with nothing in the page cache."""
    return copy(inputs, is_cold=True)


def merge(inputs: Inputs) -> Contest:
    """A merge beside PEFT's, which must write the same tensors."""
    out = inputs.output("peft")
    command = (sys.executable, str(PEERS / "peft_merge.py"), str(inputs.base), str(inputs.adapter), str(out))
    peft = Job("peft", "PEFT merge_and_unload, save_pretrained", command, (inputs.base, inputs.adapter), out, _digest)
    return Contest("merge beside PEFT", (peft, _merge(inputs)))


def capture(inputs: Inputs) -> Contest:
    """An adapter of rank 16 out of two checkpoints, by randomised and by exact SVD."""
    ours, theirs = inputs.output("capture"), inputs.output("extract")
    reads = (inputs.base, inputs.tuned)

    def residual(adapter: Path) -> Facts:
        from bench.residual import relative_residual

        return {"residual": relative_residual(inputs.base, inputs.tuned, adapter)}

    extract = install("mergekit", inputs.folder.parents[1]) / "mergekit-extract-lora"
    models = ("--model", str(inputs.tuned), "--base-model", str(inputs.base))
    return Contest(
        "capture rank 16 beside mergekit",
        (
            Job(
                "extract", "mergekit-extract-lora",
                (str(extract), *models, "--out-path", str(theirs), "--max-rank", str(RANK), "--no-copy-tokenizer"),
                reads, theirs, residual, is_slow=True,
            ),
            Job(
                "capture", "portllm capture",
                _portllm("capture", "--base", inputs.base, "--tuned", inputs.tuned, "--rank", RANK, "-o", ours),
                reads, ours, residual,
            ),
        ),
    )  # fmt: skip


def weights(inputs: Inputs) -> Contest:
    """The tuned evolved model, whole: ours from the patch, mergekit's from three models."""
    ours, theirs = inputs.output("weights"), inputs.output("arithmetic")
    recipe = inputs.folder / "task_arithmetic.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\n"
        f"base_model: {inputs.base}\n"
        "models:\n"
        f"  - {{model: {inputs.evolved}, parameters: {{weight: 1.0}}}}\n"
        f"  - {{model: {inputs.tuned}, parameters: {{weight: 1.0}}}}\n"
        "dtype: bfloat16\n"
    )
    program = install("mergekit", inputs.folder.parents[1]) / "mergekit-yaml"
    port = _portllm("port", inputs.patch, "--evolved", inputs.evolved, "-o", ours / "patch")
    then = _portllm("merge", ours / "patch", "--into", inputs.evolved, "-o", ours / "model")
    return Contest(
        "port and merge beside mergekit",
        (
            Job(
                "arithmetic", "mergekit-yaml, task_arithmetic",
                (str(program), str(recipe), str(theirs), "--no-copy-tokenizer"),
                (inputs.base, inputs.evolved, inputs.tuned), theirs,
            ),
            Job(
                "port-and-merge", "portllm port, portllm merge",
                ("sh", "-c", f"{shlex.join(port)} && {shlex.join(then)}"),
                (inputs.patch, inputs.evolved), ours,
            ),
        ),
    )  # fmt: skip


def drift(inputs: Inputs, *, is_cold: bool = False) -> Contest:
    """A full report of the drift beside reading both models and doing nothing with them."""
    models = (inputs.base, inputs.evolved)
    files = " ".join(f"{shlex.quote(str(folder))}/*.safetensors" for folder in models)
    return Contest(
        "full drift report beside cat",
        (
            Job("cat", "cat of both models", ("sh", "-c", f"cat {files} > /dev/null"), models),
            IMPORTS,
            _check(inputs, "check", inputs.patch, is_full=True),
        ),
        is_cold,
    )


def drift_cold(inputs: Inputs) -> Contest:
    """The same with nothing in the page cache."""
    return drift(inputs, is_cold=True)


def port(inputs: Inputs) -> Contest:
    """The patch carried over: headers and samples, at any size."""
    out = inputs.output("port")
    command = _portllm("port", inputs.patch, "--evolved", inputs.evolved, "-o", out)
    return Contest("port", (Job("port", "portllm port", command, (inputs.patch, inputs.evolved), out),))


def check(inputs: Inputs) -> Contest:
    """A check from samples, and what importing the program takes of it."""
    return Contest("check from samples", (IMPORTS, _check(inputs, "check", inputs.patch)))


def check_many(inputs: Inputs, *, is_full: bool = True) -> Contest:
    """Many patches checked at once: what is read of the models is read once."""
    adapters = inputs.adapters(CHECKED)
    jobs = (
        _check(inputs, "check-1", adapters / "000", is_full=is_full),
        _check(inputs, "check-many", adapters, is_full=is_full),
    )
    return Contest(f"{CHECKED} patches checked beside one, {'full' if is_full else 'sampled'}", jobs)


def check_many_sampled(inputs: Inputs) -> Contest:
    """The same from samples."""
    return check_many(inputs, is_full=False)


def _check(inputs: Inputs, name: str, patches: Path, *, is_full: bool = False) -> Job:
    models = ("--base", inputs.base, "--evolved", inputs.evolved)
    label = f"portllm check{' --full' if is_full else ''}{f', {CHECKED} patches' if name == 'check-many' else ''}"
    command = _portllm("check", patches, *models, *(("--full",) if is_full else ()))
    return Job(name, label, command, (patches, inputs.base, inputs.evolved), good=(0, VERDICT_IS_NO))


def fleet(inputs: Inputs) -> Contest:
    """Many patches ported and merged on Ray, by one worker and by two; and the first of them, for the start of Ray."""
    adapters = inputs.adapters(FLEET)
    first = _fleet(inputs, "fleet-first", adapters / "000", workers=1)
    both = (_fleet(inputs, f"fleet-{workers}", adapters, workers=workers) for workers in (1, 2))
    return Contest(f"{FLEET} patches ported and merged on Ray", (first, *both))


def _fleet(inputs: Inputs, name: str, patches: Path, *, workers: int) -> Job:
    out, file = inputs.output(name), inputs.folder / f"{name}.toml"
    models = {"evolved": [str(inputs.evolved)], "base": str(inputs.base)}
    asked = {"patches": [str(patches)], **models, "do": ["port", "merge"]}
    file.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in {**asked, "output": str(out)}.items()))
    command = _portllm("fleet", file, "--ray", "local", "--workers", workers)
    label = (
        f"portllm fleet{', one patch' if patches.name == '000' else ''}, {workers} worker{'s' if workers > 1 else ''}"
    )
    return Job(name, label, command, (patches, inputs.base, inputs.evolved), out)


CONTESTS: Mapping[str, Callable[[Inputs], Contest]] = {
    "copy": copy,
    "copy-cold": copy_cold,
    "merge": merge,
    "capture": capture,
    "weights": weights,
    "drift": drift,
    "drift-cold": drift_cold,
    "port": port,
    "check": check,
    "check-100": check_many,
    "check-100-sampled": check_many_sampled,
    "fleet": fleet,
}


def _merge(inputs: Inputs) -> Job:
    out = inputs.output("merge")
    command = _portllm("merge", inputs.patch, "--into", inputs.base, "-o", out)
    return Job("merge", "portllm merge", command, (inputs.base, inputs.patch), out, _digest)


def _digest(folder: Path) -> Facts:
    """Of every byte that was written, read afresh: not what the program remembers of it."""
    from portllm.checkpoint.model.identity import digest_of, digest_tensor
    from portllm.checkpoint.open import open_checkpoint

    model = open_checkpoint(str(folder))
    return {"digest": digest_of({name: digest_tensor(info) for name, info in model.infos.items()}, model)}


def _portllm(*arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", "portllm", *map(str, arguments))
