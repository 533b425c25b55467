"""What `capture` and `train` say first: what was made, and the command that follows once the base is updated. Pure."""

from portllm.show.headline import Headline, command_line
from portllm.show.names import patch_name, short_name

LATER = "when the base is updated, ask whether the patch will hold"


def check_command(patch: str, base: str) -> str:
    """What follows once there is a next version of the base."""
    return command_line("portllm", "check", patch, "--base", base, "--evolved", "EVOLVED")


def decide(patch: str, base: str, *, source: str, left_out: int = 0) -> Headline:
    """The sentence to act on.

    Args:
        patch: Where the patch is.
        base: What the user calls its base.
        source: What it was made of: an adapter, or a tuned model.
        left_out: How many changed tensors the patch does not hold.
    """
    text = f"Captured {patch_name(source)} as {patch_name(patch)}, a patch of {short_name(base)}"
    if left_out:
        text += f"; {left_out} changed tensors are not in it, see below"
    return Headline("doubt" if left_out else "good", f"{text}.", (), LATER, check_command(patch, base))
