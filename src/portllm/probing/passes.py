"""Run a model over prompts, without a patch and with each patch in turn: the passes behind `check --text`."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from portllm.arrays import Float32
from portllm.errors import NonFiniteError
from portllm.patch.adapter_folder import folder_of
from portllm.patch.delta import LowRankDelta
from portllm.patch.low_rank import load_delta
from portllm.patch.patch import Patch
from portllm.probing.expansion import has_terms
from portllm.probing.settings import TextSettings
from portllm.progress import Progress
from portllm.running.device import Dtype
from portllm.running.encoding import Encoded, Encoder, batches
from portllm.running.fused_lora import fuse
from portllm.running.loss import completion_targets
from portllm.running.model import PeftModel, PreTrainedModel, attach_adapter, detach_adapter, load_model
from portllm.running.moments import Moments, gather_moments
from portllm.running.observation import Observation, observe
from portllm.tensors.info import TensorInfo
from portllm.training.distil_lora import mean_divergence

MOST_SHARED = 8
"""Tokens that all answers may begin with: a blank, a quotation mark, a few words of form."""

GRADIENT_SHARE = 4
"""A pass with gradients keeps the activations of its batch: so many times fewer prompts are run together."""

Logits = Float32[Tensor, "prompts vocabulary"]


@dataclass(frozen=True, slots=True)
class Carried:
    """A patch on its way.

    Attributes:
        patch: As it was made.
        ported: As it is for the evolved model.
        deltas: Its low-rank deltas of linear modules, by module.
    """

    patch: Patch[TensorInfo]
    ported: Patch[TensorInfo]
    deltas: Mapping[str, LowRankDelta[TensorInfo]]


class Host:
    """A model that carries one patch after another; it is loaded when needed, and again where a patch left traces.

    Args:
        name: For messages.
        folder: Its checkpoint.
        device: Where it runs.
        settings: Say how long its inputs are, and its dtype: float32 for gradients.
    """

    def __init__(self, name: str, folder: Path, *, device: torch.device, settings: TextSettings) -> None:
        self.name, self.folder = name, folder
        self._device, self._settings = device, settings
        self._model: PreTrainedModel | None = None

    def bare(self) -> PreTrainedModel:
        """The model without a patch."""
        if self._model is None:
            dtype: Dtype = "float32" if self._settings.gradients else "auto"
            self._model = load_model(self.folder, device=self._device, dtype=dtype, longest=self._settings.max_tokens)
        return self._model

    @contextmanager
    def carrying(self, patch: Patch[TensorInfo]) -> Iterator[PeftModel]:
        """Inside the block, the model with a patch on it."""
        patched = fuse(attach_adapter(self.bare(), folder_of(patch), name="patch").eval())
        self._model = None
        yield patched
        if patch.is_plain_lora:
            self._model = detach_adapter(patched)

    def release(self) -> None:
        """Makes room for another model."""
        self._model = None


class Passes:
    """Runs models over the same prompts.

    Attributes:
        rows: Ids of each prompt, and what all answers begin with, once `begun` has found it.
        shared: That beginning.

    Args:
        rows: Ids of each prompt.
        settings: How much is looked at.
        device: Where the models are.
        n_passes: Forward passes there will be, for the progress.
        progress: Progress callback (prompts).
    """

    def __init__(
        self,
        rows: Sequence[tuple[int, ...]],
        settings: TextSettings,
        device: torch.device,
        *,
        n_passes: int,
        progress: Progress,
    ) -> None:
        self.rows: list[tuple[int, ...]] = list(rows)
        self.shared: tuple[int, ...] = ()
        self._settings, self._device, self._progress = settings, device, progress
        self._done, self._total = 0, n_passes * len(rows)

    def bare(self, host: Host, factors: Mapping[str, Sequence[Tensor]]) -> Observation:
        """What is seen of a model without a patch."""
        return self._observe(host, host.bare(), factors, states=True)

    def patched(self, host: Host, patch: Patch[TensorInfo]) -> Logits:
        """The logits of a model with a patch."""
        with host.carrying(patch) as model:
            return self._observe(host, model).logits

    def begun(self, host: Host, patches: Sequence[Patch[TensorInfo]], encoder: Encoder) -> list[Logits]:
        """The logits of the old specialists where their answers begin to differ; there, every later pass asks too.

        Args:
            host: The base.
            patches: One or more.
            encoder: Of the prompts; one without room for what answers begin with loses its beginning.
        """
        prompts, room = self.rows, self._settings.max_tokens

        def go_on(shared: tuple[int, ...]) -> None:
            self.shared = shared
            self.rows = [encoder.cut_prompt((*row, *shared), room=room)[0] for row in prompts]

        def ask(shared: tuple[int, ...]) -> list[Logits]:
            go_on(shared)
            self._total += len(patches) * len(prompts) if shared else 0
            return [self.patched(host, patch) for patch in patches]

        shared, logits = shared_beginning(ask, end=encoder.eos)
        go_on(shared)
        return logits

    def moments(self, host: Host, carried: Carried, taught: Logits, *, curvature: bool) -> Moments | None:
        """What the divergence of a model from the old specialist says of a patch, where that is asked for."""
        if not (self._settings.gradients and has_terms(carried.patch)):
            return None
        # The specialist's likeliest token marks the place that is asked about; what counts is all of its distribution.
        rows = [Encoded(row, (int(logits.argmax()),)) for row, logits in zip(self.rows, taught, strict=True)]
        size = max(1, self._settings.batch_size // GRADIENT_SHARE)
        return gather_moments(
            host.bare(),
            {module: load_delta(delta) for module, delta in carried.deltas.items()},
            [
                [rows[number] for number in batch]
                for batch in batches([len(row.prompt) for row in rows], batch_size=size)
            ],
            device=self._device,
            curvature=curvature,
            sketch=self._settings.sketch,
            seed=self._settings.seed,
            loss_of=partial(_divergence, dict(zip(rows, taught, strict=True))),
            progress=self._progress,
        )

    def _observe(
        self,
        host: Host,
        model: PreTrainedModel | PeftModel,
        factors: Mapping[str, Sequence[Tensor]] | None = None,
        *,
        states: bool = False,
    ) -> Observation:
        def tick(n_rows: int) -> None:
            self._done += n_rows
            self._progress("read prompts", self._done, self._total, "rows")

        seen = observe(
            model,
            self.rows,
            device=self._device,
            batch_size=self._settings.batch_size,
            factors=factors,
            positions=self._settings.positions,
            states=states,
            tick=tick,
        )
        if not bool(seen.logits.isfinite().all()):
            raise NonFiniteError(
                f"'{host.name}': outputs an infinity or NaN for a prompt. Its weights or the patch's are corrupt, "
                "or too large for its dtype. Check the files; 'portllm check' names any non-finite tensor."
            )
        return seen


def shared_beginning(
    ask: Callable[[tuple[int, ...]], list[Logits]], *, end: int
) -> tuple[tuple[int, ...], list[Logits]]:
    """What answers begin with whatever the prompt, and what models say after it.

    A beginning that all answers share says nothing of the prompt: where labels are numbers, a tokenizer may put a blank
    before them as a token of its own.

    Args:
        ask: The logits of each model after every prompt and some tokens.
        end: The token that ends an answer.

    Returns:
        The tokens, none where all answers are the same to their end or for more than `MOST_SHARED` tokens, and the
        logits after them.

    Example:
        >>> blanks, answers = torch.eye(4)[[1, 1]], torch.eye(4)[[2, 3]]
        >>> shared_beginning(lambda shared: [answers if shared else blanks], end=0)[0]
        (1,)
    """
    shared: tuple[int, ...] = ()
    first = logits = ask(shared)
    while len(likeliest := {int(token) for each in logits for token in each.argmax(dim=-1)}) == 1:
        if len(shared) == MOST_SHARED or end in likeliest:
            return (), first
        shared += (*likeliest,)
        logits = ask(shared)
    return shared, logits


def _divergence(
    answered: Mapping[Encoded, Float32[Tensor, " vocabulary"]],
    rows: Sequence[Encoded],
    logits: Float32[Tensor, "rows width other_vocabulary"],
) -> Float32[Tensor, ""]:
    """`Σ KL(old specialist ‖ model)` over rows."""
    taught = torch.stack([answered[row] for row in rows])[:, None].to(logits.device)
    width = min(taught.shape[-1], logits.shape[-1])
    targets = completion_targets(rows, device=logits.device)
    return len(rows) * mean_divergence(taught[..., :width], logits[..., :width], targets)
