"""The demo's settings: chosen so that the whole story takes about five minutes on two cores.

A clinic files passages of health leaflets under the type of question that they answer; its provider goes on training
the base on mathematics. Learning rates are high because both runs are short.
"""

from portllm.training.evolve import EvolveSettings
from portllm.training.lora import TrainSettings

PROMPT = "{passage}\nThis passage answers a question about"
COMPLETION = "type"
TRAIN = TrainSettings(learning_rate=1e-3, epochs=1, batch_size=4, max_tokens=128)

EVOLUTION_TEMPLATE = "{question}\n{answer}"
EVOLVE = EvolveSettings(learning_rate=3e-4, steps=40, batch_size=2, block_tokens=192)

CHECKED_PROMPTS = 48
"""Passages to train on that the check reads, without their answers."""

MAX_TOKENS = 128
"""Most tokens of a held-out row; the longest has about a hundred."""
