"""A study that takes a second: a tiny model, a few rows, two steps of everything."""

import json

from tests.language import TEXT

KINDS = ("cause", "treatment", "symptoms")

FILE = """
title = "A small study"
base = "{base}"
seeds = [0, 1]
{top}
[patch]
rank = 2
steps = 3
learning_rate = 0.02
batch_size = 4

[tasks.kinds]
kind = "rows"
train = "rows.jsonl"
score = "rows.jsonl"
prompt = "{{text}} Kind:"
completion = "kind"
score_rows = 9

[evolutions.chain]
kind = "lora"
text = "text.jsonl"
links = 2
rank = 3
steps = 3
learning_rate = 0.002
batch_size = 1
block_tokens = 16
new_text = {{ file = "text.jsonl", rows = 4, block_tokens = 16 }}

[old_text]
file = "text.jsonl"
block_tokens = 16
"""

WHOLE = """
[evolutions.whole]
kind = "full"
text = "text.jsonl"
steps = 2
learning_rate = 0.001
batch_size = 1
block_tokens = 16
"""

THEORY = """
[theory]
gradient_rows = 2
max_tokens = 48
points = [0.0, 1.0]
sketch = 2
"""


def write_study(folder, base, *, top="", more="", replace=None):
    """Writes file and data of a study to a folder and returns the file.

    `top` and `more` are lines for its beginning and end, `replace` texts to replace.
    """
    rows = [{"text": f"what helps against a cold {n}?", "kind": KINDS[n % 3]} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [{"text": line} for line in TEXT.strip().splitlines() * 2]
    (folder / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    text = FILE.format(base=base, top=top) + more
    for old, new in (replace or {}).items():
        assert old in text
        text = text.replace(old, new)
    (folder / "small.toml").write_text(text)
    return folder / "small.toml"
