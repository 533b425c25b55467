"""Settings of `check` on prompts; nothing here needs torch."""

from dataclasses import dataclass

from portllm.running.ranges import require_ranges

SKETCH = 32
"""Columns of a sketch: the drift's own curvature is off by at most `√(4 / SKETCH)`, one standard error, a module."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings:
    """Settings of `check` on prompts.

    Attributes:
        max_tokens: Maximum tokens per prompt; longer ones are truncated from the left.
        positions: Maximum number of tokens per prompt at which modules are observed: evenly spaced, including the last.
        batch_size: Prompts per forward pass; a quarter of it for gradients.
        gradients: Also measure first-order gain and interference (backward passes).
        sketch: Columns of the sketches of curvature.
        seed: Random seed of the sketches and of the labels drawn for them.

    Raises:
        PortLLMError: A value is out of its range; all of them are named.
    """

    max_tokens: int = 512
    positions: int = 16
    batch_size: int = 16
    gradients: bool = False
    sketch: int = SKETCH
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(
            "text settings",
            ("max_tokens", self.max_tokens, "2 or more", self.max_tokens >= 2),
            ("positions", self.positions, "1 or more", self.positions >= 1),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("sketch", self.sketch, "1 or more", self.sketch >= 1),
        )
