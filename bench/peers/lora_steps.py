"""Steps of LoRA fine-tuning as a user of PEFT writes them: one process, one device, gradient checkpointing.

    python lora_steps.py BASE REPORT --rank 8 --batch 8 --tokens 64 --steps 3 --device cpu

The base stays in its stored dtype; the factors and AdamW's state are float32. Rows are random tokens: their values
change neither time nor memory. The first step is a warm-up, and its time is not reported.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

parser = argparse.ArgumentParser()
parser.add_argument("base")
parser.add_argument("report", type=Path)
for name in ("rank", "batch", "tokens", "steps"):
    parser.add_argument(f"--{name}", type=int, required=True)
parser.add_argument("--device", required=True)
asked = parser.parse_args()

on_cuda = asked.device == "cuda"
torch.manual_seed(0)
base = AutoModelForCausalLM.from_pretrained(asked.base, dtype="auto", device_map=asked.device)
base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
config = LoraConfig(task_type="CAUSAL_LM", r=asked.rank, lora_alpha=2 * asked.rank, target_modules=SEVEN)
model = get_peft_model(base, config).train()
trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4)

step_seconds, losses = [], []
for _ in range(1 + asked.steps):
    began = time.perf_counter()
    ids = torch.randint(base.config.vocab_size, (asked.batch, asked.tokens), device=asked.device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())  # waits for the device
    step_seconds.append(time.perf_counter() - began)

asked.report.mkdir()
report = {
    "n_trained": sum(parameter.numel() for parameter in trained),
    "dtype": str(base.dtype).removeprefix("torch."),
    "step_seconds": step_seconds[1:],
    "losses": losses,
    "cuda_allocated_bytes": torch.cuda.max_memory_allocated() if on_cuda else None,
    "cuda_reserved_bytes": torch.cuda.max_memory_reserved() if on_cuda else None,
}
(asked.report / "report.json").write_text(json.dumps(report) + "\n")
