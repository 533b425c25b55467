"""The loops in C, for speed alone; everything else of the package stands in pyproject.toml.

Without a compiler the package installs without them, and the same bytes come from torch and numpy. With PORTLLM_PURE
set they are left out on purpose, and the wheel is one for every machine; a free-threaded Python, which has no stable
ABI, gets that too.
"""

import os
import sysconfig

from setuptools import Extension, setup

LIMITED_API = "0x030B0000"
KERNELS = Extension(
    "portllm.native.kernels",
    sources=["src/portllm/native/kernels.c"],
    depends=["src/portllm/native/loops.h"],
    extra_compile_args=["-O3", "-fno-math-errno", "-Wno-psabi"],
    define_macros=[("Py_LIMITED_API", LIMITED_API)],
    py_limited_api=True,
    optional=True,
)

is_pure = bool(os.environ.get("PORTLLM_PURE") or sysconfig.get_config_var("Py_GIL_DISABLED"))
setup(
    ext_modules=[] if is_pure else [KERNELS],
    options={} if is_pure else {"bdist_wheel": {"py_limited_api": "cp311"}},
)
