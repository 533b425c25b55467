"""What `check --text` prints: what the prompts say of a patch. Facts, no verdict."""

from collections.abc import Sequence

from portllm.cli.render import table
from portllm.cli.render_several import columns
from portllm.pipeline.text_measures import TextMeasures
from portllm.report.text_tables import text_facts, text_notes, text_rows, text_title


def render_text(text: TextMeasures) -> list[str]:
    """What the prompts say of one patch."""
    return [text_title(text), *table(text_facts(text)), *_notes([text])]


def render_texts(texts: Sequence[TextMeasures]) -> list[str]:
    """What the same prompts say of several patches: a line for each."""
    return [text_title(texts[0]), *columns(text_rows(texts)), *_notes(texts)]


def _notes(texts: Sequence[TextMeasures]) -> list[str]:
    return [f"  note: {note}" for note in text_notes(texts)]
