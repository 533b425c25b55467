"""The tensors of a checkpoint whose weights are codes beside their scales: several stored ones make one weight.

Which scheme a weight has is told by the names, dtypes and shapes of its tensors; `quantization_config` says what these
leave open: the size of blocks, how zero points are counted, and the name by which a scheme that is not known here is
refused. The matrix of a linear module has the shape (d_out, d_in), however it is stored. Nothing is trusted: sizes that
do not fit are refused.

Sources: `serialized_names` and the `get_load_operations` of transformers' quantizers; `pack` of GPTQModel's linear
modules (AWQ, GPTQ); the compressors of compressed-tensors; `to_quantized_weight` of NVIDIA's Model Optimizer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from portllm.errors import CheckpointError
from portllm.tensors.encoding import Grid, Scaled, Unread
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo

ReadSpans = Callable[[Sequence[tuple[TensorInfo, int, int]]], Iterator[bytes]]

EIGHT_BIT_FLOATS = ("F8_E4M3", "F8_E5M2")
EIGHT_BITS = (*EIGHT_BIT_FLOATS, "I8")
"""Dtypes of codes of one byte."""

SCALE_ENDS = ("_scale_inv", "_scale")
"""What follows a weight's name in that of its scales."""

SCALE_END_OF = {
    "fp8": "_scale_inv", "mxfp8": "_scale_inv", "fbgemm_fp8": "_scale", "modelopt": "_scale",
    "compressed-tensors": "_scale",
}  # fmt: skip
"""What stands beside every 8-bit weight, by method."""

OTHER_SCALES = (".scale", ".qscale_weight", ".SCB")
"""What follows a module's name in some files; transformers renames it."""

BESIDE = (
    ".input_scale", ".input_zero_point", ".input_global_scale", ".output_scale", ".output_zero_point",
    ".activation_scale", ".act_scale", ".input_scale_ub", ".weight_format", ".weight_shape",
)  # fmt: skip
"""What follows the name of a quantized module in the names of what no weight depends on."""

CACHE_SCALES = (".k_scale", ".v_scale", ".q_scale", ".kv_scale", ".prob_scale")
"""Scales of a quantized cache of keys and values, which no weight depends on."""

AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which half byte of a word holds each of its eight codes."""

AWQ_FORMATS = frozenset({"", "gemm", "awq"})
GPTQ_FORMATS = frozenset({"", "gptq", "gptq_v2", "auto_round:auto_gptq"})
GPTQ_V2 = "gptq_v2"
"""Zero points as they are; every other format stores them less one."""

NOT_CODES = frozenset({*FLOAT_DTYPES, "BOOL", "I64"})
"""Dtypes of tensors that belong to a model which is not quantized."""

INT8_FACTOR = 1 / 127
"""Of bitsandbytes' 8-bit codes, whose scales are the largest sizes of their rows."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """What a model's configuration says of how its weights are quantized.

    Attributes:
        method: Its name there; empty for a model that is not quantized by its configuration.
        format: Which of the method's formats.
        block: Rows and columns that share a scale, where it says so.
    """

    method: str = ""
    format: str = ""
    block: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} ({self.format})" if self.format else self.method


def scheme_in(config: Mapping[str, object]) -> Scheme:
    """How the weights are quantized, as `config.json` says.

    Example:
        >>> scheme_in({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}})
        Scheme(method='fp8', format='', block=(128, 128))
    """
    for place in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place, dict) and isinstance(found := place.get(key), dict):
                return _scheme(found)
    return Scheme()


def _scheme(found: Mapping[str, object]) -> Scheme:
    method = str(found.get("quant_method") or found.get("method") or "")[:80]
    keys = ("version", "format") if method == "awq" else ("checkpoint_format", "packing_format", "format")
    form = next((str(found[key]).lower()[:80] for key in keys if found.get(key)), "")
    blocks = [found.get("weight_block_size")]
    groups = found.get("config_groups")
    blocks += [
        weights.get("block_structure")
        for group in (groups.values() if isinstance(groups, dict) else ())
        if isinstance(group, dict) and isinstance(weights := group.get("weights"), dict)
    ]
    sizes = {tuple(block) for block in blocks if isinstance(block, list) and _are_sizes(block)}
    return Scheme(method, form, sizes.pop() if len(sizes) == 1 else None)


def _are_sizes(block: Sequence[object]) -> bool:
    return len(block) == 2 and all(type(size) is int and 0 < size < 2**31 for size in block)


def scaled_joined(
    infos: Mapping[str, TensorInfo], config: Mapping[str, object], read: ReadSpans
) -> Mapping[str, TensorInfo]:
    """The same tensors with each weight that is stored as codes and scales as one.

    Args:
        infos: The tensors as the headers list them, or as weights already.
        config: The model's `config.json`.
        read: What reads spans of them; asked for the small tensors that state a shape, all at once.

    Raises:
        CheckpointError: A part is missing, or does not have the size that the others imply.
    """
    weights = _Weights(infos, scheme_in(config), read)
    if not weights.found and not weights.scheme.method:
        return infos
    used = weights.used | weights.attach_cache_scales()
    kept = {name: info for name, info in infos.items() if name not in used}
    for name in weights.found:
        if name in kept:
            raise _damaged(kept[name], "is there twice, as it is and quantized")
    left = {name: weights.unread(info) for name, info in kept.items()}
    return dict(sorted({**left, **weights.found}.items()))


class _Weights:
    """Weights that are found among stored tensors, by name, and the tensors that they are made of."""

    def __init__(self, infos: Mapping[str, TensorInfo], scheme: Scheme, read: ReadSpans) -> None:
        self._infos = infos
        self.scheme = scheme
        self.found: dict[str, TensorInfo] = {}
        self.used: set[str] = set()
        self._shapes = _stated_shapes(infos, read)
        for name, info in infos.items():
            if info.encoding is not None:
                continue
            if name.endswith(".qweight") and info.dtype == "I32":
                self._words(name.removesuffix(".qweight"))
            elif name.endswith(".weight_packed"):
                self._packed(name.removesuffix(".weight_packed"))
            elif name.endswith("_blocks") and info.dtype == "U8" and len(info.shape) == 4:
                self._experts(name.removesuffix("_blocks"))
            elif info.dtype in EIGHT_BITS or (info.dtype == "U8" and f"{name}_scale_2" in infos):
                self._bytes(name)
        for name, info in infos.items():
            if info.encoding is None and info.dtype in EIGHT_BIT_FLOATS and name not in self.used:
                self._unscaled(name)

    def unread(self, info: TensorInfo) -> TensorInfo:
        """A tensor that is left; where it must hold codes of a scheme that is not known, as one that cannot be read."""
        if info.encoding is not None or info.dtype in NOT_CODES or not self.scheme.method:
            return info
        return replace(info, encoding=Unread(self.scheme.name, info.dtype))

    def attach_cache_scales(self) -> set[str]:
        """Make scales of a cache parts of a weight beside them, so that they are in the identity and no weights."""
        attached = set()
        for name in self._infos:
            module, dot, last = name.rpartition(".")
            if dot + last in CACHE_SCALES:
                owner = next((weight for weight in sorted(self.found) if weight.startswith(f"{module}.")), None)
                if owner is not None:
                    weight = self.found[owner]
                    part = (f" {name}", self._infos[name])
                    self.found[owner] = replace(weight, parts=(*weight.parts, part))
                    attached.add(name)
        return attached

    def _bytes(self, name: str) -> None:
        """Codes of one byte, or two of half a byte, with scales of blocks, rows, columns or all."""
        info, module = self._infos[name], name.removesuffix(".weight")
        ends = [*(name + end for end in SCALE_ENDS), *(module + end for end in OTHER_SCALES if module != name)]
        scale_name = next((end for end in ends if end in self._infos), None)
        if scale_name is None:
            return
        scale = self._infos[scale_name]
        is_fp4 = info.dtype == "U8" or (info.dtype == "I8" and scale.dtype == "F8_E8M0")
        shape = (*info.shape[:-1], info.shape[-1] * 2) if is_fp4 and info.shape else info.shape
        rows, columns, scales = self._scale(scale, info, shape)
        parts = {".scales": scale}
        codes = Grid("", "F4_E2M1", bits=4) if is_fp4 else Grid("", info.dtype)
        scaled = Scaled(self._scheme_of(info, is_fp4=is_fp4), rows, columns, codes, (replace(scales, part=".scales"),))
        if (second := self._infos.get(f"{name}_scale_2")) is not None:
            parts[".scales_2"] = self._one(second)
            scaled = replace(scaled, scales=(*scaled.scales, Grid(".scales_2", second.dtype, rows, columns)))
        if (zeros := self._infos.get(f"{name}_zero_point")) is not None:
            if (zeros.dtype, zeros.n_params) != ("I8", scale.n_params):
                raise _damaged(
                    zeros, f"has {zeros.n_params} elements of {zeros.dtype}, expected {scale.n_params} of I8"
                )
            parts[".zeros"] = zeros
            scaled = replace(scaled, zeros=replace(scales, part=".zeros", dtype="I8"))
        if scale_name.endswith(".SCB"):
            scaled = replace(scaled, factor=INT8_FACTOR)
        self._add(name, info, _dtype_of(scale), shape, scaled, parts)

    def _unscaled(self, name: str) -> None:
        """Numbers of one byte without scales: values, unless the configuration says that there are scales."""
        info = self._infos[name]
        if not self.scheme.method:
            self._add(name, info, "BF16", info.shape, Scaled("fp8", *_matrix(info.shape), Grid("", info.dtype)), {})
        elif len(info.shape) > 1 and self.scheme.method in SCALE_END_OF:
            raise _lacking(info, name + SCALE_END_OF[self.scheme.method])

    def _scheme_of(self, info: TensorInfo, *, is_fp4: bool) -> str:
        if is_fp4:
            return "nvfp4" if info.dtype == "U8" else "mxfp4"
        return "int8" if info.dtype == "I8" else "fp8"

    def _scale(self, scale: TensorInfo, info: TensorInfo, shape: tuple[int, ...]) -> tuple[int, int, Grid]:
        """Rows and columns of a matrix, and how its scales lie over it.

        Raises:
            CheckpointError: Their number fits no way that is known, or the configuration does not say which.
        """
        is_exponent = scale.dtype in ("U8", "F8_E8M0")
        if not is_exponent and scale.dtype not in (*FLOAT_DTYPES, "F8_E4M3"):
            raise _damaged(scale, f"holds scales as {scale.dtype}, expected floating-point numbers")
        rows, columns = _matrix(shape)
        n_matrices = max(1, info.n_params // max(1, rows * columns))
        dtype = "F8_E8M0" if is_exponent else scale.dtype
        if scale.n_params == 1:
            return rows * n_matrices, columns, Grid("", dtype, rows * n_matrices, columns)
        above, across = self._scale_shape(scale, columns, n_matrices)
        height, width = self._block(above, across, rows, columns)
        if n_matrices * above * across != scale.n_params or height == 0 or width == 0:
            raise _damaged(
                scale,
                f"has shape {scale.shape} for the weight '{info.name}' of shape {shape}"
                + ("" if self.scheme.block else ", and no config.json says how large its blocks are")
                + ". Pass the model's folder, whose config.json has quantization_config; if it is that",
            )
        return rows, columns, Grid("", dtype, height, width)

    def _scale_shape(self, scale: TensorInfo, columns: int, n_matrices: int) -> tuple[int, int]:
        """Over how many blocks of rows and of columns the scales of one matrix are spread."""
        shape = scale.shape
        if self.scheme.method == "fbgemm_fp8" and n_matrices > 1:
            return 1, columns  # of experts, which are stored as (d_in, d_out)
        if scale.n_params == n_matrices:
            return 1, 1
        if len(shape) == 1 or (len(shape) == 2 and n_matrices > 1):
            return shape[-1], 1
        return shape[-2], shape[-1]

    def _block(self, above: int, across: int, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns that share a scale; zero where that cannot be told."""
        if self.scheme.block is not None:
            height, width = self.scheme.block
            if (-(-rows // height), -(-columns // width)) == (above, across):
                return height, width
        height = {rows: 1, 1: rows}.get(above, 0)
        if above == rows and across > 1 and columns % across == 0:
            return 1, columns // across
        return height, {columns: 1, 1: columns}.get(across, 0)

    def _words(self, module: str) -> None:
        """AWQ and GPTQ: words of 32 bits, zero points and scales of groups, stored as (d_in, d_out)."""
        infos, codes = self._infos, self._infos[f"{module}.qweight"]
        scales, zeros, groups = (infos.get(f"{module}.{part}") for part in ("scales", "qzeros", "g_idx"))
        if scales is None or zeros is None:
            raise _lacking(codes, f"{module}.{'scales' if scales is None else 'qzeros'}")
        if len(codes.shape) != 2 or len(scales.shape) != 2 or scales.dtype not in FLOAT_DTYPES or zeros.dtype != "I32":
            return
        n_groups, d_out = scales.shape
        is_awq = codes.shape[1] * 8 == d_out and self.scheme.method != "gptq"
        if is_awq:
            d_in, bits = codes.shape[0], 4
        else:
            d_in = codes.shape[0] * 8 if groups is None else groups.n_params
            bits, left = divmod(codes.shape[0] * 32, max(1, d_in))
            if left:
                raise _damaged(codes, f"has shape {codes.shape}, which does not fit {d_in} columns")
        width = -(-d_in // max(1, n_groups))
        if groups is None and self.scheme.method == "gptq" and d_in % max(1, n_groups):
            return
        known = AWQ_FORMATS if is_awq else GPTQ_FORMATS
        if self.scheme.format not in known or bits not in (2, 3, 4, 8) or not (is_awq or codes.shape[1] == d_out):
            return
        expected = (codes.shape, (d_in, d_out // 8)) if is_awq else (codes.shape, (d_in * bits // 32, d_out))
        if expected[0] != expected[1] or zeros.shape != (n_groups, d_out * bits // 32) or -(-d_in // width) != n_groups:
            raise _damaged(
                zeros, f"has shape {zeros.shape}, which does not fit {codes.shape} codes and {scales.shape} scales"
            )
        order = AWQ_ORDER if is_awq else ()
        plus = 0 if is_awq or self.scheme.format == GPTQ_V2 else 1
        parts = {".scales": scales, ".qzeros": zeros}
        if groups is not None:
            if groups.dtype != "I32" or groups.n_params != d_in:
                raise _damaged(groups, f"has {groups.n_params} elements of {groups.dtype}, expected {d_in} of I32")
            parts[".g_idx"] = groups
        scheme = ("awq" if is_awq else "gptq") + ("" if bits == 4 else f"-{bits}")
        scaled = Scaled(
            scheme, d_out, d_in,
            Grid("", "INT", bits=bits, packed_axis=int(is_awq), transposed=True, order=order),
            (Grid(".scales", scales.dtype, 1, width, transposed=True),),
            zeros=Grid(".qzeros", "INT", 1, width, bits=bits, transposed=True, order=order, plus=plus),
            groups=".g_idx" if groups is not None else "",
        )  # fmt: skip
        self._add(f"{module}.weight", codes, scales.dtype, (d_out, d_in), scaled, parts)

    def _packed(self, module: str) -> None:
        """compressed-tensors: codes packed along rows, scales of groups, rows or all."""
        infos, codes = self._infos, self._infos[f"{module}.weight_packed"]
        scale = infos.get(f"{module}.weight_scale")
        if scale is None:
            raise _lacking(codes, f"{module}.weight_scale")
        parts = {".scales": scale}
        if codes.dtype == "U8":
            shape = (*codes.shape[:-1], 2 * codes.shape[-1])
            rows, columns, grid = self._scale(scale, codes, shape)
            scaled = Scaled(
                "mxfp4" if grid.dtype == "F8_E8M0" else "nvfp4",
                rows, columns, Grid("", "F4_E2M1", bits=4), (replace(grid, part=".scales"),),
            )  # fmt: skip
            if (whole := infos.get(f"{module}.weight_global_scale")) is not None:
                parts[".global"] = self._one(whole)
                scaled = replace(scaled, divisors=(Grid(".global", whole.dtype, rows, columns),))
            self._add(f"{module}.weight", codes, "BF16", shape, scaled, parts)
            return
        stated = self._shapes.get(f"{module}.weight_shape")
        if stated is None:
            raise _lacking(codes, f"{module}.weight_shape")
        bits = next((n for n in range(1, 9) if -(-stated[-1] * n // 32) == codes.shape[-1]), 0)
        if codes.dtype != "I32" or not bits or stated[:-1] != codes.shape[:-1]:
            raise _damaged(codes, f"has shape {codes.shape} of {codes.dtype}, which does not fit a weight of {stated}")
        rows, columns, grid = self._scale(scale, replace(codes, shape=stated), stated)
        scaled = Scaled(
            f"int{bits}", rows, columns, Grid("", "INT", bits=bits), (replace(grid, part=".scales"),),
            zero=1 << (bits - 1),
        )  # fmt: skip
        if (zeros := infos.get(f"{module}.weight_zero_point")) is not None:
            width = -(-columns // grid.width)
            if zeros.dtype != "I32" or zeros.n_params != -(-rows * bits // 32) * width or grid.height != 1:
                raise _damaged(zeros, f"has shape {zeros.shape} of {zeros.dtype}, which does not fit {stated}")
            parts[".zeros"] = zeros
            packed = Grid(".zeros", "INT", 1, grid.width, bits=bits, packed_axis=0)
            scaled = replace(scaled, zeros=packed, zero=0)  # codes and zero points have the same offset
        if (groups := infos.get(f"{module}.weight_g_idx")) is not None:
            if (groups.dtype, groups.n_params) != ("I32", columns):
                raise _damaged(groups, f"has {groups.n_params} elements of {groups.dtype}, expected {columns} of I32")
            parts[".g_idx"] = groups
            scaled = replace(scaled, groups=".g_idx")
        self._add(f"{module}.weight", codes, _dtype_of(scale), stated, scaled, parts)

    def _experts(self, name: str) -> None:
        """MXFP4 of GPT-OSS: for each expert (d_out, groups, 16) bytes; the model's tensor is (experts, d_in, d_out)."""
        codes, scales = self._infos[f"{name}_blocks"], self._infos.get(f"{name}_scales")
        if scales is None:
            raise _lacking(codes, f"{name}_scales")
        n_experts, d_out, n_groups, n_bytes = codes.shape
        if scales.dtype != "U8" or scales.shape != codes.shape[:3]:
            raise _damaged(scales, f"has shape {scales.shape} of {scales.dtype}, expected {codes.shape[:3]} of U8")
        d_in = 2 * n_groups * n_bytes
        scaled = Scaled(
            "mxfp4", d_in, d_out, Grid("", "F4_E2M1", bits=4, transposed=True),
            (Grid(".scales", "F8_E8M0", 2 * n_bytes, 1, transposed=True),),
        )  # fmt: skip
        self._add(name, codes, "BF16", (n_experts, d_in, d_out), scaled, {".scales": scales})

    def _one(self, info: TensorInfo) -> TensorInfo:
        if info.n_params != 1 or info.dtype not in FLOAT_DTYPES:
            raise _damaged(info, f"has {info.n_params} elements of {info.dtype}, expected one floating-point number")
        return info

    def _add(
        self,
        name: str,
        codes: TensorInfo,
        dtype: str,
        shape: tuple[int, ...],
        scaled: Scaled,
        parts: Mapping[str, TensorInfo],
    ) -> None:
        if not codes.n_params:
            return
        module = name.removesuffix(".weight")
        ends = [*BESIDE, *(end.replace(".", "_") for end in BESIDE)]
        beside = {end: self._infos[module + end] for end in ends if module + end in self._infos}
        whole = {**parts, **beside}
        self.found[name] = replace(
            codes, name=name, dtype=dtype, shape=shape, encoding=scaled, parts=tuple(whole.items()), listed=codes
        )
        self.used |= {codes.name, *(part.name for part in whole.values())}


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight; those of the last two axes."""
    return (shape[-2], shape[-1]) if len(shape) > 1 else (1, shape[0] if shape else 1)


def _dtype_of(scale: TensorInfo) -> str:
    """The dtype of a code times a scale, as libraries compute it."""
    return scale.dtype if scale.dtype in FLOAT_DTYPES else "BF16"


def _stated_shapes(infos: Mapping[str, TensorInfo], read: ReadSpans) -> dict[str, tuple[int, ...]]:
    """What `weight_shape` says of each weight that compressed-tensors packed."""
    names = [
        name
        for name, info in infos.items()
        if name.endswith(".weight_shape") and info.dtype in ("I32", "I64") and 0 < info.n_params <= 8
    ]
    texts = read([(infos[name], 0, infos[name].n_bytes) for name in names])
    shapes = {
        name: tuple(np.frombuffer(text, f"<i{int(infos[name].dtype[1:]) // 8}").tolist())
        for name, text in zip(names, texts, strict=True)
    }
    for name, shape in shapes.items():
        if not all(0 < axis < 2**40 for axis in shape):
            raise _damaged(infos[name], f"says {shape}, expected a shape")
    return shapes


def _lacking(info: TensorInfo, part: str) -> CheckpointError:
    return CheckpointError(
        f"'{info.file}': '{info.name}' is quantized, and the checkpoint lacks '{part}', which that needs. Download or "
        "save it again."
    )


def _damaged(info: TensorInfo, problem: str) -> CheckpointError:
    return CheckpointError(f"'{info.file}': '{info.name}' {problem}. The file is corrupt: download or save it again.")
