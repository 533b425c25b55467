"""What a proof says, as values."""

from typing import Annotated

from portllm.files.record import Recorded, one_of
from portllm.notebook import ShownInNotebook
from portllm.proving.statistics import Verdict


class FaultFit(Recorded, frozen=True, kw_only=True):
    """A fault, and how well it explains what the runtime says.

    Attributes:
        name: Of the fault.
        text: Ends the sentence "The served patch behaves as if ...".
        error: How far the served patch is from the patch with this fault, in nats.
        is_named: It explains all that is off, up to the noise.
    """

    name: str
    text: str
    error: float
    is_named: bool


class Changed(Recorded, frozen=True):
    """A prompt, and the likeliest token after it.

    Attributes:
        prompt: What was asked.
        base: The bare base's in the runtime.
        patch: The served patch's.
        expected: The patch's here.
    """

    prompt: str
    base: str
    patch: str
    expected: str


class Proof(Recorded, ShownInNotebook, frozen=True, kw_only=True):
    """Whether a runtime serves a patch as it is. Distances are root mean squares of log-probabilities, in nats.

    Attributes:
        program: Version of PortLLM.
        runtime: Name of the runtime, or the address of the endpoint.
        version: Of the runtime; empty where it is not known.
        base: The base, as named by the user.
        patch: The patch.
        served: What the runtime loaded.
        verdict: `proven`; `no effect`: the base answers; `wrong`: something else does; `unclear`: the effect is too
            small against the noise to say.
        noise: How far the bare base in the runtime is from the base here.
        effect: How far the patch moves the base here.
        served_effect: How far the served patch moves the served base.
        error: How far the served patch is from the patch here.
        tolerance: How far it may be.
        gain: How much of the effect arrives: 1 for all of it.
        gain_error: Its standard error.
        null_errors: How far random patches of the same size are from the patch here.
        fault: The best explanation of what is off; None where nothing is, or nothing explains it.
        hidden: Faults that the noise would hide.
        misread: Prompts that the runtime reads as another number of tokens.
        n_log_probs: How many log-probabilities were compared.
        changed: Prompts whose likeliest token the patch changes in the runtime.
        changed_here: The same here.
        agreeing: Prompts after which the patch's likeliest token is the same in the runtime and here.
        prompts: All prompts, with the likeliest tokens.
    """

    program: str
    runtime: str
    version: str
    base: str
    patch: str
    served: str
    verdict: Annotated[Verdict, one_of("proven", "no effect", "wrong", "unclear")]
    noise: float
    effect: float
    served_effect: float
    error: float
    tolerance: float
    gain: float
    gain_error: float
    null_errors: tuple[float, ...]
    fault: FaultFit | None
    hidden: tuple[str, ...]
    misread: int
    n_log_probs: int
    changed: int
    changed_here: int
    agreeing: int
    prompts: tuple[Changed, ...]

    def __repr__(self) -> str:
        return f"Proof(runtime={self.runtime!r}, verdict={self.verdict!r}, error={self.error:.3g})"

    @property
    def proven(self) -> bool:
        """The runtime serves the patch as it is."""
        return self.verdict == "proven"
