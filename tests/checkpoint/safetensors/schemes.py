"""Small weights in each storage scheme, with the values that the scheme's own library takes them for."""

import torch


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_fp8(values, scale):
    return (values / scale).to(torch.float8_e4m3fn)


def fp8_blocks(*, scale_dtype=torch.float32):
    """DeepSeek-V3 and Qwen3-FP8, with a last block that is not whole; compressed-tensors reads them too."""
    from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import FP8BlockDequantizer

    scale = (draw(2, 3, seed=1).abs() + 0.1).to(scale_dtype)
    whole = scale.float().repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :260]
    stored = {"m.weight": in_fp8(draw(200, 260), whole), "m.weight_scale_inv": scale}
    reader = FP8BlockDequantizer(targets=["m"], weight_block_size=(128, 128), dtype=scale_dtype)
    config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return stored, config, reader._create_dequantized_weight(*stored.values())


def fp8_by_transformers(scale, *, method="fp8", end="_scale_inv", config=None):
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = draw(4, 6).to(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale.reshape(-1, 1) if scale.ndim < 2 else scale)
    return {"m.weight": codes, f"m.weight{end}": scale}, {"quant_method": method, **(config or {})}, expected


def mxfp8():
    """One exponent for 32 columns."""
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes, scale = draw(4, 64).to(torch.float8_e4m3fn), torch.arange(120, 128, dtype=torch.uint8).reshape(4, 2)
    expected = Fp8Dequantize(None)._dequantize_one(codes, scale)
    return {"m.weight": codes, "m.weight_scale_inv": scale}, {"quant_method": "mxfp8"}, expected


def fp8_experts_of_llama4():
    """fbgemm: experts as (d_in, d_out), a scale for each output, in a shape that is that of neither axis."""
    codes, scale = draw(3, 4, 6).to(torch.float8_e4m3fn), draw(3, 6, 1, seed=1).abs()
    return {"m": codes, "m_scale": scale}, {"quant_method": "fbgemm_fp8"}, codes.float() * scale.reshape(3, 1, 6)


def compressed(form, *, seed=0, shape=(24, 64), global_scale=False, **how):
    """What compressed-tensors itself stores of a weight, and reads of that."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    args = QuantizationArgs(**how)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    compressor = BaseCompressor.get_value_from_registry(form)
    rows, columns = shape
    n_groups = columns // args.group_size if args.group_size and args.group_size > 0 else 1
    scale = draw(rows, n_groups, seed=1).abs() / 8 + 0.05
    if args.strategy == "tensor":
        scale = scale[:1, 0]
    state = {"weight": draw(*shape, seed=seed), "weight_scale": scale}
    if form.startswith("mxfp4"):
        state["weight_scale"] = torch.exp2(
            torch.randint(-3, 2, scale.shape, generator=torch.Generator().manual_seed(2))
        )
    if global_scale:
        state["weight_global_scale"] = torch.tensor([37.5])
        state["weight_scale"] = (scale * 30).to(torch.float8_e4m3fn).float()
    if not args.symmetric:
        zeros = torch.randint(-4, 4, scale.shape, generator=torch.Generator().manual_seed(3), dtype=torch.int8)
        state["weight_zero_point"] = zeros
    stored = compressor.compress(state, scheme)
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    stored = {f"m.{name}": value.contiguous() for name, value in stored.items()}
    group = {"weights": args.model_dump(mode="json"), "targets": ["Linear"]}
    config = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return stored | {"m.input_scale": torch.ones(1)}, config, expected


def nvfp4_of_model_optimizer():
    """Two codes in a byte, a scale for 16 of them and one for all."""
    stored, _, expected = compressed(
        "nvfp4-pack-quantized", global_scale=True, num_bits=4, type="float", strategy="tensor_group", group_size=16
    )
    theirs = {
        "m.weight": stored["m.weight_packed"],
        "m.weight_scale": stored["m.weight_scale"],
        "m.weight_scale_2": 1 / stored["m.weight_global_scale"],
    }
    return theirs, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, expected


def mxfp4_experts():
    """GPT-OSS: the experts of a layer, which the model has as (experts, d_in, d_out)."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 40, 2, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(115, 130, (3, 40, 2), generator=generator, dtype=torch.uint8)
    stored = {"e.gate_up_proj_blocks": blocks, "e.gate_up_proj_scales": scales}
    return stored, {"quant_method": "mxfp4"}, convert_moe_packed_tensors(blocks, scales)


def words(codes, bits):
    """Codes along the last axis in words of 32 bits, the first one lowest, bit by bit."""
    apart = (codes[..., None] >> torch.arange(bits)) & 1
    whole = apart.reshape(*codes.shape[:-1], -1, 32).long() << torch.arange(32)
    return whole.sum(-1).to(torch.int64).where(whole.sum(-1) < 2**31, whole.sum(-1) - 2**32).to(torch.int32)


def awq():
    """AutoAWQ, which compressed-tensors converts into its own format."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter

    generator = torch.Generator().manual_seed(0)
    stored = {
        "m.qweight": torch.randint(-(2**31), 2**31 - 1, (64, 3), generator=generator, dtype=torch.int32),
        "m.qzeros": torch.randint(-(2**31), 2**31 - 1, (4, 3), generator=generator, dtype=torch.int32),
        "m.scales": draw(4, 24).abs().half(),
    }
    converter = AutoAWQConverter(bits=4, group_size=16)
    theirs = {name.removeprefix("m."): value for name, value in converter.process(dict(stored)).items()}
    scheme = converter._build_quant_config().config_groups["config_group_0"]
    expected = BaseCompressor.get_value_from_registry("pack-quantized").decompress(theirs, scheme)["weight"]
    config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}
    return stored, config, expected


def gptq(*, bits=4, form="gptq", in_order=True):
    """Codes and zero points as drawn, packed bit by bit; format 1 stores zero points less one."""
    generator = torch.Generator().manual_seed(bits)
    d_in, d_out, size = 64, 32, 16
    codes = torch.randint(0, 2**bits, (d_in, d_out), generator=generator)
    zeros = torch.randint(0, 2**bits, (d_in // size, d_out), generator=generator)
    scales = draw(d_in // size, d_out).abs().half()
    groups = torch.arange(d_in, dtype=torch.int32) // size
    groups = groups if in_order else groups[torch.randperm(d_in, generator=generator)]
    stored = {
        "m.qweight": words(codes.T, bits).T.contiguous(),
        "m.qzeros": words((zeros - int(form == "gptq")) % 2**bits, bits),
        "m.scales": scales,
        "m.g_idx": groups,
    }
    expected = (scales[groups] * (codes - zeros[groups]).half()).T
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "checkpoint_format": form, "sym": False}
    return stored, config, expected


def int8_of_bitsandbytes():
    from bitsandbytes.functional import int8_vectorwise_dequant

    codes = torch.randint(-127, 128, (6, 10), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scale = draw(6).abs()
    stored = {"m.weight": codes, "m.SCB": scale, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    return stored, {"quant_method": "bitsandbytes", "load_in_8bit": True}, int8_vectorwise_dequant(codes, scale)


INT4 = {"num_bits": 4, "type": "int", "symmetric": True}

SCHEMES = {
    "FP8 in blocks": fp8_blocks,
    "FP8 in blocks with bfloat16 scales": lambda: fp8_blocks(scale_dtype=torch.bfloat16),
    "FP8 with one scale": lambda: fp8_by_transformers(torch.tensor(0.25)),
    "FP8 of Model Optimizer": lambda: fp8_by_transformers(torch.tensor(0.25), method="modelopt", end="_scale"),
    "FP8 with a scale a row": lambda: fp8_by_transformers(draw(4, 1).abs(), method="fbgemm_fp8", end="_scale"),
    "FP8 with a scale a row, as a vector": lambda: fp8_by_transformers(draw(4).abs(), method="modelopt", end="_scale"),
    "FP8 experts of Llama 4": fp8_experts_of_llama4,
    "FP8 of compressed-tensors": lambda: compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
    "FP8 of compressed-tensors with one scale": lambda: compressed(
        "float-quantized", num_bits=8, type="float", strategy="tensor"
    ),
    "MXFP8": mxfp8,
    "int8 of compressed-tensors": lambda: compressed("int-quantized", num_bits=8, type="int", strategy="channel"),
    "int8 with zero points": lambda: compressed(
        "int-quantized", num_bits=8, type="int", strategy="channel", symmetric=False
    ),
    "int8 of bitsandbytes": int8_of_bitsandbytes,
    "packed int4": lambda: compressed("pack-quantized", strategy="group", group_size=16, **INT4),
    "packed int4, a scale a row": lambda: compressed("pack-quantized", strategy="channel", **INT4),
    "packed int4, no whole word": lambda: compressed("pack-quantized", shape=(24, 60), strategy="channel", **INT4),
    "packed int4 with zero points": lambda: compressed(
        "pack-quantized", strategy="group", group_size=16, **{**INT4, "symmetric": False}
    ),
    "packed int8": lambda: compressed("pack-quantized", strategy="group", group_size=16, **{**INT4, "num_bits": 8}),
    "packed int3": lambda: compressed("pack-quantized", strategy="group", group_size=16, **{**INT4, "num_bits": 3}),
    "MXFP4 of compressed-tensors": lambda: compressed(
        "mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32
    ),
    "NVFP4 of compressed-tensors": lambda: compressed(
        "nvfp4-pack-quantized", global_scale=True, num_bits=4, type="float", strategy="tensor_group", group_size=16
    ),
    "NVFP4 of Model Optimizer": nvfp4_of_model_optimizer,
    "MXFP4 of GPT-OSS": mxfp4_experts,
    "AWQ": awq,
    "GPTQ": gptq,
    "GPTQ in the second format": lambda: gptq(form="gptq_v2"),
    "GPTQ with columns in another order": lambda: gptq(in_order=False),
    "GPTQ of 8 bits": lambda: gptq(bits=8),
    "GPTQ of 3 bits": lambda: gptq(bits=3),
    "GPTQ of 2 bits": lambda: gptq(bits=2),
}
