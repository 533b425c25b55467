"""Where a verdict turns: each number with what it divides and where it comes from. Data; `docs/check.md` shows it."""

from dataclasses import dataclass

from portllm.measures.quantization_gap import BROKE_MODELS


@dataclass(frozen=True, slots=True)
class Threshold:
    """A number that a measure is compared with.

    Attributes:
        name: Its name in reports.
        value: The number.
        divides: What lies on either side of it.
        source: Who measured it; "ours" where nobody has, which is said wherever it decides.
    """

    name: str
    value: float
    divides: str
    source: str


SHORT_DRIFT = Threshold(
    "short drift", 0.001,
    "relative drift up to which plain addition ported every patch",
    "ours: on updates of SmolLM2-135M patches answered as right as before up to 0.08 %, within three points; from "
    "0.15 % on some lost 4 points, from 0.24 % on 12, while others lost nothing (studies/results)",
)  # fmt: skip

ALIGNED_DRIFT = Threshold(
    "aligned drift", 0.02,
    "relative drift up to which ports by align held for every patch",
    "ours: 40 ports by align of SmolLM2-135M and Gemma 3 270M over updates of 0.3 to 1.4 % answered as right as "
    "before, within three points, where addition lost up to 29; at 2.3 %, one of four lost 7 (studies/results)",
)  # fmt: skip

CONTINUATION_COSINE = Threshold(
    "continuation cosine", 0.9,
    "cosine above which the evolved weights are called a continuation of the base's, below which siblings",
    "ours: random drift of half the weights' norm has it; UpgradeBench (arXiv 2608.20918) places the decay of "
    "plain addition between 46 B and 2.9 T tokens of further training and gives no cosine",
)  # fmt: skip

INDEPENDENT_COSINE = Threshold(
    "independent cosine", 0.1,
    "cosine below which the weights are called independent",
    "ours: independent weights of a million elements have a cosine of 0.001; outliers that every training run puts in "
    "the same places may raise it",
)  # fmt: skip

ALIGNED_COSINE = Threshold(
    "alignment with the drift", 0.2,
    "cosine of patch and drift above which the update is taken to contain (or to undo) the patch",
    "ours: patch and drift that know nothing of each other have a cosine of about 1/√(m·n), below 0.001",
)  # fmt: skip

OVERLAP_SHARE = Threshold(
    "overlap", 0.1,
    "fraction of the drift in the patch's input or output directions, above chance, at which the update "
    "changed what it uses",
    "ours: by chance the share is rank / width, 0.002 for rank 8 of 4096",
)  # fmt: skip

KEPT_GAIN = Threshold(
    "kept gain", 0.99,
    "fraction of the patch that must survive rounding for a merge to be advised without a warning",
    "bfloat16 keeps 93 % of a patch of 0.3 % of the weights' norm, and 55 % of one of 0.1 % (a simulation with normal "
    "weights; the measure is exact)",
)  # fmt: skip

QUANTIZATION_GAP = Threshold(
    "quantization gap", BROKE_MODELS,
    "quantization error relative to the patch, which was trained without it, above which merged models were "
    "seen to break",
    "unsloth-zoo pull request 810: ratios of 10 to 150 on Falcon-H1",
)  # fmt: skip

AGREEMENT = Threshold(
    "agreement", 0.9,
    "fraction of prompts to which the ported model begins its answer as the old specialist did, below which "
    "the patch is in doubt",
    "ours: of 106 patches on updates of SmolLM2-135M (docs/forecast.md, studies/results), all classifiers that "
    "answered more than four points fewer right than on the base lay below it",
)  # fmt: skip

ALL = (
    SHORT_DRIFT,
    ALIGNED_DRIFT,
    CONTINUATION_COSINE,
    INDEPENDENT_COSINE,
    ALIGNED_COSINE,
    OVERLAP_SHARE,
    KEPT_GAIN,
    QUANTIZATION_GAP,
    AGREEMENT,
)
