"""Load a model and let it write one token: `python load_model.py MODEL REPORT DEVICE`."""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

folder, out, device = sys.argv[1:]
on_cuda = device == "cuda"
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=device)
with torch.inference_mode():
    token = model(input_ids=torch.tensor([[1]], device=device), use_cache=False).logits[0, -1].argmax().item()
Path(out).mkdir()
report = {
    "token": token,
    "n_params": model.num_parameters(),
    "cuda_allocated_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    "cuda_reserved_bytes": torch.cuda.max_memory_reserved() if on_cuda else None,
}
(Path(out) / "report.json").write_text(json.dumps(report) + "\n")
