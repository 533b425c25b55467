"""A model that is being made is stopped when it becomes more than its weights can be, before it takes memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch.nn.modules import module as hooks

from portllm.checkpoint.model.checkpoint import CONFIG_FILE, Checkpoint
from portllm.errors import CheckpointError

VALUES_PER_BYTE = 4
"""Of the weights, at most: four bits each is the smallest that is run, and tied weights are made twice."""

FREE_VALUES = 1 << 26
"""Beside those of the weights: masks and tables that are computed, which a tiny model has as large ones have."""

TENSORS_PER_TENSOR = 8
"""Of the weights, at most: each is registered when it is made, quantized, tied and filled."""

FREE_TENSORS = 1024


@contextlib.contextmanager
def no_more_than(checkpoint: Checkpoint) -> Iterator[None]:
    """Modules that are made inside the block, all together, hold no more than comes from a model's weights.

    Raises:
        CheckpointError: They do; it is raised where the one too many is made.
    """
    n_values, n_tensors = 0, 0
    most_values = VALUES_PER_BYTE * checkpoint.n_bytes + FREE_VALUES
    most_tensors = TENSORS_PER_TENSOR * len(checkpoint.infos) + FREE_TENSORS

    def count(_module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal n_values, n_tensors
        if tensor is None:
            return
        n_values += tensor.numel() if tensor.device.type == "meta" else 0
        n_tensors += 1
        if n_values > most_values or n_tensors > most_tensors:
            raise CheckpointError(
                f"'{checkpoint.name}': its '{CONFIG_FILE}' describes a larger model than its weights: with "
                f"'{name}' of {tuple(tensor.shape)}, {n_tensors} tensors of {n_values} values; the weights are "
                f"{len(checkpoint.infos)} tensors of {checkpoint.n_bytes} bytes. Download both again."
            )

    handles = [
        hooks.register_module_parameter_registration_hook(count),
        hooks.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
