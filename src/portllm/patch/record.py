"""The record in `patch.json`: the base of a patch, how it was captured, and every port it went through."""

from collections.abc import Mapping
from types import NoneType
from typing import Annotated, Any, TypeAlias

from msgspec import Meta, field

from portllm.files.record import END, Blake3, NamedBlake3, Recorded, one_of
from portllm.patch.side_files import SIDE_FILES

FORMAT = 1
"""Version of the record's layout."""

Text: TypeAlias = Annotated[str, Meta(min_length=1, description="a text that is not empty")]
PATCH_FILES = ("adapter_config.json", "adapter_model.safetensors")
PatchFileDigests: TypeAlias = Annotated[
    Mapping[Annotated[str, one_of(*PATCH_FILES)], Blake3],
    Meta(min_length=len(PATCH_FILES), description=f"the digests of {' and '.join(PATCH_FILES)}"),
]
"""The blake3 digest of all bytes of each file of an adapter."""

RecordedFiles: TypeAlias = Annotated[
    Mapping[Annotated[str, one_of(*PATCH_FILES, *SIDE_FILES)], Blake3],
    Meta(
        min_length=len(PATCH_FILES),
        description=f"the digests of {' and '.join(PATCH_FILES)}",
        extra_json_schema={"required": list(PATCH_FILES)},
    ),
]
"""The blake3 digest of all bytes of each other file of a patch."""


class ModelIdentity(Recorded, frozen=True):
    """A model by content, and by the name that the user gave it.

    Attributes:
        name: As typed by the user; for people, never compared.
        fingerprint: See `portllm.checkpoint.model.identity`; what is compared.
        digest: Over all bytes, where they were read anyway; None otherwise.
        revision: The commit hash of a model of the Hugging Face Hub, else None; for people, never compared.
        quantization: How its weights are stored where that is not plainly, such as `nf4-double` or `Q4_K, Q6_K`.
        rounded: The fingerprint that it would have in a coarser dtype, by dtype: by these it is known in that one.
    """

    name: str
    fingerprint: Annotated[
        str, Meta(pattern=f"^s4k1:[0-9a-f]{{40}}{END}", description="s4k1: and 40 hexadecimal digits")
    ]
    digest: NamedBlake3 | None
    revision: (
        Annotated[str, Meta(pattern=f"^[0-9a-f]{{40,64}}{END}", description="40 to 64 hexadecimal digits")] | None
    ) = field(default_factory=NoneType)
    quantization: Text | None = None
    rounded: Mapping[str, str] = field(default_factory=dict)


class FittedTo(Recorded, frozen=True):
    """The quantization that the deltas were trained on, if the base named is the 16-bit model (QLoRA).

    Attributes:
        scheme: How the base was quantized when it was loaded: a key of `portllm.measures.four_bit.SCHEMES`.
        left_alone: The ends of the names of linear modules that stayed in 16 bit.
    """

    scheme: Annotated[str, one_of("nf4", "nf4-double", "fp4", "fp4-double")]
    left_alone: tuple[Text, ...]


class Capture(Recorded, frozen=True):
    """How the deltas came to be.

    Attributes:
        method: `adapter` (an existing PEFT folder), `train`, `tuned` (two checkpoints) or `combine` (several patches).
        settings: Every parameter that shaped the result, and for `train` what it was trained on.
        fitted_to: What they were fitted to, where that is not the weights of the model named; else None.
    """

    method: Annotated[str, one_of("adapter", "train", "tuned", "combine")]
    settings: Mapping[str, Any]
    fitted_to: FittedTo | None = None


class Choice(Recorded, frozen=True):
    """Why a port went by its method, where that was not named but chosen by what `check` found.

    Attributes:
        verdict: Whether the patch will hold: an `Answer`.
        reason: What led from it to the method.
        findings: Everything that spoke for or against the patch, the gravest first.
        is_forced: Whether it was ported against the verdict.
    """

    verdict: Annotated[str, one_of("holds", "holds aligned", "uncertain", "will not hold")]
    reason: Text
    findings: tuple[Text, ...]
    is_forced: bool = field(name="forced")


class Tried(Recorded, frozen=True):
    """A candidate that was measured before one was taken, the simplest first.

    Attributes:
        name: What it is.
        mean: What candidates were compared by, over the prompts to choose by: the distance from the old specialist's
            answers, `√(KL / 2)`, or, where rows had right answers, the nats per token that these cost.
        error: Standard error of its mean's difference from the best one's, row by row.
        general_nats: What it costs beyond addition, in nats per token of general text; None without such text.
        general_error: Standard error of that, row by row.
        is_too_dear: Whether both together are more than was allowed, so that it could not be taken.
    """

    name: Text
    mean: float
    error: float
    general_nats: float | None = None
    general_error: float | None = None
    is_too_dear: bool = field(name="too_dear", default=False)


class PortStep(Recorded, frozen=True):
    """One port: from which model, to which, by which method, and what was measured on the way.

    Attributes:
        source: The base before.
        target: The base after.
        method: Its id, with every parameter that changes its result.
        evidence: What was measured.
        left_out: By tensor, tokens whose change was dropped, for the target does not have them.
        choice: Why this method, where it was chosen; None where it was named.
        tried: The candidates of a method that measures several.
    """

    source: ModelIdentity = field(name="from")
    target: ModelIdentity = field(name="to")
    method: Text
    evidence: Mapping[str, int | float]
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    choice: Choice | None = None
    tried: tuple[Tried, ...] = ()


class PatchRecord(Recorded, frozen=True, tag_field="format", tag=FORMAT):
    """The content of `patch.json`.

    Attributes:
        program: Version of PortLLM that wrote the record.
        base: The model that the patch may be used with now.
        capture: Where the deltas come from.
        ports: Oldest first; the last one's target is `base`.
        tensors: blake3 digest of each stored tensor's bytes.
        files: blake3 digest of each other file of the patch; known once they are written.
        labels: Names of the labels of a classifier's head, where the adapter's folder said them.
        added_tokens: Tokens that were added to the vocabulary of `base` for the patch, with their rows.
    """

    program: str
    base: ModelIdentity
    capture: Capture
    ports: tuple[PortStep, ...]
    tensors: Mapping[str, Blake3]
    files: RecordedFiles
    added_tokens: Mapping[str, Annotated[int, Meta(ge=0)]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.files and (missing := [name for name in PATCH_FILES if name not in self.files]):
            raise ValueError(f"'files' lacks the digest of {' and '.join(missing)}")
