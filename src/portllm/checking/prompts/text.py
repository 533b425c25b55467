"""What `check --text` prints: what the prompts say of a patch. Facts, no verdict."""

from collections.abc import Sequence

from portllm.checking.prompts.measures import TextMeasures
from portllm.checking.prompts.tables import text_facts, text_notes, text_rows, text_title
from portllm.show.table import columns, table


def render_text(text: TextMeasures) -> list[str]:
    """What the prompts say of one patch."""
    return [text_title(text), *table(text_facts(text)), *_notes([text])]


def render_texts(texts: Sequence[TextMeasures], *, width: int | None = None) -> list[str]:
    """What the same prompts say of several patches: a line for each."""
    return [text_title(texts[0]), *columns(text_rows(texts), width=width), *_notes(texts)]


def _notes(texts: Sequence[TextMeasures]) -> list[str]:
    return [f"  note: {note}" for note in text_notes(texts)]
