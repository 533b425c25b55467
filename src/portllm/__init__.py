"""PortLLM: carry a fine-tuned model's patch over to the next version of its base, without training.

The verbs are functions on typed values, and print nothing:

    base, evolved = portllm.open_checkpoint("base"), portllm.open_checkpoint("evolved")
    patch = portllm.capture_adapter(portllm.load_patch("adapter"), base=base, out=Path("patch"))
    report = portllm.check(patch, base=base, evolved=evolved)
    ported = portllm.port(patch, evolved=evolved, out=Path("ported"))
    merged = portllm.merge(ported, into=evolved, out=Path("merged"))

Names are imported when they are first used, so that `import portllm` costs nothing.
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Certificate": "portllm.output.certificate",
    "Checkpoint": "portllm.checkpoint.reader",
    "open_checkpoint": "portllm.checkpoint.reader",
    "fingerprint": "portllm.checkpoint.identity",
    "digest": "portllm.checkpoint.identity",
    "LowRankDelta": "portllm.patch.delta",
    "Patch": "portllm.patch.patch",
    "load_patch": "portllm.patch.adapter_folder",
    "open_adapter": "portllm.patch.adapter_folder",
    "capture_adapter": "portllm.pipeline.capture",
    "capture_tuned": "portllm.pipeline.capture_tuned",
    "combine": "portllm.pipeline.combine",
    "certify": "portllm.pipeline.certify",
    "check": "portllm.pipeline.check",
    "distil": "portllm.pipeline.distil",
    "measure_drift": "portllm.pipeline.drift",
    "measure_text": "portllm.pipeline.check_text",
    "merge": "portllm.pipeline.merge",
    "merge_each": "portllm.pipeline.merge",
    "merge_in_place": "portllm.pipeline.in_place",
    "undo_merge": "portllm.pipeline.in_place",
    "evaluate": "portllm.pipeline.evaluate",
    "fleet": "portllm.many.fleet",
    "inspect": "portllm.pipeline.inspect",
    "port": "portllm.pipeline.port",
    "read_certificate": "portllm.output.certificate",
    "run_study": "portllm.study.run",
    "sign": "portllm.pipeline.sign",
    "study_results": "portllm.study.run",
    "study_status": "portllm.study.run",
    "train": "portllm.pipeline.train",
    "verify": "portllm.pipeline.verify",
    "PortLLMError": "portllm.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'portllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
