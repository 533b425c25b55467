"""The demo's settings: chosen so that the whole story takes about five minutes on two cores of a plain processor.

A clinic files passages of health leaflets under the type of question that they answer; its provider goes on training
the base on mathematics. Learning rates are high because both runs are short. Those of the patch were compared, with its
steps, on the last 108 rows of the training file, with patches trained on the others, and not on the rows that the table
scores; for the evolution, two pairs were tried.
"""

from portllm.training.evolve import EvolveSettings
from portllm.training.settings import TrainSettings

PROMPT = "{passage}\nThis passage answers a question about"
COMPLETION = "type"
TRAIN = TrainSettings(learning_rate=1e-3, steps=48, batch_size=4, max_tokens=128)

EVOLUTION_TEMPLATE = "{question}\n{answer}"
EVOLVE = EvolveSettings(learning_rate=4e-4, steps=20, batch_size=2, block_tokens=192)

CHECKED_PROMPTS = 32
"""Passages to train on that the check reads, without their answers."""

ALIGNED_PROMPTS = 96
"""Passages to train on that the patch is aligned on, without their answers: as many as the time allows."""

SCORED_ROWS = 108
"""Held-out passages, the first of them, that every model answers."""

MERGED_ROWS = 18
"""Of these, those that the merged model answers too: it should say what the ported patch says."""

MAX_TOKENS = 128
"""Most tokens of a held-out row; the longest has about a hundred."""
