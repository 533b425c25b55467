"""The command `demo`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.terminal import print_json, say, width_of

PAGE = "report.html"
"""The demo's comparison, in its folder."""


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the demo's files.")] = Path("portllm-demo"),
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run the whole story on a small real model.

    Takes minutes on a CPU, offline. A second run reuses finished steps.
    """
    from portllm.cli.pages import written
    from portllm.cli.progress import shown_progress
    from portllm.demo.page import story_page
    from portllm.demo.story import DemoStep, tell
    from portllm.demo.text import render_estimate, render_opening, render_step, render_story, story_to_json
    from portllm.files.one_file import write_page

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
    write_page(output / PAGE, story_page(story, written()), overwrite=True)
    if as_json:
        print_json(story_to_json(story))
    else:
        say(render_story(story, page=output / PAGE, width=width_of(sys.stdout)))
