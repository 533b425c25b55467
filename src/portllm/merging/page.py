"""A merge as HTML. Pure."""

from portllm.merging.manifest import MergeReport
from portllm.merging.tables import merge_facts
from portllm.show.headline import Headline
from portllm.show.html.figure import facts
from portllm.show.html.page import fragment


def notebook(report: MergeReport) -> str:
    """What a notebook shows: what was written, and what rounding took of the patch."""
    return fragment(
        Headline("plain", f"{report.output.name}: merged into {report.into.name}"), facts(merge_facts(report))
    )
