"""What a training run is given, and what it reports; nothing here needs torch."""

import math
from dataclasses import dataclass

from portllm.running.ranges import require_ranges
from portllm.training.schedule import Decay


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """Settings of a training run.

    Attributes:
        rank: LoRA rank.
        alpha: PEFT's numerator: the scale is `alpha / rank`, or `alpha / sqrt(rank)` with `use_rslora`.
        target_modules: Names of the linear modules; `all-linear` is all but the head: in a Llama the paper's seven.
        use_rslora: Use the rank-stabilized scale.
        dropout: LoRA dropout.
        learning_rate: Peak learning rate.
        epochs: Number of passes over the data, unless `steps` is given.
        steps: Number of optimizer steps, instead of `epochs`.
        batch_size: Rows per optimizer step.
        max_tokens: Maximum tokens per row; longer prompts are truncated from the left.
        warmup: Fraction of the steps during which the learning rate rises.
        decay: Learning-rate schedule after warmup.
        weight_decay: AdamW weight decay.
        max_grad_norm: Gradient clipping norm.
        gradient_checkpointing: Trade about a third more time for less memory.
        seed: Random seed of initialization, row order and dropout.

    Raises:
        PortLLMError: A value is out of range; all of them are named.
    """

    rank: int = 8
    alpha: int = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    use_rslora: bool = False
    dropout: float = 0.0
    learning_rate: float = 2e-4
    epochs: float = 3.0
    steps: int | None = None
    batch_size: int = 8
    max_tokens: int = 512
    warmup: float = 0.1
    decay: Decay = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges(
            "training settings",
            ("rank", self.rank, "1 or more", self.rank >= 1),
            ("alpha", self.alpha, "1 or more", self.alpha >= 1),
            ("dropout", self.dropout, "0 to below 1", 0 <= self.dropout < 1),
            ("learning_rate", self.learning_rate, "more than 0", 0 < self.learning_rate < math.inf),
            ("epochs", self.epochs, "more than 0", 0 < self.epochs < math.inf),
            ("steps", self.steps, "1 or more", self.steps is None or self.steps >= 1),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("max_tokens", self.max_tokens, "2 or more", self.max_tokens >= 2),
            ("warmup", self.warmup, "0 to below 1", 0 <= self.warmup < 1),
            ("weight_decay", self.weight_decay, "0 or more", self.weight_decay >= 0),
            ("max_grad_norm", self.max_grad_norm, "more than 0", self.max_grad_norm > 0),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """Report of a training run.

    Attributes:
        losses: Mean loss of each step's batch, in nats per token of completion and end mark.
        seconds: Duration of the steps, excluding loading and saving.
        n_trained: Number of trained parameters.
        n_rows: Number of rows.
        n_cut_rows: Number of rows whose prompt was truncated.
        n_tokens: Number of tokens processed, excluding padding.
        steps: Number of optimizer steps.
        device: The device it ran on.
        peak_bytes: Peak memory on a CUDA device; None on a CPU.
    """

    losses: tuple[float, ...]
    seconds: float
    n_trained: int
    n_rows: int
    n_cut_rows: int
    n_tokens: int
    steps: int
    device: str
    peak_bytes: int | None

    def __repr__(self) -> str:
        ends = f", loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if self.losses else ""
        return f"TrainReport({self.steps} steps on {self.n_rows} rows{ends}, {self.seconds:.1f} s)"
