"""What a loss makes of a model's deltas to first and second order, gathered by hooks and in thin matrices only.

Of each module with the delta `Δ = s·B·A`, inputs `x_t` and gradients `δ_t` of its outputs at each token t:

    first order    <g, Δ> = s Σ_t <Bᵀ δ_t, A x_t>                      a number
    inputs         Σ_t x_t (A x_t)ᵀ  and  Σ_t x_t ω_tᵀ                 (d_in, rank + sketch)
    gradients      Σ_t δ_t (Bᵀ δ_t)ᵀ  and  Σ_t δ_t η_tᵀ                (d_out, rank + sketch)

with random signs ω, η: the sketch's columns have the second moments of x and of δ as their expected squares. No
gradient of a weight is formed, and memory does not grow with rows. The gradients of the second line are those of labels
that the model draws itself, which makes their second moment the Fisher's (Martens, 2020, arXiv 1412.1193, section 5);
the first line takes the loss that is asked about.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from portllm.arrays import Bool, Float, Float32, Int64
from portllm.patch.delta import LowRankDelta
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoded
from portllm.running.loss import IGNORED, completion_logits, completion_targets, token_nats
from portllm.running.model import PreTrainedModel

LossOf = Callable[[Sequence[Encoded], Float32[Tensor, "rows width vocabulary"]], Float32[Tensor, ""]]
"""The summed loss of rows, from the logits at the places of their completions."""


def completion_loss(rows: Sequence[Encoded], logits: Float32[Tensor, "rows width vocabulary"]) -> Float32[Tensor, ""]:
    """What the rows' own completions cost: `Σ -log p(token | all before it)`."""
    return token_nats(logits, completion_targets(rows, device=logits.device)).sum()


@dataclass(slots=True)
class ModuleMoments:
    """Sums over the tokens of all rows; see the module's docstring.

    Attributes:
        first_order: `<g, Δ>`, of the summed loss.
        inputs: Rank columns with A, then those of the sketch.
        gradients: Rank columns with B, then those of the sketch; zero where no curvature was asked for.
    """

    first_order: float
    inputs: Float32[Tensor, "d_in columns"]
    gradients: Float32[Tensor, "d_out columns"]


@dataclass(frozen=True, slots=True)
class Moments:
    """What a model's loss on some rows says of a patch.

    Attributes:
        modules: By name.
        n_tokens: Tokens that went in, padding apart.
        n_targets: Completion tokens that the loss is the sum over.
        nats: The mean loss of these.
    """

    modules: Mapping[str, ModuleMoments]
    n_tokens: int
    n_targets: int
    nats: float


def gather_moments(
    model: PreTrainedModel,
    deltas: Mapping[str, LowRankDelta[Tensor]],
    batches: Sequence[Sequence[Encoded]],
    *,
    device: torch.device,
    curvature: bool,
    sketch: int,
    seed: int = 0,
    loss_of: LossOf = completion_loss,
    progress: Progress = silent,
) -> Moments:
    """Runs a model forward and backward on rows, without a patch on it.

    Args:
        model: In evaluation mode; its parameters are frozen afterwards.
        deltas: By the name of a linear module.
        batches: Prompts and completions.
        device: Where the model is.
        curvature: Gather gradients' second moments, too: a second backward pass.
        sketch: Columns of the sketches.
        seed: Of the sketches and of the labels that are drawn.
        loss_of: What the first order is of.
        progress: Progress callback (batches).
    """
    model.requires_grad_(requires_grad=False)
    gatherer = _Gatherer(deltas, device=device, sketch=sketch, seed=seed)
    n_tokens, n_targets, nats = 0, 0, 0.0
    with gatherer.on(model):
        for done, rows in enumerate(batches, start=1):
            gatherer.mask = _token_mask(rows).to(device)
            logits = completion_logits(model, rows, device=device)
            targets = completion_targets(rows, device=device)
            loss = loss_of(rows, logits)
            gatherer.is_drawn = False
            torch.autograd.backward(loss, retain_graph=curvature)
            if curvature:
                gatherer.is_drawn = True
                drawn = _draw(logits.detach(), targets, gatherer.generator)
                torch.autograd.backward(token_nats(logits, drawn).sum())
            n_tokens += int(gatherer.mask.sum().item())
            n_targets += int((targets != IGNORED).sum().item())
            nats += loss.item()
            progress("expand", done, len(batches), "steps")
    return Moments(gatherer.modules, n_tokens, n_targets, nats / n_targets)


class _Gatherer:
    """Hooks on modules, and the sums that they add to."""

    def __init__(
        self, deltas: Mapping[str, LowRankDelta[Tensor]], *, device: torch.device, sketch: int, seed: int
    ) -> None:
        self.generator = torch.Generator(device).manual_seed(seed)
        self.mask: Bool[Tensor, "rows tokens"] = torch.zeros(0, 0, dtype=torch.bool)
        self.is_drawn = False
        self._sketch = sketch
        self._factors = {
            name: (delta.a.to(device, torch.float32), delta.b.to(device, torch.float32), delta.scale)
            for name, delta in deltas.items()
        }
        self.modules = {
            name: ModuleMoments(
                0.0,
                torch.zeros(a.shape[1], len(a) + sketch, device=device),
                torch.zeros(b.shape[0], len(a) + sketch, device=device),
            )
            for name, (a, b, _) in self._factors.items()
        }

    @contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Hooks are on the model inside the block."""
        # Frozen weights take no gradient: the graph begins at what the embedding puts out.
        handles: list[RemovableHandle] = [
            model.get_input_embeddings().register_forward_hook(lambda _module, _inputs, output: output.requires_grad_())
        ]
        try:
            handles += [
                model.get_submodule(name).register_forward_hook(partial(self._on_forward, name))
                for name in self._factors
            ]
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(self, name: str, _module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        a, _, _ = self._factors[name]
        x = self._rows(inputs[0].detach())
        read = x @ a.T
        self.modules[name].inputs += x.T @ torch.cat([read, self._signs(len(x))], dim=1)
        output.register_hook(partial(self._on_gradient, name, read))  # type: ignore[no-untyped-call]

    def _on_gradient(self, name: str, read: Float[Tensor, "tokens rank"], gradient: Tensor) -> None:
        _, b, scale = self._factors[name]
        moments, delta = self.modules[name], self._rows(gradient)
        written = delta @ b
        if self.is_drawn:
            moments.gradients += delta.T @ torch.cat([written, self._signs(len(delta))], dim=1)
        else:
            moments.first_order += scale * float((written * read).sum(dtype=torch.float64).item())

    def _rows(self, values: Float[Tensor, "... width"]) -> Float32[Tensor, "tokens width"]:
        """The values of the tokens, without those of the padding; the head is given the last columns alone."""
        mask = self.mask if values.ndim == 2 else self.mask[:, -values.shape[1] :]
        return values.reshape(-1, values.shape[-1])[mask.reshape(-1)].float()

    def _signs(self, rows: int) -> Float32[Tensor, "rows sketch"]:
        drawn = torch.randint(0, 2, (rows, self._sketch), generator=self.generator, device=self.generator.device)
        return 2.0 * drawn - 1.0


def _token_mask(rows: Sequence[Encoded]) -> Bool[Tensor, "rows tokens"]:
    """Where `completion_logits` puts tokens, which end in the last column, and no padding."""
    lengths = torch.tensor([len(row.prompt) + len(row.completion) - 1 for row in rows])
    width = int(lengths.max().item())
    return torch.arange(width)[None, :] >= (width - lengths)[:, None]


def _draw(
    logits: Float32[Tensor, "rows width vocabulary"], targets: Int64[Tensor, "rows width"], generator: torch.Generator
) -> Int64[Tensor, "rows width"]:
    """A label of the model's own at each place that has a target."""
    probabilities = logits.softmax(dim=-1).flatten(0, 1)
    drawn = torch.multinomial(probabilities, 1, generator=generator).view(targets.shape)
    return torch.where(targets == IGNORED, targets, drawn)
