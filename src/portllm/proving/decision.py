"""What `prove` says first: whether the runtime serves the patch as it is, and what to do where it does not. Pure."""

from collections.abc import Iterator

from portllm.proving.proof import Proof
from portllm.show.headline import Headline
from portllm.show.numbers import counted, three_digits

FAR = 20
"""How many times nearer the served patch has to be than the bare base, which else shows how near the two can be."""


def decide(proof: Proof) -> Headline:
    """The sentence to act on."""
    reasons = list(_reasons(proof))
    if proof.verdict == "proven":
        text = (
            f"Proven: {proof.runtime} serves the patch as it is; its log-probabilities are off by {nats(proof.error)}, "
            f"the bare base's by {nats(proof.noise)}, and the patch moves them by {nats(proof.effect)}."
        )
        return Headline("doubt" if proof.hidden else "good", text, reasons)
    if proof.verdict == "unclear":
        text = (
            f"Not proven, and not refuted: the patch moves the log-probabilities of these prompts by "
            f"{nats(proof.effect)}, while {proof.runtime} and transformers differ by {nats(proof.noise)} on the bare "
            "base."
        )
        return Headline("doubt", text, reasons, _clearer(proof))
    said = "serves the bare base" if proof.verdict == "no effect" else "does not serve the patch as it is"
    why = ""
    if proof.fault is not None and (proof.verdict != "no effect" or proof.fault.name != "not loaded"):
        nearly = "" if proof.fault.is_named else "most nearly "
        why = f": it behaves {nearly}as if {proof.fault.text}"
    return Headline("bad", f"Not proven: {proof.runtime} {said}{why}.", reasons, _mend(proof))


def nats(value: float) -> str:
    """A distance of log-probabilities.

    Example:
        >>> nats(0.01234), nats(0.00001)
        ('0.0123 nats', '1.0e-05 nats')
    """
    return f"{three_digits(value) if value >= 1e-3 or not value else f'{value:.1e}'} nats"


def _reasons(proof: Proof) -> Iterator[str]:
    n = len(proof.prompts)
    yield (
        f"{proof.changed} of {counted(n, 'prompt')} change their next token with the patch ({proof.changed_here} "
        f"here); {proof.agreeing} of {n} have the same one with the patch as here."
    )
    if proof.verdict in ("wrong", "no effect"):
        yield (
            f"The served patch is off by {nats(proof.error)}, where {nats(proof.tolerance)} would pass; "
            f"{100 * proof.gain:.0f} % of the effect arrives."
        )
    if proof.fault is not None and proof.verdict != "proven":
        yield f"The patch with that fault would be off by {nats(proof.fault.error)}."
    if _base_is_changed(proof):
        yield (
            f"The served patch is off by {nats(proof.error)} only: what {proof.runtime} answers as the bare base is "
            "changed while the patch is loaded."
        )
    if proof.misread:
        yield f"{counted(proof.misread, 'prompt')} read as another number of tokens than here."
    if proof.hidden:
        named = ", ".join(proof.hidden[:5]) + (", ..." if len(proof.hidden) > 5 else "")
        yield f"The noise would hide {counted(len(proof.hidden), 'fault')}: {named}."


def _base_is_changed(proof: Proof) -> bool:
    """Whether it is not the runtime that is noisy: the patch is served far better than the bare base."""
    return proof.verdict == "unclear" and proof.error <= proof.noise / FAR and proof.error <= proof.effect / FAR


def _clearer(proof: Proof) -> str:
    if _base_is_changed(proof):
        return "merge the patch: while it is loaded as an adapter, the base is not served as it is"
    if proof.misread:
        return "give the runtime the base's own tokenizer"
    return "pass prompts of the patch's task with --data, and serve the base that was named, in float32 if it can be"


def _mend(proof: Proof) -> str:
    if proof.verdict == "no effect":
        return "look for the names of the adapter's modules in the runtime's log, or merge the patch"
    return "export the patch for this runtime, or merge it"
