"""What `evaluate` says first: what the update cost, whether that is within the user's limit, what to do next. Pure."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from portllm.evaluating.metrics import Estimate, change_of_counts
from portllm.evaluating.names import FIRST_PORT, PATCHED, PORTED, RETRAINED
from portllm.show.headline import Headline, command_line
from portllm.show.numbers import counted, percent, points

if TYPE_CHECKING:
    from portllm.evaluating.compare import Comparison, ComparisonRow
    from portllm.evaluating.metrics import Flips


@dataclass(frozen=True, slots=True)
class Compared:
    """What the user calls the models, for the command that comes next."""

    evolved: str
    ported: str
    merged: str | None = None


def within(comparison: "Comparison", max_loss: float | None) -> bool | None:
    """Whether the first port cannot have lost more than a limit; None without one.

    The whole interval of the change has to be on the good side of the limit, for the adapter and the merged model.
    Rivals have no part in it: the best of several looks better than it is on the rows that it is the best on.

    Args:
        comparison: What `evaluate` found.
        max_loss: The share of answers that may be lost.
    """
    if max_loss is None:
        return None
    row = worst_port(comparison)
    return row is not None and _lowest(row) >= -max_loss


def worst_port(comparison: "Comparison") -> "ComparisonRow | None":
    """Of the first port's adapter and merged model, the one that may have lost more: never the kinder of two."""
    return min(
        (row for row in comparison.rows if row.name in FIRST_PORT and row.score_change is not None),
        key=lambda row: (_lowest(row), row.name != PORTED),
        default=None,
    )


def decide(comparison: "Comparison", *, max_loss: float | None = None, compared: Compared | None = None) -> Headline:
    """The sentence to act on.

    Args:
        comparison: What `evaluate` found.
        max_loss: The share of answers that may be lost; without one, nothing is said on shipping.
        compared: Names for the next command; without them there is none.
    """
    row = worst_port(comparison)
    if row is None or row.score_change is None or row.flips is None:
        ported = comparison.row(PORTED)
        said = "No ported patch was compared" if ported is None else f"{percent(ported.score.value)} right"
        return Headline("plain", f"{said}: no comparison with before the update.")
    change, met = row.score_change, within(comparison, max_loss)
    wrong = len(row.flips.negative)
    text = (
        f"{change_sentence(change.value)} ({interval_text(change)}) against before the update; "
        f"{wrong:,} of {counted(row.flips.n_rows, 'answer')} turned wrong"
    )
    if max_loss is None:
        next_ = "name the loss that you can accept, such as --max-loss 2, for a verdict" if compared else ""
        return Headline("plain", f"{text}.", list(_reasons(comparison, row)), next_)
    limit = f"your limit of {points_text(max_loss)}"
    if met:
        text += f"; safe to ship by {limit}."
    elif -change.value > max_loss:
        text += f"; not safe to ship: beyond {limit}."
    else:
        text += f"; not shown to be safe: the interval reaches beyond {limit}."
    lost = -change.value > max_loss
    next_, command = _next(change, row.flips, max_loss, compared, met=met is True) if compared else ("", "")
    if compared and not met and (better := _better(comparison)) is not None:
        next_, command = f"evaluate {better.name} as the first port, on other rows: these speak for it", ""
    return Headline(
        "good" if met else "bad" if lost else "doubt", text, list(_reasons(comparison, row)), next_, command
    )


def change_sentence(change: float) -> str:
    """A change of the share of right answers, in words.

    Example:
        >>> [change_sentence(value) for value in (-0.0125, 0.0, 0.03)]
        ['Loses 1.2 points of accuracy', 'Shows no change in accuracy', 'Gains 3.0 points of accuracy']
    """
    if not change:
        return "Shows no change in accuracy"
    return f"{'Loses' if change < 0 else 'Gains'} {points(abs(change)).lstrip('+')} points of accuracy"


def interval_text(change: Estimate) -> str:
    """The interval of a change, in points."""
    if change.low is None or change.high is None:
        return "one row gives no interval"
    return f"{points(change.low)} to {points(change.high)} with 95 % confidence"


def points_text(share: float) -> str:
    """A limit as it was given.

    Example:
        >>> points_text(0.02), points_text(0.01), points_text(0.005)
        ('2 points', '1 point', '0.5 points')
    """
    return f"{100 * share:g} point{'' if math.isclose(share, 0.01) else 's'}"


def merge_command(compared: Compared) -> str:
    """What makes one model of a port that is good enough."""
    return command_line("portllm", "merge", compared.ported, "--into", compared.evolved, "-o", "MERGED")


def retrain_command(compared: Compared) -> str:
    """What trains on from a port that has lost too much."""
    words = ("--base", compared.evolved, "--init-from", compared.ported, "--data", "TRAIN.jsonl", "-o", "OUTPUT")
    return command_line("portllm", "train", *words)


def _lowest(row: "ComparisonRow") -> float:
    change = row.score_change
    return -math.inf if change is None or change.low is None else change.low


def _reasons(comparison: "Comparison", row: "ComparisonRow") -> Iterator[str]:
    before = comparison.row(PATCHED)
    if before is not None and row.flips is not None:
        yield (
            f"{row.name}: {percent(row.score.value)} right, {percent(before.score.value)} before the update; "
            f"{counted(len(row.flips.positive), 'answer')} turned right."
        )
    retrained = comparison.row(RETRAINED)
    if retrained is not None and retrained.flips is not None:
        yield (
            f"For comparison, a patch retrained on the evolved model turns {len(retrained.flips.negative):,} of "
            f"{counted(retrained.flips.n_rows, 'answer')} wrong."
        )
    rivals = [one for one in comparison.rows if one.port_change is not None]
    yield from map(_beside, rivals)
    yield "The interval holds for other inputs if these rows were drawn from them at random."
    if len([one for one in comparison.rows if one.name in FIRST_PORT]) > 1:
        yield f"Of the ported adapter and the merged model, this is the one that may have lost more: {row.name}."
    if rivals:
        yield "Of several ports the first is judged: one chosen by these rows would look better on them than it is."


def _beside(row: "ComparisonRow") -> str:
    """What a rival does beside the first port."""
    change = row.port_change
    said = "" if change is None else f"; {points(change.value)} points against {PORTED} ({interval_text(change)})"
    return f"{row.name}: {percent(row.score.value)} right{said}."


def _better(comparison: "Comparison") -> "ComparisonRow | None":
    """The best of the rivals that are shown to be better than the first port."""
    shown = [
        (row.port_change.value, row) for row in comparison.rows if row.port_change and (row.port_change.low or 0) > 0
    ]
    return max(shown, key=lambda one: one[0], default=(0.0, None))[1]


def _next(change: Estimate, flips: "Flips", limit: float, compared: Compared, *, met: bool) -> tuple[str, str]:
    if met and compared.merged is not None:
        return f"serve {compared.merged}", ""
    if met:
        return "serve the adapter, or merge it", merge_command(compared)
    if -change.value >= limit or change.low is None:
        return "train on from the ported patch", retrain_command(compared)
    share_right, share_wrong = (len(rows) / flips.n_rows for rows in (flips.positive, flips.negative))
    n = flips.n_rows
    while (low := change_of_counts(share_right * n, share_wrong * n, n).low) is not None and low < -limit:
        n = math.ceil(1.02 * n)
    return f"evaluate about {n:,} rows; that many would decide, if the change stays as it is", ""
