"""Why addition works or stops working: the loss around the base, in the patch Δ, the drift D and both at once.

    L(W0 + D + Δ) - L(W0 + D) = <g0, Δ> + ½ <Δ, HΔ> + <D, HΔ> + third order,    g0, H at W0

Addition is safe while the interference `<D, HΔ>` is small against what the patch gains. It is measured twice. As
`<g1, Δ> - <g0, Δ>`, with g1 the gradient at `W0 + D`: exact to second order, all modules and layers together, and what
the whole drift does, patched modules or not. And weight by weight, with the Kronecker-factored Fisher `Σ_x ⊗ Σ_δ` in
the place of H (K-FAC: Martens and Grosse, 2015, arXiv 1503.05671; one factor over the tokens of a sequence: Eschenhagen
et al., 2023, arXiv 2311.00636):

    <D, HΔ> ≈ tr(Σ_δ D Σ_x Δᵀ) = s tr((Σ_δ B)ᵀ D (Σ_x Aᵀ)),    a product of thin matrices with D read in row blocks

with `Σ_x = E[x xᵀ]` over tokens and `Σ_δ = E[Σ_t δ_t δ_tᵀ]` over completion tokens. Its cosine divides by
`√(tr(Σ_δ D Σ_x Dᵀ) tr(Σ_δ Δ Σ_x Δᵀ))`, whose first factor is estimated from random sketches.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from portllm.arrays import Float32
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal, refuse
from portllm.linalg import square_sum
from portllm.matching.changes import oriented
from portllm.matching.compatibility import mismatches
from portllm.measures.terms import Terms
from portllm.patch.adapter_folder import folder_of
from portllm.patch.adapter_tensors import WEIGHT
from portllm.patch.delta import LowRankDelta
from portllm.patch.low_rank import load_delta
from portllm.patch.patch import Patch
from portllm.probing.settings import SKETCH
from portllm.progress import Progress, silent
from portllm.running.encoding import Encoded, Encoder
from portllm.running.examples import Example
from portllm.running.folder import model_folder
from portllm.running.loss import completion_nats
from portllm.running.model import Device, PeftModel, attach_adapter, choose_device, load_model, load_tokenizer
from portllm.running.moments import ModuleMoments, Moments, gather_moments
from portllm.tensors.info import TensorInfo
from portllm.tensors.tensors import load_rows
from portllm.training.lora import encode_all

Rows = tuple[slice, slice, Float32[Tensor, "rows columns"]]
"""A block of a matrix, and where it lies."""

BLOCK_ELEMENTS = 1 << 22


@dataclass(frozen=True, slots=True)
class Expansion:
    """All modules, and the losses that the expansion is about.

    Attributes:
        modules: By name.
        losses: Of `base`, `base_patched`, `evolved`, `evolved_patched` on the same rows, nats per completion token.
        rows: How many there were.
    """

    modules: Mapping[str, Terms]
    losses: Mapping[str, float]
    rows: int

    def to_json(self) -> dict[str, object]:
        """Modules, their sums and the losses."""
        return {
            "total": sum(self.modules.values(), Terms()).to_json(),
            "modules": {name: terms.to_json() for name, terms in self.modules.items()},
            "losses": dict(self.losses),
            "rows": self.rows,
        }


def expand(
    base: Checkpoint,
    evolved: Checkpoint,
    patch: Patch[TensorInfo],
    examples: Sequence[Example],
    *,
    max_tokens: int = 512,
    batch_size: int = 4,
    sketch: int = SKETCH,
    seed: int = 0,
    device: Device = "auto",
    progress: Progress = silent,
) -> Expansion:
    """Measure the terms of the loss around the base; models run in float32, one after the other.

    Args:
        base: The model that the patch was made on.
        evolved: A later version of the same shapes.
        patch: Of plain LoRA deltas of linear modules.
        examples: Prompts and completions; best of the task, and not the rows that the patch was trained on.
        max_tokens: Most tokens of a row; longer prompts are cut from the left.
        batch_size: Rows of a pass.
        sketch: Columns of the sketches.
        seed: Of the sketches and of drawn labels.
        device: Where models run.
        progress: Progress callback (batches).

    Raises:
        PlanRefusedError: The patch does not fit a model, or holds more than LoRA deltas of linear modules.
        NotFoundError: A model is a single file, without configuration and tokenizer.
        DataError: Rows do not fit.
    """
    refuse({*mismatches(patch, base), *mismatches(patch, evolved), *_unhooked(patch)})
    patch = oriented(patch, base)
    deltas = {module: load_delta(delta) for module, delta in patch.deltas.items()}
    where = choose_device(device)
    losses: dict[str, float] = {}
    found: list[Moments] = []
    for name, checkpoint in (("base", base), ("evolved", evolved)):
        folder = model_folder(checkpoint, progress=progress)
        rows = encode_all(Encoder(load_tokenizer(folder)), examples, max_tokens=max_tokens)
        batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
        model = load_model(folder, device=where, dtype=torch.float32, longest=max_tokens)
        moments = gather_moments(
            model,
            deltas,
            batches,
            device=where,
            curvature=checkpoint is base,
            sketch=sketch,
            seed=seed,
            progress=progress,
        )
        found.append(moments)
        losses[name] = moments.nats
        patched = attach_adapter(model, folder_of(patch), name="patch")
        losses[f"{name}_patched"] = _mean_nats(patched, batches, device=where)
    return Expansion(terms_of(deltas, *found, base=base, evolved=evolved), losses, len(examples))


def terms_of(
    deltas: Mapping[str, LowRankDelta[Tensor]],
    at_base: Moments,
    at_evolved: Moments,
    *,
    base: Checkpoint,
    evolved: Checkpoint,
) -> dict[str, Terms]:
    """The terms of each module, from what was gathered at both models; the drift is read here.

    Args:
        deltas: By module, oriented as the models store their weights.
        at_base: Gathered with curvature.
        at_evolved: Of the same loss.
        base: The earlier model.
        evolved: The later one.
    """
    return {
        module: replace(
            _terms(delta, at_base.modules[module], at_base, _drift(module, delta, base, evolved)),
            first_order_evolved=at_evolved.modules[module].first_order / at_evolved.n_targets,
        )
        for module, delta in deltas.items()
    }


def has_terms(patch: Patch[TensorInfo]) -> bool:
    """Whether a patch is made of LoRA deltas of linear modules alone, whose terms can be gathered."""
    return patch.is_plain_lora and not any(delta.is_embedding for delta in patch.deltas.values())


def _unhooked(patch: Patch[TensorInfo]) -> Iterator[Refusal]:
    if not has_terms(patch):
        yield Refusal(
            patch.name,
            "contains more than LoRA deltas of linear modules (a DoRA magnitude, experts, embeddings, saved "
            "tensors, token rows or biases), whose inputs a hook cannot observe. Use a plain LoRA patch.",
        )


@torch.inference_mode()
def _mean_nats(model: PeftModel, batches: Sequence[Sequence[Encoded]], *, device: torch.device) -> float:
    total = sum(completion_nats(model, rows, device=device).sum().item() for rows in batches)
    return total / sum(len(row.completion) for rows in batches for row in rows)


def _terms(delta: LowRankDelta[Tensor], moments: ModuleMoments, seen: Moments, drift: Iterator[Rows]) -> Terms:
    """The terms at the base; `first_order_evolved` is left at 0.

    Args:
        delta: Of the module.
        moments: Of the module at the base.
        seen: What they are sums over.
        drift: The drift of its weight, as (d_out, d_in), in blocks of rows or of columns.
    """
    rank = delta.rank
    inputs, gradients = moments.inputs.cpu(), moments.gradients.cpu()
    inner = torch.zeros(gradients.shape[1], inputs.shape[1])
    for rows, columns, block in drift:
        inner += gradients[rows].T @ (block @ inputs[columns])
    both = seen.n_tokens * seen.n_targets
    read, written = delta.a.float() @ inputs[:, :rank], delta.b.float().T @ gradients[:, :rank]
    sketched = inner[rank:, rank:]
    return Terms(
        first_order_base=moments.first_order / seen.n_targets,
        interference=delta.scale * float(inner[:rank, :rank].trace().item()) / both,
        patch_curvature=delta.scale**2 * float((written * read.T).sum().item()) / both,
        drift_curvature=square_sum(sketched) / sketched.numel() / both,
    )


def _drift(module: str, delta: LowRankDelta[Tensor], base: Checkpoint, evolved: Checkpoint) -> Iterator[Rows]:
    """`W1 - W0` of a module, as (d_out, d_in) whichever way it is stored."""
    old, new = base.tensor(module + WEIGHT), evolved.tensor(module + WEIGHT)
    if old is None or new is None:
        raise AssertionError("the patch fits both models")
    step = max(1, BLOCK_ELEMENTS // old.shape[1])
    for start in range(0, old.shape[0], step):
        stop = min(start + step, old.shape[0])
        block = load_rows(new, start, stop).float() - load_rows(old, start, stop).float()
        here, across = slice(start, stop), slice(None)
        yield (across, here, block.T) if delta.transposed else (here, across, block)
