"""What `train` says first: whether the loss fell, and the command that follows. Pure."""

from portllm.capturing.decision import LATER, check_command
from portllm.show.headline import Headline
from portllm.show.names import patch_name, short_name
from portllm.show.numbers import counted
from portllm.training.settings import TrainReport


def last_loss(report: TrainReport) -> float:
    """The mean loss over the last tenth of the steps."""
    tail = report.losses[-n_last(report) :]
    return sum(tail) / len(tail)


def n_last(report: TrainReport) -> int:
    """A tenth of the steps, but at least one."""
    return max(1, len(report.losses) // 10)


def decide(report: TrainReport, patch: str, base: str) -> Headline:
    """The sentence to act on.

    Args:
        report: How training went.
        patch: Where the patch is.
        base: What the user calls the model that it was trained on.
    """
    first, last = report.losses[0], last_loss(report)
    text = f"Trained {patch_name(patch)} on {counted(report.n_rows, 'row')} for {short_name(base)}; the loss "
    if last < first:
        text += f"fell from {first:.3f} to {last:.3f}."
        return Headline("good", text, (), LATER, check_command(patch, base))
    text += f"did not fall: {first:.3f} at the first step, {last:.3f} at the last."
    return Headline("doubt", text, (), "train it with another --learning-rate, or for more --steps")
