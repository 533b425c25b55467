"""The page of the recorded results, `results/speed.md`, with a picture for each shape. Pure but for the files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.chart import draw
from bench.rows import ROWS, Row, evaluate, show
from bench.shapes import SHAPES

HEAD = """# Speed and memory, beside the peers

Written by `python -m bench.speed --record`; change the program, not this page.

Each tool is a process of its own, started as a user would start it, and measured from outside: wall time and memory
include the interpreter and its imports. The tools of a comparison take turns; numbers are medians over the runs, with
their range. The ratio of a turn is that of its runs; where one tool has fewer, its median stands in. Private memory
is what the kernel cannot take back (RssAnon and RssShmem of the process and its children, sampled every 5 ms). Before
each run all that earlier ones wrote is brought to the disk. The first run of a tool is not counted, so that its
program is in the page cache, except where a run takes minutes. Cache warm: what a run reads was read just before;
cold: it was dropped with `posix_fadvise`, and the bytes from the disk show it. Ours and `cp` end with fsync; PEFT and
mergekit do not, which is to their advantage. Models are synthetic: real shapes, bf16, seeded values of the size of
trained ones; the patch has rank 16 on all seven linear layers, 0.3 to 0.5 % of the norm of each weight.
"""


def render(shapes: Mapping[str, Mapping[str, Any]]) -> str:
    """The page, from the contests of each shape."""
    return "\n".join([HEAD, *(line for name, contests in shapes.items() for line in _shape(name, contests))])


def files(folder: Path) -> dict[str, str]:
    """The page and the pictures of all results that are in the folder, by file name."""
    recorded = {name: folder / f"speed-{name}.json" for name in SHAPES}
    shapes = {name: json.loads(file.read_text())["contests"] for name, file in recorded.items() if file.exists()}
    pictures = {f"speed-{name}.svg": draw(f"{name}: {SHAPES[name].like}", shapes[name]) for name in shapes}
    return {"speed.md": render(shapes), **pictures} if shapes else {}


def write_page(folder: Path) -> None:
    """Write the page and the pictures anew."""
    for name, text in files(folder).items():
        (folder / name).write_text(text)


def table(rows: Sequence[Row], contests: Mapping[str, Any]) -> list[str]:
    """The rows that the contests give a value to, with their targets."""
    lines = ["| what | measured | range | must | aim | met |", "| --- | --- | --- | --- | --- | --- |"]
    for row in rows:
        if not row.is_measured(contests):
            continue
        value = evaluate(row, contests[row.contest])
        cells = [
            row.title,
            show(row, value.median),
            f"{show(row, value.low)} to {show(row, value.high)}" if value.low != value.high else "",
            _limit(row, row.must),
            _limit(row, row.aim),
            _met(row, value.median),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _limit(row: Row, limit: float | None) -> str:
    if limit is None:
        return ""
    return "yes" if row.how == "same" else f"{'≥' if row.larger_is_better else '≤'} {show(row, limit)}"


def _met(row: Row, value: float) -> str:
    if row.must is None:
        return ""
    return "aim" if row.meets(value, row.aim) else "must" if row.meets(value, row.must) else "**no**"


def describe_machine(it: Mapping[str, Any]) -> str:
    """What `bench.measure.machine` found, with the versions of programs, as text; an early record lacks some of it."""
    versions = ", ".join(f"{name} {version}" for name, version in it["versions"].items())
    parts = (
        f"{it['processor']}, {it['cores']} cores, {it['memory_bytes'] / 2**30:.0f} GiB",
        it.get("disk"),
        f"{it['system']} {it['kernel']}" if "kernel" in it else it["system"],
        f"Python {it['python']}, {versions}",
    )
    return ", ".join(part for part in parts if part)


def _shape(name: str, contests: Mapping[str, Any]) -> Iterator[str]:
    shape = SHAPES[name]
    yield f"## {name}: {shape.like}\n"
    yield f"{shape.n_params:,} parameters, {2 * shape.n_params / 1e9:.2f} GB.\n"
    yield from measured(ROWS, contests, picture=f"speed-{name}.svg")


def measured(rows: Sequence[Row], contests: Mapping[str, Any], *, picture: str) -> Iterator[str]:
    """The rows with a target, the picture, and all that was measured of each job."""
    yield from table(rows, contests)
    yield f"\n![Bars of wall time and private memory]({picture})\n"
    yield "| comparison | cache | tool | runs | wall | CPU | private | resident | from disk | to disk |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for result in contests.values():
        for job in result["jobs"].values():
            yield _job(result, job)
    yield ""
    for text, titles in _machines(contests).items():
        yield f"{', '.join(titles)}: {text}.\n"


def _job(result: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    middle, (low, high) = job["median"], job["range"]["seconds"]
    cells = [
        result["title"],
        result["cache"],
        job["label"],
        str(len(job["runs"])),
        f"{middle['seconds']:.2f} s ({low:.2f} to {high:.2f})",
        f"{middle['cpu_seconds']:.2f} s",
        *(f"{middle[part] / 1e6:,.0f} MB" for part in ("private_bytes", "resident_bytes")),
        *(f"{middle[part] / 1e6:,.0f} MB" for part in ("disk_read_bytes", "disk_written_bytes")),
    ]
    return f"| {' | '.join(cells)} |"


def _machines(contests: Mapping[str, Any]) -> dict[str, list[str]]:
    """The contests that each description of a machine belongs to; the load at the start is each contest's own."""
    found: dict[str, list[str]] = {}
    for result in contests.values():
        it = result["machine"]
        text = describe_machine(it)
        found.setdefault(text, []).append(f"{result['title']} ({result['cache']}, load {it['load_before']:.1f})")
    return found
