"""The command `demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli.options import JsonOption, QuietOption
from portllm.cli.terminal import print_json, say


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the demo's files.")] = Path("portllm-demo"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Run the whole story on a small real model.

    Takes minutes on a CPU, offline. A second run reuses finished steps.
    """
    from portllm.cli.progress import shown_progress
    from portllm.demo.story import DemoStep, tell
    from portllm.demo.text import render_estimate, render_opening, render_step, render_story, story_to_json

    def on_step(step: DemoStep) -> None:
        if not as_json:
            say(render_step(step))

    def on_estimate(seconds: float) -> None:
        if not as_json:
            say(render_estimate(seconds))

    if not as_json:
        say(render_opening(output))
    with shown_progress(quiet=quiet or not sys.stderr.isatty()) as progress:  # elsewhere a line for each step is enough
        story = tell(output, on_step=on_step, on_estimate=on_estimate, progress=progress)
    if as_json:
        print_json(story_to_json(story))
    else:
        say(render_story(story))
