"""That every number of a patch is one: an infinity or NaN is refused by its tensor's name before it is passed on."""

import numpy as np

from portllm.errors import NonFiniteError
from portllm.patch.adapter_folder import stored_tensors
from portllm.patch.patch import Patch
from portllm.tensors.info import TensorInfo
from portllm.tensors.windows import load_values

BLOCK_ELEMENTS = 1 << 20
SHOWN = 10


def require_finite(patch: Patch[TensorInfo]) -> None:
    """Read every tensor of a patch, and see to it that it holds numbers.

    Raises:
        NonFiniteError: One holds an infinity or NaN; all of them are named.
        CheckpointError: The patch's file cannot be read.
    """
    broken = [key for key, info in stored_tensors(patch).items() if not _is_finite(info)]
    if broken:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise NonFiniteError(
            f"'{patch.name}': {', '.join(broken[:SHOWN])}{more} contain an infinity or NaN. A training run "
            "diverged: use an earlier checkpoint of it."
        )


def _is_finite(info: TensorInfo) -> bool:
    return all(
        np.isfinite(load_values(info, start, min(start + BLOCK_ELEMENTS, info.n_params))).all()
        for start in range(0, info.n_params, BLOCK_ELEMENTS)
    )
