"""What a merge did as a table, for the terminal and a notebook alike. Pure."""

from portllm.measures.quantization_gap import QuantizationGap
from portllm.merging.manifest import MergeReport
from portllm.show.numbers import percent


def merge_facts(report: MergeReport) -> dict[str, str]:
    """What was written, and what rounding took of the patch."""
    total, worst = report.total, report.worst
    rows = {
        "identity": f"{report.output.fingerprint}, {report.output.digest}",
        "patch size": f"{percent(total.relative_size, digits=2)} of the changed weights' norm",
    }
    if total.delta_sq == 0:
        return {**rows, "kept gain": "none to keep: the patch changes nothing"}
    rows |= {
        "kept gain": f"{percent(total.kept_gain)} of the patch survives rounding to {'/'.join(report.dtype)}",
        "rounding loss": f"{percent(total.rounding_loss)} of the patch's norm",
    }
    if report.device != "cpu":
        rows["computed on"] = f"{report.device}: sums may differ from those of a CPU in the last bit"
    if worst is not None:
        rows["worst tensor"] = f"{worst}, which keeps {percent(report.tensors[worst].kept_gain)}"
    if report.quantization is not None:
        rows["quantization"] = _quantization(report.quantization)
    return rows


def _quantization(gap: QuantizationGap) -> str:
    """How large is what quantization took, in patches."""
    if gap.worst is None:
        return f"none of the changed weights was quantized ({gap.scheme})"
    return (
        f"W - dequant(W) of {gap.scheme} is {gap.total.ratio:.3g} times the patch, at worst "
        f"{gap.tensors[gap.worst].ratio:.3g} times: {gap.worst}"
    )
