"""Evolutions without training, as controls: models of which it is known beforehand what a ported patch is worth there.

A `twin` computes what the base computes, with weights that have nothing in common with it; `reinit` draws weights anew.
"""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.side_files import copy_side_files
from portllm.checkpoint.safetensors.writer import Entry, ShardWriter, lay_out, write_index
from portllm.errors import CheckpointError
from portllm.files.output_folder import staged_folder
from portllm.progress import Progress, silent
from portllm.running.ranges import require_ranges
from portllm.study.parts.twin import Twin
from portllm.tensors.tensors import encode, load

Change = Callable[[str, Tensor], Tensor]
"""Takes the current name of a tensor and the tensor, and returns what stands in its place."""

_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TwinSettings:
    """Of a twin.

    Attributes:
        seed: Of orders and signs.
    """

    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReinitSettings:
    """Of weights drawn anew.

    Attributes:
        layers: Numbers of the layers whose weights are drawn; all weights of the model, embeddings too, without it.
        seed: Of the draws.
    """

    layers: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        require_ranges("evolution", ("layers", self.layers, "0 or more, each", all(n >= 0 for n in self.layers)))


ControlSettings = TwinSettings | ReinitSettings


def make_control(
    before: Checkpoint,
    settings: ControlSettings,
    out: Path,
    *,
    overwrite: bool = False,
    progress: Progress = silent,
) -> None:
    """Writes a control: a model of the same tensors, dtypes and side files.

    Args:
        before: The model that it is made from, on disk.
        settings: Its kind and seed.
        out: The folder to be; a failed run leaves nothing there.
        overwrite: Replace what is at `out`.
        progress: Progress callback (tensors).

    Raises:
        CheckpointError: No control can be made of this model.
        OutputError: It cannot be written; `OutputExistsError` if something is there.
    """
    change = _twin(before, settings) if isinstance(settings, TwinSettings) else _reinit(before, settings)
    entries = {name: Entry(name, info.dtype, info.shape) for name, info in before.infos.items()}
    with staged_folder(out, overwrite=overwrite) as folder:
        shards = lay_out(entries)
        done = 0
        for shard in shards:
            with ShardWriter(folder, shard) as writer:
                for entry in shard.entries:
                    name = before.current_name(entry.name)
                    writer.append(encode(change(name, load(before.infos[entry.name]))))
                    done += 1
                    progress("evolve", done, len(entries), "tensors")
        write_index(folder, shards)
        if before.folder is not None:
            copy_side_files(before.folder, folder, config_changes={})


def _twin(before: Checkpoint, settings: TwinSettings) -> Change:
    names = ("hidden_size", "intermediate_size", "num_attention_heads")
    hidden, inner, heads = (before.config.get(name) for name in names)
    if not (isinstance(hidden, int) and isinstance(inner, int) and isinstance(heads, int)):
        raise CheckpointError(
            f"{before.name}: config.json lacks one of {', '.join(names)}, so no twin can be made of it."
        )
    key_heads, head_dim = before.config.get("num_key_value_heads"), before.config.get("head_dim")
    return Twin(
        hidden=hidden,
        inner=inner,
        heads=heads,
        key_heads=key_heads if isinstance(key_heads, int) else heads,
        head_dim=head_dim if isinstance(head_dim, int) else hidden // heads,
        seed=settings.seed,
    ).changed


def _reinit(before: Checkpoint, settings: ReinitSettings) -> Change:
    there = {int(found[1]) for name in before.infos if (found := _LAYER.search(name))}
    if missing := sorted(set(settings.layers) - there):
        raise CheckpointError(f"{before.name}: has no layer {missing[0]} to reinitialize; it has {len(there)}.")

    def change(name: str, tensor: Tensor) -> Tensor:
        found = _LAYER.search(name)
        drawn = not settings.layers or (found is not None and int(found[1]) in settings.layers)
        return redrawn(tensor, name=name, seed=settings.seed) if drawn else tensor

    return change


def redrawn(tensor: Tensor, *, name: str, seed: int) -> Tensor:
    """Normal values with the mean and the standard deviation that a tensor has: `N(mean, std²)`.

    Args:
        tensor: Floating-point.
        name: Each name has draws of its own.
        seed: Of the draws.

    Example:
        >>> redrawn(torch.ones(3), name="model.norm.weight", seed=0)
        tensor([1., 1., 1.])
    """
    generator = torch.Generator().manual_seed(random.Random(f"{seed}/{name}").getrandbits(63))
    values = tensor.float()
    drawn = torch.randn(values.shape, generator=generator) * values.std(correction=0) + values.mean()
    return drawn.to(tensor.dtype)
