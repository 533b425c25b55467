"""LoRA fine-tuning with TRL's SFTTrainer and PEFT, as a user writes it: `python sft.py BASE ROWS REPORT SETTINGS`.

Rows are JSONL with `prompt` and `completion`; the loss counts the completion and its end mark. Weights and arithmetic
are float32, and activations are kept, as ours are.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

base, rows, out, settings = sys.argv[1:]
asked = json.loads(settings)


class Clock(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[tuple[float, float]] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """Note the time, of the wall and of this process on all cores."""
        self.ends.append((time.perf_counter(), sum(os.times()[:2])))


clock = Clock()
trainer = SFTTrainer(
    model=AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
    processing_class=AutoTokenizer.from_pretrained(base),
    train_dataset=load_dataset("json", data_files=rows, split="train"),
    peft_config=LoraConfig(
        task_type="CAUSAL_LM", r=asked["rank"], lora_alpha=asked["alpha"], lora_dropout=0.0, target_modules=SEVEN
    ),
    args=SFTConfig(
        output_dir=str(Path(out) / "trainer"),
        max_steps=asked["steps"],
        per_device_train_batch_size=asked["batch_size"],
        learning_rate=asked["learning_rate"],
        lr_scheduler_type="cosine",
        warmup_steps=asked["warmup_steps"],
        max_length=asked["max_tokens"],
        completion_only_loss=True,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        seed=asked["seed"],
    ),
    callbacks=[clock],
)
trainer.train()
trainer.model.save_pretrained(Path(out) / "adapter")
steps = list(zip(clock.ends, clock.ends[1:], strict=False))
report = {
    "n_trained": sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad),
    "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    "step_seconds": [after[0] - before[0] for before, after in steps],
    "step_cpu_seconds": [after[1] - before[1] for before, after in steps],
}
(Path(out) / "report.json").write_text(json.dumps(report) + "\n")
