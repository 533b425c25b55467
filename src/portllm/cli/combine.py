"""The command `combine`."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.capture import AUTO, parse_rank
from portllm.cli.numbers import real, share
from portllm.cli.terminal import print_json, say

if TYPE_CHECKING:
    from portllm.combining.plan import Combination


class CombineMethod(StrEnum):
    """How patches are combined."""

    CONCATENATE = "concatenate"
    TIES = "ties"
    DARE = "dare"


def combine(
    patches: Annotated[list[Path], typer.Argument(help="Two or more patches of the same base.")],
    output: options.Out,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Comma-separated weights, one per patch. Defaults to 1 each.")
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank", help="Truncate to this rank, or auto to keep what stands above rounding noise. Exact by default."
        ),
    ] = None,
    method: Annotated[
        CombineMethod,
        typer.Option("--method", help="concatenate is exact; ties and dare select elements before they are summed."),
    ] = (CombineMethod.CONCATENATE),
    density: Annotated[
        float, typer.Option("--density", parser=share, help="Fraction of elements that ties and dare keep.")
    ] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="Random seed for ties and dare.")] = 0,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Combine patches of one base into one.

    The result is their weighted sum, exact or truncated to a rank.
    """
    from portllm.cli.progress import shown_progress
    from portllm.combining.combine import run_combine
    from portllm.combining.decision import decide
    from portllm.combining.plan import plan_combine
    from portllm.combining.text import combine_report_to_json, render_combine_plan, render_combine_report
    from portllm.errors import refuse
    from portllm.files.output_folder import check_free
    from portllm.patch.adapter_folder import load_patch

    given = None if weights is None else parse_weights(weights, len(patches))
    how = _combination(method, rank, density, seed)
    plan = plan_combine([load_patch(patch) for patch in patches], weights=given, how=how)
    if dry_run:
        say(render_combine_plan(plan, output))
    refuse(plan.refusals)
    check_free(output, overwrite=overwrite)
    if dry_run:
        return
    with shown_progress(quiet=quiet) as progress:
        report = run_combine(plan, output, overwrite=overwrite, progress=progress)
    if as_json:
        print_json(combine_report_to_json(report, output))
    else:
        headline = decide(report, [str(patch) for patch in patches], str(output))
        say(render_combine_report(report, output, headline), tone=headline.tone)


def parse_weights(text: str, count: int) -> list[float]:
    """Numbers between commas, as many as there are patches.

    Example:
        >>> parse_weights("1,-0.5", 2)
        [1.0, -0.5]
    """
    try:
        weights = [_weight(part) for part in text.split(",")]
    except typer.BadParameter as error:
        raise typer.BadParameter(f"--weights {text}: {error.message}") from None
    if len(weights) != count:
        raise typer.BadParameter(f"--weights {text}: must be {count} numbers, one per patch.")
    return weights


def _weight(text: str) -> float:
    return real()(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)


def _combination(method: CombineMethod, rank: str | None, density: float, seed: int) -> "Combination":
    from portllm.combining.plan import Exact, Selected

    chosen = None if rank is None else parse_rank(rank)
    number = chosen if isinstance(chosen, int) else None
    if method is CombineMethod.CONCATENATE:
        return Exact("auto" if rank == AUTO else number)
    if rank == AUTO:
        raise typer.BadParameter(f"--rank auto: the result of --method {method} has full rank; pass a number.")
    if density == 0:
        raise typer.BadParameter("--density 0 keeps nothing.")
    return Selected("ties" if method is CombineMethod.TIES else "dare", density, number, seed)
