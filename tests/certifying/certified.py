"""A tiny update with a patch that was carried over it, and questions to ask: what the tests of certificates share."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.language import make_reader
from tests.models import make_adapter, make_evolved

CHOICES = ("cause", "treatment", "symptoms", "tea")
PROMPT = "{question}? Kind:"
WORDS = ("what causes", "how is", "who has", "what helps against", "is", "which kind of")
THINGS = ("measles", "a cold", "a fever", "tea", "rest")


@dataclass(frozen=True)
class Story:
    """The folders of an update and of its patches."""

    base: Path
    evolved: Path
    patch: Path
    ported: Path
    merged: Path

    def models(self):
        """Arguments for `certify` that name the evolved model and the ported patch."""
        return {
            "base": open_checkpoint(self.base),
            "evolved": open_checkpoint(self.evolved),
            "ported": load_patch(self.ported),
        }


def make_story(folder, *, drift=0.03):
    """Writes a base, a patch of it, an evolved model, the ported patch and the merged model."""
    base = make_reader(folder / "base")
    evolved = make_evolved(base, folder / "evolved", drift=drift)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, evolved / name)
    make_adapter(base, folder / "adapter", size=0.2)
    trained = {"prompt": PROMPT, "completion": "kind"}
    patch = capture_adapter(
        load_patch(folder / "adapter"),
        base=open_checkpoint(base),
        out=folder / "patch",
        method="train",
        settings=trained,
    )
    ported = port(patch, evolved=open_checkpoint(evolved), out=folder / "ported")
    merge(ported, into=open_checkpoint(evolved), out=folder / "merged")
    return Story(base, evolved, folder / "patch", folder / "ported", folder / "merged")


def write_questions(file, *, labels=False):
    """Writes one row for each pair of words and thing."""
    rows = [{"question": f"{words} {thing}"} for words in WORDS for thing in THINGS]
    if labels:
        rows = [{**row, "kind": CHOICES[number % 3]} for number, row in enumerate(rows)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
