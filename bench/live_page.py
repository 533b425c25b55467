"""The page of programs that run models, `results/live.md`, with a picture. Pure but for the files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.chart import draw
from bench.live_rows import ROWS
from bench.page import measured

NAME = "live-smollm2"
TITLE = "SmolLM2-135M, the demo's models, patches and rows"

HEAD = """# Running models, beside what a user would pick instead

Written by `python -m bench.live --record`; change the program, not this page.

Each tool is a process of its own, measured from outside as on [the page of speed](speed.md): wall time and memory
include the interpreter, its imports and the loading of models. All compute in float32, as on a processor with AVX2 and
without instructions for bfloat16 or AVX-512, in batches of 16 rows, on the same rows.

- **evaluate**: the held-out passages of the demo. lm-evaluation-harness runs a task with the same prompts and labels;
  it reads one model at a time, and so is run once for each of six. `portllm evaluate` compares six in one run (base,
  base + patch, evolved, evolved + ported, the same merged, evolved + retrained); for one model, what is run is the pass
  that it makes over each. Where answers are written, both write up to 32 tokens or a line, always the likeliest token;
  ours also measures the loss of the right answer. Both must come to the same score.
- **train**: TRL's SFTTrainer with PEFT, on the same rows, rank, rows of a step, steps and learning rate; the loss
  counts completions; activations are kept. A step is the median of the time between the ends of two.
- **align**: one scoring pass is what a program with transformers and PEFT takes to give all prompts once to base and
  patch, in batches of similar length, without imports and loading. The refit is the walk through all layers, from
  embedded rows to the last layer's states: the old specialist on the prompts to fit on, the evolved model on general
  text, plain addition and a refit on both, with all regressions; all walks count, where the first refit is not chosen.
  The whole command also writes answers and general text with both models, compares candidates over the whole
  vocabulary, and writes the patch; the program that scores once is its process, from start to end. Least memory is one
  layer of each of both models and one state of each for every token of every prompt, in float32; what the process takes
  is counted beyond one that only imports the same libraries. In a small model the activations of a batch and what the
  allocator holds weigh more than two layers. The contest `align-wide` measures layers as wide as a large one's, with
  weights of noise, general text from a file, and answers of one token.
"""


def files(folder: Path) -> dict[str, str]:
    """The page and the picture of what is recorded in the folder, by file name."""
    recorded = folder / f"{NAME}.json"
    if not recorded.exists():
        return {}
    contests: Mapping[str, Any] = json.loads(recorded.read_text())["contests"]
    lines = [HEAD, *measured(ROWS, contests, picture=f"{NAME}.svg")]
    return {"live.md": "\n".join(lines), f"{NAME}.svg": draw(TITLE, contests)}


def write_page(folder: Path) -> None:
    """Write the page and the picture anew."""
    for name, text in files(folder).items():
        (folder / name).write_text(text)
