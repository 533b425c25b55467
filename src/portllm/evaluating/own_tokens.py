"""Running a patch that has tokens of its own: on the model with as many rows, and with the patch's tokenizer."""

from pathlib import Path

import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.matching.added_tokens import added_tokens, height_of, n_rows_of
from portllm.patch.adapter_folder import load_patch
from portllm.running.device import Dtype
from portllm.running.encoding import Encoder
from portllm.running.fused_lora import fuse
from portllm.running.model import PeftModel, attach_adapter, load_model, load_tokenizer


def has_own_tokens(adapter: Path, folder: Path) -> bool:
    """Whether an adapter was trained with tokens that its model does not have."""
    return bool(added_tokens(load_patch(adapter), open_checkpoint(folder)))


def load_patched(
    folder: Path, adapter: Path, *, device: torch.device, dtype: Dtype = "auto", longest: int
) -> tuple[PeftModel, Encoder]:
    """A model with an adapter on it, and what makes tokens of its texts.

    Rows of the model that neither of them has are zeros, as in a merge.

    Args:
        folder: The model's.
        adapter: The adapter's folder.
        device: Where the model goes.
        dtype: What it computes in.
        longest: Tokens of the longest input.

    Raises:
        CheckpointError: The model or a tokenizer cannot be loaded.
        AdapterFormatError: The adapter does not fit the model.
    """
    patch, model = load_patch(adapter), open_checkpoint(folder)
    height = height_of(patch, model)
    n_rows = height if height > n_rows_of(model) else None
    loaded = load_model(folder, device=device, dtype=dtype, longest=longest, n_rows=n_rows)
    tokenizer = adapter if added_tokens(patch, model) else folder
    return fuse(attach_adapter(loaded, adapter, name="patch").eval()), Encoder(load_tokenizer(tokenizer))
