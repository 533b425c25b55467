"""What an extracted adapter leaves out of what fine-tuning did, whichever tool extracted it."""

import json
import math
from pathlib import Path

import numpy as np
from safetensors import safe_open

from portllm.checkpoint.open import open_checkpoint
from portllm.tensors.windows import load_values

PREFIX = "base_model.model."


def relative_residual(base: Path, tuned: Path, adapter: Path) -> float:
    """`|W - W0 - s·B·A| / |W - W0|` over all adapted weights, in float32, summed in float64."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    before, after = open_checkpoint(str(base)).infos, open_checkpoint(str(tuned)).infos
    left = total = 0.0
    with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 (the file is no mapping)
            if not key.endswith(".lora_A.weight"):
                continue
            module = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            a = file.get_tensor(key).float().numpy()
            b = file.get_tensor(key.replace(".lora_A.", ".lora_B.")).float().numpy()
            alpha = (config.get("alpha_pattern") or {}).get(module, config["lora_alpha"])
            infos = before[f"{module}.weight"], after[f"{module}.weight"]
            w0, w = (load_values(info, 0, info.n_params).reshape(info.shape).astype(np.float32) for info in infos)
            delta = w - w0
            rest = delta - alpha / len(a) * (b @ a)
            left += float(np.square(rest, dtype=np.float64).sum())
            total += float(np.square(delta, dtype=np.float64).sum())
    return math.sqrt(left / total)
