"""What a capture from two checkpoints would do: which tensors are compared as what, and every reason not to.

From headers, tokenizers and samples of whole numbers; no weight is read.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.model.equality import TakenForEqual, look_same
from portllm.checkpoint.model.experts import Experts
from portllm.checkpoint.model.names import EMBEDDING_SUFFIX, is_embedding
from portllm.checkpoint.vocabulary import TOKENIZER_FILE, read_vocabulary
from portllm.errors import Refusal
from portllm.patch.adapter_config import HEAD_NAMES
from portllm.patch.identify import identify
from portllm.patch.record import ModelIdentity
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo

ABSENT = "the model that transformers builds does not have it, or has it in another form"

OTHER_NUMBERS = (
    "samples of it are equal in both models, but the whole tensors differ, and a patch cannot hold a change of whole "
    "numbers. Save the tuned model with the base's."
)

Dense = Literal["keep", "drop"]
"""What becomes of norms, biases, embeddings and heads: kept as the tuned model's whole values, or left out."""


@dataclass(frozen=True, slots=True)
class RowMap:
    """How the rows of a longer or shorter vocabulary follow their tokens.

    Attributes:
        rows: For each row of base, the row of the same token in tuned; -1 where tuned has no such token.
        extra: Rows of tuned whose token base does not have, or that stand for no token.
    """

    rows: tuple[int, ...]
    extra: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TunedPair:
    """One tensor of both models.

    Attributes:
        base: As the base has it.
        tuned: As the tuned model has it.
        module: The linear module it is the weight of, or None for one that is replaced whole or left out.
        row_map: Where the vocabularies differ in length.
        transposed: The models store the module's weight as (d_in, d_out).
    """

    base: TensorInfo
    tuned: TensorInfo
    module: str | None
    row_map: RowMap | None = None
    transposed: bool = False

    @property
    def n_bytes(self) -> int:
        """Bytes of both."""
        return self.base.n_bytes + self.tuned.n_bytes

    @property
    def extra_rows(self) -> tuple[int, ...]:
        """Rows of tuned that the base has none for."""
        return () if self.row_map is None else self.row_map.extra


@dataclass(frozen=True, slots=True)
class ExpertsPair:
    """One weight of all experts of a layer, in both models.

    Attributes:
        base: For each expert the matrices that, stacked, are its part, as the base stores them.
        tuned: The same as the tuned model stores them; cut otherwise, perhaps.
        transposed: The models store each expert's part as (d_in, d_out).
    """

    base: Experts
    tuned: Experts
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of each expert's part: (d_out, d_in)."""
        height, width = sum(info.shape[0] for info in self.base[0]), self.base[0][0].shape[1]
        return (width, height) if self.transposed else (height, width)

    @property
    def n_bytes(self) -> int:
        """Bytes of both."""
        return sum(info.n_bytes for side in (self.base, self.tuned) for matrices in side for info in matrices)


@dataclass(frozen=True, slots=True)
class TunedPlan:
    """A patch about to be captured from two checkpoints.

    Attributes:
        base: What fine-tuning started from.
        tuned: What it ended in.
        source: The base's identity.
        target: The tuned model's identity.
        pairs: By the tensor's name in the base; all but experts.
        experts: By the name that the tensor of all experts of a layer has or would have.
        absent: What the running model has not, or not in this form, and why that is: PEFT cannot be given its change.
        tied: The embedding whose matrix is the head's too, in both; None where there is none.
        rank: Of every delta; None for what stands above the rounding noise.
        max_rank: Bounds the rank where `rank` is None.
        dense: What becomes of the tensors that are no linear weights.
        refusals: Every reason not to run.
        taken: Buffers of whole numbers that are equal in both, by samples.
    """

    base: Checkpoint
    tuned: Checkpoint
    source: ModelIdentity
    target: ModelIdentity
    pairs: Mapping[str, TunedPair]
    experts: Mapping[str, ExpertsPair]
    absent: Mapping[str, str]
    tied: str | None
    rank: int | None
    max_rank: int | None
    dense: Dense
    refusals: tuple[Refusal, ...]
    taken: tuple[TakenForEqual, ...] = ()


def plan_capture_tuned(
    base: Checkpoint,
    tuned: Checkpoint,
    *,
    rank: int | None = None,
    max_rank: int | None = None,
    dense: Dense = "keep",
) -> TunedPlan:
    """Plan to capture a patch from a base and the model that fine-tuning made of it.

    Args:
        base: What fine-tuning started from.
        tuned: What it ended in.
        rank: Of every delta; None keeps what stands above the rounding noise of the two files.
        max_rank: Bounds the rank where `rank` is None.
        dense: Keep norms, biases, embeddings and heads whole, or leave them out.

    Raises:
        ValueError: A rank is below 1.
    """
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None and value < 1:
            raise ValueError(f"{name} {value}: must be at least 1.")
    source, target = identify(base), identify(tuned)
    before, after = _with_own_head(base, tuned), _with_own_head(tuned, base)
    refusals: list[Refusal] = []
    if source.fingerprint == target.fingerprint:
        refusals.append(
            Refusal("--tuned", f"{tuned.name} and {base.name} are the same model: their fingerprints are equal.")
        )
    experts, problems = _pair_experts(base, tuned)
    refusals += problems
    before, after = (
        {name: info for name, info in tensors.items() if info.name not in used}
        for tensors, used in (
            (before, _names(pair.base for pair in experts.values())),
            (after, _names(pair.tuned for pair in experts.values())),
        )
    )
    refusals += _alone(before, base, after, tuned)
    pairs: dict[str, TunedPair] = {}
    maps: dict[tuple[int, int], RowMap | None] = {}
    taken: list[TakenForEqual] = []
    for name in sorted(before.keys() & after.keys()):
        left, right = before[name], after[name]
        if _is_buffer(left) and look_same(left, right):
            taken.append(TakenForEqual(left, right, Refusal(name, OTHER_NUMBERS)))
            continue
        row_map = None
        has_token_rows = _is_vocabulary(name, base, left, right)
        if left.shape != right.shape and has_token_rows:
            lengths = (left.shape[0], right.shape[0])
            if lengths not in maps:
                maps[lengths] = match_rows(base, tuned, n_base=lengths[0], n_tuned=lengths[1])
            row_map = maps[lengths]
        problem = _problem(left, right, (base.name, tuned.name), row_map, has_token_rows=has_token_rows)
        if problem:
            refusals.append(Refusal(name, problem))
        module = _linear_module(name, left, base)
        transposed = module is not None and bool(base.is_transposed(module))
        pairs[name] = TunedPair(left, right, module, row_map, transposed)
    is_tied = base.tied_embedding is not None and tuned.tied_embedding is not None
    tied = next((name for name, info in before.items() if is_tied and info is base.tied_embedding), None)
    absent = dict.fromkeys(pairs.keys() - base.running(pairs).keys(), ABSENT)
    return TunedPlan(
        base, tuned, source, target, pairs, experts, absent, tied, rank, max_rank, dense, tuple(sorted(refusals)),
        tuple(taken),
    )  # fmt: skip


def _pair_experts(base: Checkpoint, tuned: Checkpoint) -> tuple[dict[str, ExpertsPair], list[Refusal]]:
    """The experts that both models have, and why they cannot be compared."""
    pairs = {
        name: ExpertsPair(base.experts[name], tuned.experts[name], base.has_transposed_experts(name))
        for name in base.experts.keys() & tuned.experts.keys()
    }
    refusals = []
    for name, pair in pairs.items():
        shapes = [_expert_shapes(side) for side in (pair.base, pair.tuned)]
        dtypes = {info.dtype for side in (pair.base, pair.tuned) for part in side for info in part} - set(FLOAT_DTYPES)
        if dtypes:
            refusals.append(
                Refusal(
                    name,
                    f"its experts are stored as {', '.join(sorted(dtypes))}; deltas can only be computed from "
                    f"{', '.join(FLOAT_DTYPES)}. Use the unquantized model.",
                )
            )
        elif shapes[0] != shapes[1] or len(set(shapes[0])) != 1:
            said = (f"{len(found)} of {', '.join(map(str, sorted(set(found))))}" for found in shapes)
            refusals.append(
                Refusal(
                    name,
                    f"its experts are {' in the base and '.join(said)} in the tuned model. Both models must have "
                    "the same number of experts, all of the same shape.",
                )
            )
    return dict(sorted(pairs.items())), refusals


def _names(sides: Iterable[Experts]) -> set[str]:
    """The stored names of the tensors that experts are in."""
    return {info.name for side in sides for matrices in side for info in matrices}


def _expert_shapes(experts: Experts) -> list[tuple[int, ...]]:
    return [
        (sum(info.shape[0] for info in matrices), *width)
        for matrices in experts
        for width in {info.shape[1:] for info in matrices}
    ]


def match_rows(base: Checkpoint, tuned: Checkpoint, *, n_base: int, n_tuned: int) -> RowMap | None:
    """How tuned's rows follow their tokens to base's; None where a tokenizer is missing."""
    old, new = read_vocabulary(base), read_vocabulary(tuned)
    if old is None or new is None:
        return None
    rows = [-1] * n_base
    for token, row in old.items():
        if row < n_base and new.get(token, n_tuned) < n_tuned:
            rows[row] = new[token]
    return RowMap(tuple(rows), tuple(sorted(set(range(n_tuned)) - set(rows))))


def _with_own_head(checkpoint: Checkpoint, other: Checkpoint) -> dict[str, TensorInfo]:
    """A model's tensors by name; a tied head counts as one where the other model has a head of its own."""
    if checkpoint.tied_embedding is None or checkpoint.head_name not in other.own_tensors:
        return dict(checkpoint.own_tensors)
    return {**checkpoint.own_tensors, checkpoint.head_name: checkpoint.tied_embedding}


def _is_buffer(info: TensorInfo) -> bool:
    """Whether a tensor holds whole numbers, such as positions, and no quantized weight."""
    return info.dtype not in FLOAT_DTYPES and info.encoding is None


def _alone(
    before: Mapping[str, TensorInfo], base: Checkpoint, after: Mapping[str, TensorInfo], tuned: Checkpoint
) -> Iterator[Refusal]:
    """Tensors that one model has and the other does not."""
    for mine, theirs, owner, other in ((before, after, base, tuned), (after, before, tuned, base)):
        for name in sorted(mine.keys() - theirs.keys()):
            yield Refusal(
                name,
                f"{owner.name} has it, but {other.name} does not. Both models must have the same architecture.",
            )


def _problem(
    left: TensorInfo, right: TensorInfo, names: tuple[str, str], row_map: RowMap | None, *, has_token_rows: bool
) -> str | None:
    """Why two tensors cannot be compared, or None."""
    base, tuned = names
    for info, owner in ((left, base), (right, tuned)):
        if info.dtype not in FLOAT_DTYPES or info.encoding is not None:
            return (
                f"{owner} stores it as {info.stored_as}; deltas can only be computed from "
                f"{', '.join(FLOAT_DTYPES)}. Use the unquantized model."
            )
    if left.shape == right.shape or row_map is not None:
        return None
    shapes = f"it is {_axes(left)} in {base} and {_axes(right)} in {tuned}"
    if has_token_rows:
        return (
            f"{shapes}. When vocabulary sizes differ, rows are matched by token, which needs a {TOKENIZER_FILE} "
            "in both folders."
        )
    return f"{shapes}. The shapes must be equal."


def _is_vocabulary(name: str, base: Checkpoint, left: TensorInfo, right: TensorInfo) -> bool:
    is_named = left is base.embedding or name == base.head_name or name.endswith(EMBEDDING_SUFFIX)
    return is_named and len(left.shape) == len(right.shape) == 2 and left.shape[1] == right.shape[1]


def _linear_module(name: str, info: TensorInfo, base: Checkpoint) -> str | None:
    """The module whose change is low-rank: a linear layer, or the router of experts; neither embedding nor head."""
    module, _, leaf = name.rpartition(".")
    if leaf != "weight" or len(info.shape) != 2 or info in (base.embedding, base.head, base.tied_embedding):
        return None
    is_router = bool(base.expert_parts) and not is_embedding(module)
    is_head = module.rpartition(".")[2] in HEAD_NAMES
    return module if (base.is_linear(module) or is_router) and not is_head else None


def _axes(info: TensorInfo) -> str:
    return "x".join(map(str, info.shape)) or "a scalar"
