"""Write the pages of docs/ that come from the code: commands, families, adapters, forecast, an example of a patch.

    python -m scripts.gen_docs            write them
    python -m scripts.gen_docs --check    exit with 1 if a page is stale

The text depends on the code alone: fixed width, no color, nothing from the machine.
"""

import argparse
import contextlib
import json
import re
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import typer
from safetensors.numpy import save_file

from portllm.cli.main import app
from scripts.align_table import by_patch, by_prompts, free_text, means, other_family, two_seeds

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
WIDTH = 100
EXAMPLE_START = "<!-- example: written by scripts/gen_docs.py -->"
EXAMPLE_END = "<!-- end of example -->"
MEASURED = ROOT / "studies" / "results" / "runtimes.json"
MEASURED_START = "<!-- measured: written by scripts/gen_docs.py -->"
RUNTIMES_START = "<!-- runtimes: written by scripts/gen_docs.py -->"
RUNTIMES_END = "<!-- end of runtimes -->"
MEASURED_END = "<!-- end of measured -->"


def find_program() -> Any:
    """The command line as a Typer command, with every subcommand registered."""
    return typer.main.get_command(app)


def open_context(command: Any, name: str, parent: Any = None) -> Any:
    """A context that renders a command's help at a fixed width."""
    widths = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    return command.make_context(name, [], parent=parent, resilient_parsing=True, **widths)


def render_help(context: Any) -> str:
    """The output of `--help`."""
    return "\n".join(line.rstrip() for line in context.get_help().strip().splitlines())


def render_commands() -> str:
    """The page `commands.md`."""
    program = find_program()
    context = open_context(program, "portllm")
    parts = [
        "# Commands",
        "Written by `scripts/gen_docs.py` from the program; change the program, not this page.",
        paragraph(
            "Results go to stdout, progress and messages to stderr. The exit status is 0 for success; 1 if the "
            "command was refused or failed, with a message that names the tensor or file at fault and how to fix it; "
            "2 for wrong usage; 3 if it ran and the verdict is no."
        ),
        fence(render_help(context)),
    ]
    for name in program.list_commands(context):
        command = program.commands[name]
        inner = open_context(command, name, context)
        parts += [f"## portllm {name}", fence(render_help(inner))]
        for part, below in getattr(command, "commands", {}).items():
            parts += [f"### portllm {name} {part}", fence(render_help(open_context(below, part, inner)))]
    return "\n\n".join(parts) + "\n"


def write_example_models(folder: Path) -> None:
    """Write two versions of a one-module model, and an adapter of the first, with fixed numbers."""
    module = "model.layers.0.mlp.down_proj"
    for name, shift in (("base", 0.0), ("evolved", 0.125)):
        (folder / name).mkdir()
        weight = (np.arange(12 * 20, dtype=np.float32).reshape(12, 20) - 120) / 128 + np.float32(shift)
        save_file({f"{module}.weight": weight}, folder / name / "model.safetensors")
        (folder / name / "config.json").write_text('{"model_type": "llama", "tie_word_embeddings": false}\n')
    (folder / "adapter").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["down_proj"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    factors = {
        f"base_model.model.{module}.lora_A.weight": np.arange(2 * 20, dtype=np.float32).reshape(2, 20) / 64,
        f"base_model.model.{module}.lora_B.weight": np.arange(12 * 2, dtype=np.float32).reshape(12, 2) / 32,
    }
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")


def render_example() -> str:
    """The files of a captured and ported patch, as the program writes them."""
    import portllm

    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name):
        write_example_models(Path())
        patch = portllm.capture("adapter", base="base", out="patch")
        portllm.port(patch, base="base", evolved="evolved", out="ported")
        files = {
            file: Path("ported", file).read_text(encoding="utf-8") for file in ("adapter_config.json", "patch.json")
        }
    return "\n\n".join(f"`{file}`\n\n{fence(text.strip(), kind='json')}" for file, text in files.items())


def render_patch_format() -> str:
    """The page `patch-format.md`, with a fresh example."""
    return filled("patch-format.md", EXAMPLE_START, EXAMPLE_END, render_example())


def filled(name: str, start: str, end: str, text: str) -> str:
    """A page with the text between two marks replaced."""
    page = (DOCS / name).read_text(encoding="utf-8")
    return f"{page[: page.index(start) + len(start)]}\n\n{text}\n\n{page[page.index(end) :]}"


def render_forecast() -> str:
    """The page `forecast.md`, with the numbers of the forecast that ships with the program."""
    from portllm.checking.forecast import FILE

    values = json.loads((ROOT / "src" / "portllm" / "checking" / FILE).read_text(encoding="utf-8"))
    lost = values["lost_from"]
    is_fitted = any(of_target["forecasters"] for of_target in values["targets"].values())
    parts = [
        *(() if is_fitted else ("**There are too few measured updates for a fit: `check` shows no forecast yet.**",)),
        paragraph(
            f"{values['n_cells']} cells from {values['n_updates']} updates of {values['base']}. Cells in which "
            "retraining gains nothing beyond noise are left out."
        ),
        table(
            ("retention by", "forecast from", "cells", "Spearman", "95 % interval", "mean error", "coverage", "width"),
            [
                (
                    target,
                    name,
                    str(of_target["cells"]),
                    digits(found["spearman"]["value"]),
                    f"{digits(found['spearman']['low'])} to {digits(found['spearman']['high'])}",
                    digits(found["mean_miss"]),
                    f"{100 * found['coverage']:.0f} %",
                    digits(found["width"]),
                )
                for target, of_target in values["targets"].items()
                for name, found in of_target["held_out"].items()
            ],
        ),
        "*Coverage* is the share of cells inside their predicted interval; *width* is the mean width of the intervals.",
        paragraph(
            "The next table shows the cost of deciding by a rule whether to port or to retrain: the accuracy lost "
            "against the better of the two, in points, as a mean over all cells and over those of the worst update; "
            "and the share of patches that the rule retrains, and retrains needlessly because the port was as good "
            "within two points. The forecasts port from 90 % on."
        ),
        table(
            ("rule", "points lost", "on the worst update", "retrained", "needlessly"),
            [
                (
                    name,
                    f"{found['points']:.2f}",
                    f"{found['worst']:.1f}",
                    f"{100 * found['trained']:.0f} %",
                    f"{100 * found['needlessly']:.0f} %",
                )
                for name, found in values["rules"].items()
            ],
        ),
        paragraph(
            "The last table shows what happened to the patches, by the verdict of `check` before the port, prompts "
            "included. Points are accuracy points, ported minus retrained. A patch is *lost* if the whole interval of "
            "this difference is more than two points below zero and the patch is also behind the old specialist. A "
            "difference from the retrained patch alone may be luck in training, which amounts to up to 9 points here "
            "at hardly any drift. All patches were ported by addition, and `check` knew no *holds aligned* yet: such a "
            "patch counts as uncertain here."
        ),
        table(
            ("verdict", "cells", "retention, min", "mean", "max", "points, mean", "min", "lost"),
            [
                (
                    verdict,
                    str(found["cells"]),
                    *(digits(found[name]) for name in ("least", "mean", "most")),
                    *(f"{found[name]:+.1f}" for name in ("behind", "farthest_behind")),
                    str(found["lost"]),
                )
                for verdict, found in values["verdicts"].items()
            ],
        ),
        f"The smallest drift at which a patch was lost: {'none was' if lost is None else f'{100 * lost:.3g} %'}.",
        *(
            render_slopes(f"{target} from {name}", found)
            for target, of_target in values["targets"].items()
            for name, found in of_target["forecasters"].items()
        ),
    ]
    return filled("forecast.md", MEASURED_START, MEASURED_END, "\n\n".join(parts))


def render_slopes(name: str, forecaster: Any) -> str:
    """The coefficients of one forecast."""
    rows = [
        (
            f"`{slope['feature']['name']}`" + (", logarithm" if slope["feature"]["is_log"] else ""),
            "+" if slope["feature"]["sign"] > 0 else "-",
            digits(slope["weight"]),
            f"{slope['low']:.3g} to {slope['high']:.3g}",
        )
        for slope in forecaster["slopes"]
    ]
    return f"Slopes of the forecast of retention by {name}, per standard deviation:\n\n" + table(
        ("measure", "sign", "slope", "measured range"), rows
    )


def render_align() -> str:
    """The page `methods/align.md`, with what its study measured on average."""
    return filled("methods/align.md", MEASURED_START, MEASURED_END, table(*means()))


def render_align_measured() -> str:
    """The page `align-measured.md`, with what the studies of the method measured."""
    parts = (
        table(*by_patch("align-smollm2")),
        "Patches of two seeds, by addition and align; means of both, intervals over rows:",
        table(*two_seeds()),
        "Patches of rank 16 of `q_proj` and `v_proj` alone, which PEFT trains where no modules are named:",
        table(*by_patch("align-targets-smollm2")),
        "Written solutions (GSM8K): 256 prompts, whose answers are read for 32 tokens; then 60 other rows, whose "
        "answers are alike if the first 24 tokens are those of base + patch; the loss of the right solutions in nats "
        "per token, and the words that were written.",
        table(*free_text("align-text-smollm2")),
        "Answers to instructions (Dolly, those of at most 80 words), likewise, with 48 tokens:",
        table(*free_text("align-answers-smollm2")),
        "By the number of prompts, after MedQuAD (1.06 %): the first so many of the same rows. The divergence of drawn "
        "prompts is measured on others that were drawn.",
        table(*by_prompts()),
    )
    return filled("align-measured.md", MEASURED_START, MEASURED_END, "\n\n".join(parts))


def render_transport() -> str:
    """The page `methods/transport.md`, with what an experiment measured."""
    return filled("methods/transport.md", MEASURED_START, MEASURED_END, table(*other_family()))


def render_serve() -> str:
    """The page `how-to/serve.md`, with the runtimes that a patch can be exported for."""
    from portllm.serving.runtime import Form, runtimes

    forms = {
        Form.PEFT: "the patch as it is",
        Form.LORA: "plain adapter folder",
        Form.FILE: "plain, one safetensors file",
        Form.MLX: "plain, in mlx-lm's layout",
        Form.GGUF_LORA: "plain, a GGUF adapter",
        Form.GGUF_MODEL: "merged GGUF file",
    }
    rows = [
        (
            f"`{name}`",
            runtime.title,
            forms[runtime.form],
            runtime.swap,
            known_from(name, runtime.version),
        )
        for name, runtime in runtimes().items()
    ]
    text = table(("`--for`", "runtime", "form", "a ported patch for the old one", "known from"), rows)
    return filled("how-to/serve.md", RUNTIMES_START, RUNTIMES_END, text)


def known_from(name: str, read: str) -> str:
    """What is known of a runtime: what was measured in it, or that its source was read."""
    rows = [row for row in json.loads(MEASURED.read_text(encoding="utf-8")) if row["profile"] == name]
    if not rows:
        return f"read only: source of {read}"
    right = [row for row in rows if not row["is_broken"]]
    broken = [row for row in rows if row["is_broken"]]
    proven = sum(row["verdict"] == "proven" for row in right)
    caught = sum(row["verdict"] != "proven" for row in broken)
    return (
        f"run on {max(row['date'] for row in rows)}, {right[0]['version']}: {proven} of {len(right)} kinds of adapters "
        f"proven, off by at most {max(row['error'] for row in right):.2g} nats (bare base {right[0]['noise']:.2g}); "
        f"{caught} of {len(broken)} broken exports caught"
    )


def table(head: tuple[str, ...], rows: Any) -> str:
    """A Markdown table."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def digits(value: float | None) -> str:
    """A number with two decimals; empty for None."""
    return "" if value is None else f"{value:.2f}"


def render_families() -> str:
    """The page `families.md`, from what the sweep over all model types has found."""
    found = json.loads((ROOT / "tests" / "model_types.json").read_text(encoding="utf-8"))
    rows = [(model_type, name, cells) for model_type, classes in found.items() for name, cells in classes.items()]
    run = [(model_type, name, cells) for model_type, name, cells in rows if "model" not in cells]
    kinds = [*dict.fromkeys(kind for *_, cells in run for kind in cells)]
    marks = {"right": "yes", "none": ""}
    table_rows = [
        (
            f"`{model_type}`",
            f"`{name}`",
            *(marks.get(cell := cells.get(kind, "none"), cell.partition(":")[0]) for kind in kinds),
        )
        for model_type, name, cells in run
    ]
    reasons = [
        f"- `{name}`, {kind}: {cell}" for _, name, cells in run for kind, cell in cells.items() if cell not in marks
    ]
    parts = [
        "# Families of models",
        "Written by `scripts/gen_docs.py` from `tests/model_types.json`, which a sweep over all model types writes.",
        paragraph(
            "What is known of a model type comes from transformers itself: `scripts/gen_model_types.py` builds every "
            "class that transformers loads a type into, without memory, and writes down how it names, ties and lays "
            "out its tensors. The *current* name of a tensor is its name in the model that transformers 5 builds; "
            "PEFT's keys derive from it. A file or an adapter may use another spelling. PortLLM reads the spellings "
            "that transformers reads, on either side, and writes a model in the spelling it was read in, a patch in "
            "the names by which PEFT finds its modules. A name that could mean two tensors is refused."
        ),
        paragraph(
            "A model of vision and text may be loaded as a text model too, and an adapter may have been trained on "
            "either: it is matched by the names of the class that it was trained with. What that class does not "
            "load, such as layers for multi-token prediction, is not asked of the adapter."
        ),
        paragraph(
            "Experts may be stored one per tensor or all in one tensor. An adapter of all experts at once (PEFT's "
            "`target_parameters`) can be merged into either: in float32 the merged bytes are PEFT's; in 16 bits PEFT "
            "rounds the delta and then the sum, while PortLLM rounds the float32 sum once. Adapters of single "
            "experts, from transformers 4, fit experts that are stored one per tensor. A patch captured from two "
            "models holds one delta for all experts of a layer, however either model stores them."
        ),
        paragraph(
            "A model type that is not in the table is asked of the transformers installed, where there is one. Where "
            "neither knows it, plain linear modules are served by the names they are stored under, and whatever "
            "touches embedding, head or experts is refused."
        ),
        "## What was run",
        paragraph(
            f"Tiny models of {len(run)} classes, each with an adapter of every kind, as PEFT saves it. *yes*: the "
            "merged model, reloaded by transformers, has the logits that PEFT computes with the adapter unmerged; a "
            "captured patch, loaded by PEFT on the base, has those of the model it was captured from. *refused*: "
            "PortLLM writes nothing and says why. *PEFT*: PEFT or transformers cannot make or run such an adapter. "
            "Empty: the model has no such part, or it was not tried."
        ),
        table(("model type", "class", *kinds), table_rows),
        "## Refused, or not to be had from PEFT",
        "\n".join(reasons),
        "## Not run",
        "The classes that could not be made tiny, or not be run on text alone:",
        "\n".join(f"- `{name}`: {cells['model']}" for _, name, cells in rows if "model" in cells),
    ]
    return "\n\n".join(parts) + "\n"


def render_api() -> str:
    """The page `api.md`: a heading for each group of public names, and a mark for each name that the site replaces."""
    stub = (ROOT / "src" / "portllm" / "__init__.pyi").read_text(encoding="utf-8")
    parts = [
        "# Python API",
        paragraph(
            "Written by `scripts/gen_docs.py` from `portllm/__init__.pyi`. The site that `make site` builds shows what "
            "the docstring of each name says; so does `help(portllm.NAME)`. [The library](library.md) introduces them."
        ),
    ]
    for line in stub.splitlines():
        if line.startswith("# ") and line.endswith(".") and ":" not in line:
            parts.append(f"## {line[2:-1]}")
        parts += [f"::: portllm.{name}" for name in re.findall(r" as (\w+)", line) if name != "errors"]
    return "\n\n".join(parts) + "\n"


def render_adapters() -> str:
    """The page `adapters.md`, from the rows that the tests go through."""
    sys.path.insert(0, str(ROOT))  # the table is the tests'
    from tests.adapter_matrix import (
        CONVERSION,
        CONVERTED,
        INTRODUCTION,
        LAYOUT_NOTE,
        LAYOUTS,
        MATRIX,
        NOTES,
        ORACLES,
        REFUSED,
    )

    kinds = ["| adapter | model | merged | ported |", "| --- | --- | --- | --- |"]
    kinds += [f"| {row.says} | {row.on} | {row.merge} | {row.port} |" for row in MATRIX.values()]
    starts = ["| `init_lora_weights` | converted |", "| --- | --- |"]
    starts += [
        f"| {row.says} | {'with or without' if row.is_computed else 'with'} `--initial` |" for row in CONVERTED.values()
    ]
    refused = ["| adapter | why |", "| --- | --- |", *(f"| {what} | {why} |" for what, (_, why) in REFUSED.items())]
    meanings = [f"- **{name}**: {meaning}." for name, meaning in ORACLES.items()]
    parts = ["# Adapters", INTRODUCTION, "\n".join(kinds), "How merged weights are tested:", "\n".join(meanings)]
    layouts = ["| keys | |", "| --- | --- |"]
    layouts += [f"| {layout.says} | {'refused' if layout.why else 'read'} |" for layout in LAYOUTS.values()]
    parts += [NOTES, "## Converted", CONVERSION, "\n".join(starts)]
    parts += ["## Other layouts", LAYOUT_NOTE, "\n".join(layouts), "## Refused", "\n".join(refused)]
    return "\n\n".join(parts) + "\n"


def listed(names: Any) -> str:
    """Names as code, separated by commas."""
    return ", ".join(f"`{name}`" for name in names)


def paragraph(text: str) -> str:
    """A text in lines of at most 120 characters."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def fence(text: str, *, kind: str = "text") -> str:
    """A fenced block of text."""
    return f"```{kind}\n{text}\n```"


PAGES = {
    "adapters.md": render_adapters,
    "api.md": render_api,
    "commands.md": render_commands,
    "families.md": render_families,
    "forecast.md": render_forecast,
    "how-to/serve.md": render_serve,
    "methods/align.md": render_align,
    "align-measured.md": render_align_measured,
    "methods/transport.md": render_transport,
    "patch-format.md": render_patch_format,
}


def main() -> int:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Write the generated pages of docs/, or check them.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a page is stale")
    check = parser.parse_args().check
    stale = []
    for name, render in PAGES.items():
        page, text = DOCS / name, render()
        if page.exists() and page.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            page.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"stale: {', '.join(stale)}; run: python -m scripts.gen_docs", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
