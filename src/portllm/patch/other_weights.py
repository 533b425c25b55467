"""Weights in files of their own beside an adapter: PEFT loads none of them, and none that was trained is left out.

A value head in safetensors goes along with the patch, as `HEAD_FILE` says. Anything else is refused by name, except
the state of a training run, a whole model, and the adapter itself in another format.
"""

import re
from collections.abc import Collection
from pathlib import Path

from portllm.checkpoint.folder import PICKLE_SUFFIXES
from portllm.checkpoint.model.side_files import HEAD_FILE

HEAD_PICKLES = ("value_head.bin", "pytorch_model.bin")
"""Where LLaMA-Factory and TRL save the value head of a model with an adapter; the latter under the name of a model."""

NOT_TRAINED = re.compile(
    r"(?:ggml-)?adapter[-_]model\b.*|(?:\d+_)?adapters\b.*"
    r"|(?:model|consolidated|pytorch_model-\d+|pytorch_model_fsdp|tf_model|rust_model)\b.*"
    r"|.*(?:optim|scheduler|scaler|sampler|random_state|rng_state|training_args|trainer_state|_states|checkpoint).*"
)
"""The adapter in another format, whole models, and the state of a training run."""


def why_incomplete(files: Collection[str], name: str) -> str | None:
    """Why an adapter is not all that was trained, by the files in its folder; None where it is.

    Example:
        >>> why_incomplete(["adapter_model.safetensors", "optimizer.pt", "value_head.safetensors"], "adapter") is None
        True
        >>> print(why_incomplete(["mm_projector.bin"], "adapter"))
        part of the training result is in mm_projector.bin, which PEFT does not load. Save those modules with the \
adapter (modules_to_save), or remove the file if they are not needed.
    """
    weights = sorted(file for file in files if "/" not in file and file.endswith((".safetensors", *PICKLE_SUFFIXES)))
    own = [file for file in weights if file != HEAD_FILE and not NOT_TRAINED.fullmatch(file)]
    if HEAD_FILE in files:
        own = [file for file in own if file not in HEAD_PICKLES]
    if not own:
        return None
    where = Path(name) / own[0]
    if own[0] in HEAD_PICKLES:
        return (
            f"{own[0]} beside an adapter holds a value head, which PEFT does not load, as a pickle, which can run code "
            f'and is never read. If you trust it, convert it once: python -c "import torch, safetensors.torch as s; '
            f"s.save_file({{k: v.contiguous() for k, v in torch.load('{where}', weights_only=True).items() if "
            f"'v_head.' in k}}, '{where.with_name(HEAD_FILE)}')\". Remove it if it is not needed."
        )
    return (
        f"part of the training result is in {own[0]}, which PEFT does not load. Save those modules with the adapter "
        "(modules_to_save), or remove the file if they are not needed."
    )
