"""PortLLM: carry a fine-tuned model's patch over to the next version of its base, without training.

The verbs are those of the program, functions that print nothing. A model or a patch is given by its place or opened:

    patch = portllm.capture("adapter", base="base-v1", out="patch")
    report = portllm.check(patch, base="base-v1", evolved="base-v2")
    ported = portllm.port(patch, evolved="base-v2", out="ported")
    merged = portllm.merge(ported, into="base-v2", out="merged")

Public is what `__init__.pyi` imports, and nothing else. It is read when the first name is used, and each name imported
when it is used, so that `import portllm` costs nothing; `docs/library.md` introduces them.
"""

import sys

if sys.platform == "win32":  # whose files have neither the locks nor the links that are relied on
    raise ImportError("PortLLM runs on Linux and macOS; on Windows, run it in WSL.")

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    import lazy_loader

    attached = lazy_loader.attach_stub(__name__, __file__)
    globals().update(zip(("__getattr__", "__dir__", "__all__"), attached, strict=True))
    return getattr(sys.modules[__name__], name)


def __dir__() -> list[str]:
    return __getattr__("__all__")
