"""A scoring pass with transformers and PEFT: `python scoring_pass.py BASE ADAPTER PROMPTS REPORT`.

Prompts in batches of 16 of similar length, padded on the left, in float32; of each, the log-probabilities of the next
token. What is timed is the passes alone, without imports and loading.
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

BATCH = 16

base, adapter, prompts, report = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter).eval()
texts = sorted((json.loads(line)["prompt"] for line in Path(prompts).read_text().splitlines()), key=len)
began, began_cpu = time.perf_counter(), time.process_time()
with torch.inference_mode():
    for start in range(0, len(texts), BATCH):
        batch = tokenizer(texts[start : start + BATCH], padding=True, return_tensors="pt")
        model(**batch, use_cache=False).logits[:, -1].log_softmax(dim=-1)
seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
Path(report).write_text(
    json.dumps({"pass_seconds": seconds, "pass_cpu_seconds": cpu_seconds, "rows": len(texts)}) + "\n"
)
