"""The tensors of a 4-bit checkpoint as bitsandbytes and transformers save it: several stored ones make one weight.

Beside the packed `X.weight` stand its scales (`.absmax`), the 16 values that a half byte can mean (`.quant_map`), with
double quantization the scales' own scales and values (`.nested_absmax`, `.nested_quant_map`), and a small JSON text
that says the rest (`.quant_state.bitsandbytes__nf4`). Nothing in them is trusted: sizes that do not fit are refused.

Source: `QuantState.as_dict` in bitsandbytes' `functional.py`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from portllm.errors import CheckpointError
from portllm.files.json_text import parse_json
from portllm.tensors.encoding import FourBit
from portllm.tensors.info import TensorInfo

MAX_STATE_BYTES = 4096
CODE_LENGTH = 16
NESTED_CODE_LENGTH = 256

_STATE = re.compile(r"(?P<weight>.+)(?P<suffix>\.quant_state\.bitsandbytes__(?P<kind>nf4|fp4))", re.DOTALL)
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}

ReadSpans = Callable[[Sequence[tuple[TensorInfo, int, int]]], Iterator[bytes]]


def joined(infos: Mapping[str, TensorInfo], read: ReadSpans) -> Mapping[str, TensorInfo]:
    """The same tensors with each 4-bit weight as one: its logical shape and dtype, its encoding and its parts.

    Args:
        infos: The tensors as the headers list them.
        read: What reads spans of them; asked for the small JSON texts, all at once.

    Raises:
        CheckpointError: A part is missing, or does not have the size that the others imply.
    """
    states = {name: match for name in infos if (match := _STATE.fullmatch(name))}
    if not states:
        return infos
    for name in states:
        if infos[name].n_bytes > MAX_STATE_BYTES:
            raise _damaged(infos[name], f"has {infos[name].n_bytes} bytes, expected at most {MAX_STATE_BYTES}")
    texts = read([(infos[name], 0, infos[name].n_bytes) for name in states])
    weights: dict[str, TensorInfo] = {}
    used: set[str] = set()
    for (name, match), text in zip(states.items(), texts, strict=True):
        weight = _weight(infos, match, _facts(infos[name], text))
        if match["weight"] in weights:
            raise _damaged(infos[name], f"is a second quantization state of '{match['weight']}'")
        weights[match["weight"]] = weight
        used |= {match["weight"] + suffix for suffix, _ in weight.parts}
    return {name: weights.get(name, info) for name, info in infos.items() if name not in used}


def _facts(state: TensorInfo, text: bytes) -> dict[str, object]:
    try:
        facts = parse_json(text)
    except ValueError as error:
        raise _damaged(state, f"is not valid JSON ({error})") from error
    if not isinstance(facts, dict):
        raise _damaged(state, "is not a JSON object")
    return facts


def _weight(infos: Mapping[str, TensorInfo], match: re.Match[str], facts: Mapping[str, object]) -> TensorInfo:
    """One weight from its parts and from what its JSON text says."""
    name, state = match["weight"], infos[match.group()]
    if facts.get("quant_type") != match["kind"]:
        raise _damaged(state, f"has quant_type {facts.get('quant_type')!r}, expected '{match['kind']}'")
    block_size = _whole(state, facts, "blocksize")
    shape = facts.get("shape")
    if not isinstance(shape, list) or not all(type(axis) is int and 0 < axis < 2**48 for axis in shape) or not shape:
        raise _damaged(state, f"has shape {str(shape)[:80]}, expected a list of sizes")
    dtype = _DTYPES.get(str(facts.get("dtype")))
    if dtype is None:
        raise _damaged(state, f"has dtype {str(facts.get('dtype'))[:80]!r}, expected one of {', '.join(_DTYPES)}")
    n_params = math.prod(shape)
    n_blocks = -(-n_params // block_size)
    packed = _part(infos, name, "", "U8", -(-n_params // 2))
    is_double = "nested_blocksize" in facts
    parts = {
        ".absmax": _part(infos, name, ".absmax", "U8" if is_double else "F32", n_blocks),
        ".quant_map": _part(infos, name, ".quant_map", "F32", CODE_LENGTH),
    }
    encoding = FourBit(match["kind"], block_size)
    if is_double:
        nested_size = _whole(state, facts, "nested_blocksize")
        offset = facts.get("nested_offset")
        if not isinstance(offset, float | int) or not math.isfinite(offset) or facts.get("nested_dtype") != "float32":
            raise _damaged(state, "has no finite nested_offset, or a nested_dtype other than float32")
        parts[".nested_absmax"] = _part(infos, name, ".nested_absmax", "F32", -(-n_blocks // nested_size))
        parts[".nested_quant_map"] = _part(infos, name, ".nested_quant_map", "F32", NESTED_CODE_LENGTH)
        encoding = FourBit(match["kind"], block_size, nested_size, float(offset))
    parts[match["suffix"]] = state
    return replace(
        packed, dtype=dtype, shape=tuple(shape), encoding=encoding, parts=tuple(parts.items()), listed=packed
    )


def _part(infos: Mapping[str, TensorInfo], name: str, suffix: str, dtype: str, count: int) -> TensorInfo:
    info = infos.get(name + suffix)
    if info is None:
        raise CheckpointError(
            f"'{name}': is stored in 4 bit, and the checkpoint lacks '{name}{suffix}', which that needs. Download "
            "or save it again."
        )
    if (info.dtype, info.n_params) != (dtype, count):
        raise _damaged(info, f"has {info.n_params} elements of {info.dtype}, expected {count} of {dtype}")
    return info


def _whole(state: TensorInfo, facts: Mapping[str, object], key: str) -> int:
    value = facts.get(key)
    if type(value) is not int or not 1 <= value <= 2**20:
        raise _damaged(state, f"has {key} {str(value)[:80]!r}, expected a number of elements")
    return value


def _damaged(info: TensorInfo, problem: str) -> CheckpointError:
    return CheckpointError(f"'{info.file}': '{info.name}' {problem}. The file is corrupt: download or save it again.")
