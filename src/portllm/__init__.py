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
    "Certificate": "portllm.certifying.certificate",
    "Checkpoint": "portllm.checkpoint.open",
    "open_checkpoint": "portllm.checkpoint.open",
    "fingerprint": "portllm.checkpoint.model.identity",
    "digest": "portllm.checkpoint.model.identity",
    "LowRankDelta": "portllm.patch.delta",
    "Patch": "portllm.patch.patch",
    "load_patch": "portllm.patch.adapter_folder",
    "open_adapter": "portllm.patch.adapter_folder",
    "capture_adapter": "portllm.capturing.adapter",
    "capture_tuned": "portllm.capturing.tuned",
    "combine": "portllm.combining.combine",
    "certify": "portllm.certifying.certify",
    "check": "portllm.checking.check",
    "distil": "portllm.training.distil",
    "measure_drift": "portllm.checking.update.drift",
    "measure_text": "portllm.probing.probe",
    "merge": "portllm.merging.merge",
    "merge_each": "portllm.merging.merge",
    "merge_in_place": "portllm.merging.in_place",
    "undo_merge": "portllm.merging.in_place",
    "evaluate": "portllm.evaluating.evaluate",
    "fleet": "portllm.fleets.fleet",
    "inspect": "portllm.inspecting.inspect",
    "port": "portllm.porting.port",
    "read_certificate": "portllm.certifying.certificate",
    "run_study": "portllm.study.run",
    "sign": "portllm.verifying.sign",
    "study_results": "portllm.study.run",
    "study_status": "portllm.study.run",
    "train": "portllm.training.train",
    "verify": "portllm.verifying.verify",
    "PortLLMError": "portllm.errors",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'portllm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
