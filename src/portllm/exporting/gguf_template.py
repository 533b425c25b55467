"""Another GGUF file of the same model as the template of a new one: its metadata and tokenizer, held against a model.

What a GGUF file says of a model besides its weights follows from the model's configuration and tokenizer, by rules that
only llama.cpp's converter has. A file of an older version of the model, quantized or not, says the same as long as both
are the same. So every entry that it has is compared with what the model says; one whose meaning is not known here is
refused, as is what the model says and the file does not.

Source of the names: https://github.com/ggml-org/llama.cpp, `set_gguf_parameters` in `conversion/` for the architectures
of `checkpoint/gguf/architectures.json`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from portllm.checkpoint.gguf.file import GGUFFile
from portllm.checkpoint.gguf.header import StoredTensor
from portllm.checkpoint.gguf.places import Place, architecture_of, place_of
from portllm.checkpoint.gguf.tensors import architectures
from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import side_file
from portllm.checkpoint.vocabulary import TOKENIZER_FILE, vocabulary_in
from portllm.errors import Refusal
from portllm.files.input_file import open_unchanged
from portllm.files.json_file import read_json
from portllm.files.source import LocalFile
from portllm.merging.plan import MergePlan, MergeStep

OPTION = "--gguf"
TOKENS, MERGES = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
ROPE_FACTORS = {"llama3": ("rope_freqs.weight",), "longrope": ("rope_factors_long.weight", "rope_factors_short.weight")}
"""Tensors that follow from the configuration, by the kind of rotary scaling that has them."""

LLAMA3 = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
"""What a configuration says of llama3's scaling."""

SCALINGS = {"linear": "linear", "yarn": "yarn", "longrope": "longrope", "su": "longrope"}
"""What llama.cpp calls a kind of rotary scaling; of the others it has none."""

DERIVED = ("rope.scaling.attn_factor",)
"""Metadata that follows from other entries, which are compared."""

WHERE_ABSENT: Mapping[str, object] = {
    "rope.freq_base": 10000.0,
    "rope.freq_base_swa": 10000.0,
    "rope.scaling.type": "none",
}
"""What llama.cpp takes where a file says nothing."""

HEAD_SIZES = ("attention.key_length", "attention.value_length")
"""What llama.cpp takes the width over the number of heads for, where a file says nothing; as many rows turn."""

NEEDED = (
    *WHERE_ABSENT, *HEAD_SIZES, "rope.dimension_count", "rope.scaling.factor", "final_logit_softcapping",
    "attn_logit_softcapping", "attention.scale", "embedding_scale", "residual_scale", "logit_scale",
)  # fmt: skip
"""What changes a model's answers, and must be in the file where the model says it."""

HARMLESS = ("context_length", "rope.scaling.original_context_length", "vocab_size")
"""What changes no answer, and may be in the file where the model says nothing."""

PAD = "[PAD{}]"
"""What llama.cpp's converter calls a row of the embedding that has no token."""


def template_refusals(file: GGUFFile, model: Checkpoint, tokenizer: Mapping[str, LocalFile]) -> Iterator[Refusal]:
    """Why a file cannot be the template of a model: its architecture, its numbers or its tokens are other ones.

    Args:
        file: The file.
        model: The model that gets a file like it.
        tokenizer: Files of a tokenizer that is used in place of the model's own, by name.

    Raises:
        CheckpointError: The file or the tokenizer is damaged.
    """
    name = file.text("general.architecture")
    expected = architecture_of(model)
    if expected is None:
        yield Refusal(
            model.name,
            f"how llama.cpp stores the tensors of model type '{model.config.get('model_type')}' is not known here. "
            "Merge the patch into the folder, and convert that with llama.cpp's convert_hf_to_gguf.py.",
        )
        return
    if name != expected:
        yield Refusal(
            OPTION, f"{file.source} is a file of architecture '{name}'; {model.name} makes one of '{expected}'."
        )
        return
    if differing := list(_differing(file, name, model)):
        yield Refusal(
            OPTION,
            f"{file.source} is of a model with other settings than {model.name}: {'; '.join(differing)}. Pass a file "
            "of a version with the same config.json.",
        )
    if (odd := _other_tokens(file, model, tokenizer)) is not None:
        yield Refusal(OPTION, f"{file.source} has another tokenizer than {model.name}: {odd}.")


def placed_steps(merge: MergePlan) -> Iterator[tuple[MergeStep, Place | None]]:
    """Each tensor that a merged model loads, with its place in a GGUF file; None where that has none."""
    model = merge.into
    shared = model.tied_embedding
    of_embedding = None if shared is None or shared.name not in merge.steps else merge.steps[shared.name]
    for name, step in merge.steps.items():
        current = model.current_name(name)
        if model.family is not None and not model.family.loads(current, model.config):
            continue
        if of_embedding is not None and current == model.head_name and step.change is of_embedding.change:
            continue  # stored twice; a GGUF file has it once
        yield step, place_of(current, model)


def said_by(config: Mapping[str, object]) -> dict[str, object]:
    """What a configuration says of the metadata of a GGUF file, without the architecture's name; None for nothing.

    Example:
        >>> said = said_by({"hidden_size": 8, "num_attention_heads": 2, "rope_parameters": {"rope_theta": 5e5}})
        >>> said["attention.key_length"], said["rope.freq_base"], said["rope.scaling.type"], said["block_count"]
        (4, 500000.0, 'none', None)
    """

    def number(*names: str) -> int | float | None:
        return next((value for name in names if isinstance(value := config.get(name), int | float)), None)

    hidden, heads = number("hidden_size"), number("num_attention_heads")
    head = number("head_dim") or (int(hidden // heads) if hidden and heads else None)
    rope = _rope(config)
    share = rope.get("partial_rotary_factor") or number("partial_rotary_factor") or 1.0
    return {
        "attention.head_count": heads,
        "attention.head_count_kv": number("num_key_value_heads") or heads,
        "attention.key_length": head,
        "attention.layer_norm_rms_epsilon": number("rms_norm_eps"),
        "attention.scale": number("attention_multiplier"),
        "attention.sliding_window": number("sliding_window"),
        "attention.value_length": head,
        "attn_logit_softcapping": number("attn_logit_softcapping"),
        "block_count": number("num_hidden_layers"),
        "context_length": number("max_position_embeddings"),
        "embedding_length": hidden,
        "embedding_scale": number("embedding_multiplier"),
        "feed_forward_length": number("intermediate_size"),
        "final_logit_softcapping": number("final_logit_softcapping"),
        "logit_scale": number("logits_scaling"),
        "residual_scale": number("residual_multiplier"),
        "rope.dimension_count": None if head is None or not isinstance(share, int | float) else int(head * share),
        "rope.freq_base": rope.get("rope_theta"),
        "rope.freq_base_swa": rope.get("local_theta"),
        "rope.scaling.factor": rope.get("factor") if _kind(rope) in ("linear", "yarn") else None,
        "rope.scaling.original_context_length": rope.get("original_max_position_embeddings")
        or number("original_max_position_embeddings"),
        "rope.scaling.type": SCALINGS.get(_kind(rope), "none"),
        "vocab_size": number("vocab_size"),
    }  # fmt: skip


def _rope(config: Mapping[str, object]) -> dict[str, object]:
    """What is said of rotary positions in layers that see everything, and the base of the local ones."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    whole: dict[str, object] = dict(found) if isinstance(found, dict) else {}
    local = whole.get("sliding_attention")
    if isinstance(full := whole.get("full_attention"), dict):
        whole = dict(full)
    theta = local.get("rope_theta") if isinstance(local, dict) else config.get("rope_local_base_freq")
    return {"rope_theta": config.get("rope_theta"), **whole, "local_theta": theta}


def _kind(rope: Mapping[str, object]) -> str:
    return str(rope.get("rope_type") or rope.get("type") or "default")


def _differing(file: GGUFFile, name: str, model: Checkpoint) -> Iterator[str]:
    """Each entry of the metadata that is not as the model says, or of which nobody knows."""
    said = said_by(model.config)
    there = {key.removeprefix(f"{name}."): file.header.fields[key] for key in file.keys(f"{name}.")}
    for key, value in there.items():
        if key in DERIVED:
            continue
        if key not in said:
            yield f"'{name}.{key}' is not known here"
        elif said[key] is None and key not in HARMLESS and not _is_equal(value, WHERE_ABSENT.get(key)):
            yield f"'{name}.{key}' is {value}, and config.json says nothing of it"
        elif said[key] is not None and not _is_equal(value, said[key]):
            yield f"'{name}.{key}' is {value}, and would be {said[key]}"
    per_head = said_by({**model.config, "head_dim": None})["attention.key_length"]
    absent = {**WHERE_ABSENT, **dict.fromkeys(HEAD_SIZES, per_head)}
    absent["rope.dimension_count"] = there.get("attention.key_length", per_head)
    for key in NEEDED:
        if key not in there and said[key] is not None and not _is_equal(absent.get(key), said[key]):
            yield f"'{name}.{key}' is missing, and would be {said[key]}"
    n_rows = None if model.embedding is None else model.embedding.shape[0]
    if n_rows is not None and n_rows != file.length(TOKENS):
        yield f"it has {file.length(TOKENS)} tokens, the embedding {n_rows} rows"
    yield from _other_factors(file, name, model)


def _is_equal(found: object, expected: object) -> bool:
    if isinstance(found, int | float) and isinstance(expected, int | float):
        return bool(np.float32(found) == np.float32(expected))
    return found == expected


def _other_factors(file: GGUFFile, name: str, model: Checkpoint) -> Iterator[str]:
    """How the factors of rotary scaling differ that a file has as tensors."""
    rope = _rope(model.config)
    kind = SCALINGS.get(kind := _kind(rope), kind)
    if kind not in ("default", "llama3", *SCALINGS):
        yield f"rotary scaling '{kind}' is not known here"
    expected = dict(zip(ROPE_FACTORS.get(kind, ()), _factors(kind, rope, model.config), strict=False))
    for tensor in sorted({*architectures()[name].left_out, *expected}):
        stored, wanted = file.header.tensors.get(tensor), expected.get(tensor)
        if stored is None and wanted is not None:
            yield f"'{tensor}' is missing, which {kind} needs"
        elif stored is not None and wanted is None:
            yield f"'{tensor}' is there, and {kind} rotary positions have none"
        elif stored is not None and wanted is not None and not _is_near(read_vector(file, stored), wanted):
            yield f"'{tensor}' has other values than {kind} gives"


def _factors(kind: str, rope: Mapping[str, object], config: Mapping[str, object]) -> list[list[float]]:
    """What each turn is divided by, in the order of `ROPE_FACTORS`."""
    if kind == "longrope":
        return [[float(value) for value in values] for name in ("long_factor", "short_factor")
                if isinstance(values := rope.get(name), list)]  # fmt: skip
    if kind != "llama3":
        return []
    head = said_by(config)["attention.key_length"]
    numbers = [rope.get(name) for name in LLAMA3]
    if not isinstance(head, int) or not all(isinstance(number, int | float) for number in numbers):
        return [[]]  # no file has these
    theta, factor, low, high, context = (float(str(number)) for number in numbers)
    factors = []
    for turn in range(0, head, 2):
        length = 2 * math.pi * theta ** (turn / head)
        smooth = min(1.0, max(0.0, (context / length - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return [factors]


def _is_near(found: np.ndarray, expected: list[float]) -> bool:
    return found.shape == (len(expected),) and bool(np.allclose(found, expected, rtol=1e-4))


def read_vector(file: GGUFFile, tensor: StoredTensor) -> np.ndarray:
    """The values of a float32 tensor.

    Raises:
        CheckpointError: It is stored as something else.
    """
    if tensor.type != "F32":
        raise file.refuse(f"its tensor '{tensor.name}' is stored as {tensor.type}; expected F32.")
    with os.fdopen(open_unchanged(file.source), "rb") as stream:
        stream.seek(tensor.start)
        return np.frombuffer(stream.read(tensor.stop - tensor.start), "<f4")


def _other_tokens(file: GGUFFile, model: Checkpoint, tokenizer: Mapping[str, LocalFile]) -> str | None:
    """How the tokens of a file differ from those of a model; None where they are the same."""
    own = tokenizer.get(TOKENIZER_FILE)
    path: Path | None = side_file(model, TOKENIZER_FILE) if own is None else own.path
    rows = None if path is None else vocabulary_in({TOKENIZER_FILE: path})
    if path is None or rows is None:
        return f"it cannot be compared, because the model has no {TOKENIZER_FILE}"
    tokens = file.texts(TOKENS)
    by_row = {row: token for token, row in rows.items()}
    for row, token in enumerate(tokens):
        if _as_piece(by_row.get(row, PAD.format(row))) != _as_piece(token):
            return f"token {row} is {token!r}, and would be {by_row.get(row)!r}"
    inner = read_json(path).get("model")
    merges = inner.get("merges") if isinstance(inner, dict) else None
    if file.has(MERGES) and isinstance(merges, list):
        listed = [merge if isinstance(merge, str) else " ".join(map(str, merge)) for merge in merges]
        if listed != file.texts(MERGES):
            return "its merges are other ones"
    return None


def _as_piece(token: str) -> str:
    """A token with SentencePiece's sign for a space, which the two may or may not have written out."""
    return token.replace("▁", " ")
