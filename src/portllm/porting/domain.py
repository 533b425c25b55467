"""The prompts that a patch is for, and how both models are run over them for an aligned port."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from portllm.errors import DataError
from portllm.matching.port_plan import PortPlan
from portllm.methods.values import Values
from portllm.patch.patch import Patch
from portllm.porting.prompts import Rows, split
from portllm.porting.streams import Streams
from portllm.porting.weights import PatchedWeights
from portllm.progress import Progress, silent
from portllm.running.beginning import shared_beginning
from portllm.running.encoding import Encoder, encode_prompts
from portllm.running.folder import model_folder
from portllm.running.layers import LayeredModel
from portllm.running.model import Device, choose_device, load_tokenizer
from portllm.running.ranges import require_ranges

LEAST_PROMPTS = 16
"""A quarter of them is reported on."""

SAMPLE = 32
"""Prompts that are asked for what answers begin with."""

ROOM = 8
"""Tokens that an answer may begin with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """Prompts of the domain that a patch is for, and how they are run.

    Attributes:
        prompts: As they would be given to the model; nobody has to answer them.
        max_tokens: Of a prompt, at most; longer ones are cut from the left.
        batch_size: Prompts of a forward pass.
        omega: What a token of a prompt counts in a fit, beside one with a token of an answer after it.
        device: Where layers run.
        progress: Progress callback (layers).

    Raises:
        DataError: There are too few prompts to split them in three.
        PortLLMError: A setting is out of its range.
    """

    prompts: Sequence[str]
    max_tokens: int = 512
    batch_size: int = 16
    omega: float = 0.05
    device: Device = "auto"
    progress: Progress = silent

    def __post_init__(self) -> None:
        require_ranges(
            "text settings",
            ("max_tokens", self.max_tokens, f"{2 + ROOM} or more", self.max_tokens >= 2 + ROOM),
            ("batch_size", self.batch_size, "1 or more", self.batch_size >= 1),
            ("omega", self.omega, "0 to 1", 0 <= self.omega <= 1),
        )
        if (n := len(set(self.prompts))) < LEAST_PROMPTS:
            raise DataError(
                f"prompts: {n} different ones were given; expected at least {LEAST_PROMPTS}, better 256: they are "
                "split into those to fit on, to choose by and to report on."
            )


def open_streams(plan: PortPlan, patch: Patch[Values], added: Patch[Values], domain: Domain, folder: Path) -> Streams:
    """Both models over the prompts of a domain.

    Args:
        plan: Names the models.
        patch: The patch of the base, with its deltas the way round in which the base stores its weights.
        added: The patch of the evolved model, as plain addition makes it.
        domain: The prompts.
        folder: For what does not stay in memory.

    Raises:
        CheckpointError: A model cannot be run layer by layer.
        DataError: A prompt has no tokens, or all prompts have the same answer.
    """
    if plan.base is None:
        raise AssertionError("a plan with streams has a base")
    device = choose_device(domain.device)
    folders = [model_folder(model, progress=domain.progress) for model in (plan.base, plan.evolved)]
    encoder = Encoder(load_tokenizer(folders[0]))
    old = LayeredModel(folders[0], PatchedWeights(plan.base, patch), device=device, longest=domain.max_tokens)
    new = LayeredModel(folders[1], PatchedWeights(plan.evolved, added), device=device, longest=domain.max_tokens)
    prompts, _ = encode_prompts(encoder, domain.prompts, room=domain.max_tokens - ROOM)
    shared = _beginning(old, prompts, encoder, domain)
    rows = Rows(
        ids=tuple((*prompt, *shared) for prompt in prompts),
        n_places=(1 + len(shared),) * len(prompts),
        n_asked=(1,) * len(prompts),
        parts=tuple(split(domain.prompts)),
    )
    return Streams(old, new, rows, folder, domain.batch_size, domain.omega, device, domain.progress)


def _beginning(
    old: LayeredModel, prompts: Sequence[tuple[int, ...]], encoder: Encoder, domain: Domain
) -> tuple[int, ...]:
    """What the old specialist's answers begin with, whatever the prompt."""
    step = max(1, len(prompts) // SAMPLE)
    sample = prompts[::step][:SAMPLE]

    def ask(shared: tuple[int, ...]) -> list[Tensor]:
        return [old.next_logits([(*prompt, *shared) for prompt in sample], batch_size=domain.batch_size)]

    shared, logits = shared_beginning(ask, end=encoder.eos)
    if len(logits[0].argmax(dim=1).unique()) == 1:
        raise DataError(
            f"prompts: the old specialist gives the same answer to all of {len(sample)} of them, so nothing can be "
            "compared. Provide prompts with different answers."
        )
    return shared
