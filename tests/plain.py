"""The tests that touch numbers, as on the plainest processor: `PORTLLM_PLAIN=1 pytest`.

No AVX-512, no instructions for bfloat16, no loops in C: a fast machine finds what would fail on another.
"""

import os
import re
import sys

ASKED_FOR = os.environ.get("PORTLLM_PLAIN") == "1"

INSTRUCTION_SETS = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_CBWR": "COMPATIBLE",
}
"""What torch and the libraries under it are told; each reads it when it is loaded.

MKL runs the kernels that all processors have. Its AVX2 kernels, forced on an Intel Xeon, round a row of a product by
its place in the matrix, so that blocks have other last bits than the whole, and than PEFT's product.
"""

TENSORS = re.compile(r"^\s*(import (torch|numpy)\b|from (torch|numpy)\b|from tests\.models import)", re.MULTILINE)
DEATHS = re.compile(r"^\s*from tests\.processes import", re.MULTILINE)


def touches_numbers(source):
    """Whether a file of tests computes on tensors, and asks more of them than to outlive a process that is killed."""
    return bool(TENSORS.search(source)) and not DEATHS.search(source)


def be_plain():
    """Must come before torch and the package are imported; programs that tests start inherit the instruction sets."""
    assert "torch" not in sys.modules, "torch was imported before the processor could be made plain"
    os.environ.update(INSTRUCTION_SETS)
    sys.modules["portllm.native.kernels"] = None

    import torch

    torch.cpu.get_capabilities = dict
