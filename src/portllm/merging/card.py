"""What the model card of a merged model says."""

from portllm.merging.manifest import MergeReport


def card_of(report: MergeReport) -> list[str]:
    """The lines of the card, of which the patch's own follow."""
    total = report.total
    rows = {
        "tensors changed": f"{len(report.tensors)}, stored as {', '.join(report.dtype)}, rounded to {report.rounding}",
        "tensors copied": str(report.n_copied),
        "gain of the patch that rounding kept": f"{100 * total.kept_gain:.2f} %",
        "identity": f"`{report.output.fingerprint}`",
    }
    return [
        "# A model with a LoRA patch merged in",
        "",
        "Weights of the base plus a patch, added in float32 and rounded once by PortLLM; `portllm.json` has the "
        "measures of each tensor, and `portllm verify MODEL` checks every byte.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        "## How to load it",
        "",
        "As any model, where `MODEL` is this folder:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        'model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="auto")',
        "```",
        "",
        "```",
        "vllm serve MODEL",
        "```",
    ]
