"""The record in `patch.json`: the base of a patch, how it was captured, and every port it went through."""

from collections.abc import Mapping
from dataclasses import dataclass, field

FORMAT = 1
"""Version of the record's layout."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """A model by content, and by the name that the user gave it.

    Attributes:
        name: As typed by the user; for people, never compared.
        fingerprint: See `portllm.checkpoint.model.identity`; what is compared.
        digest: Over all bytes, where they were read anyway; None otherwise.
        revision: The commit hash of a model of the Hugging Face Hub, else None; for people, never compared.
        quantization: How its weights are stored where that is not plainly, such as `nf4-double` or `Q4_K, Q6_K`.
    """

    name: str
    fingerprint: str
    digest: str | None = None
    revision: str | None = None
    quantization: str | None = None


@dataclass(frozen=True, slots=True)
class FittedTo:
    """The quantization that the deltas were trained on, if the base named is the 16-bit model (QLoRA).

    Attributes:
        scheme: How the base was quantized when it was loaded: a key of `portllm.measures.four_bit.SCHEMES`.
        left_alone: The ends of the names of linear modules that stayed in 16 bit.
    """

    scheme: str
    left_alone: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Capture:
    """How the deltas came to be.

    Attributes:
        method: `adapter` (an existing PEFT folder), `train`, `tuned` (two checkpoints) or `combine` (several patches).
        settings: Every parameter that shaped the result, and for `train` what it was trained on.
        fitted_to: What they were fitted to, where that is not the weights of the model named; else None.
    """

    method: str
    settings: Mapping[str, object] = field(default_factory=dict)
    fitted_to: FittedTo | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """Why a port went by its method, where that was not named but chosen by what `check` found.

    Attributes:
        verdict: Whether the patch will hold: an `Answer`.
        reason: What led from it to the method.
        findings: Everything that spoke for or against the patch, the gravest first.
        is_forced: Whether it was ported against the verdict.
    """

    verdict: str
    reason: str
    findings: tuple[str, ...]
    is_forced: bool = False


@dataclass(frozen=True, slots=True)
class PortStep:
    """One port: from which model, to which, by which method, and what was measured on the way.

    Attributes:
        source: The base before.
        target: The base after.
        method: Its id.
        evidence: What was measured.
        left_out: By tensor, tokens whose change was dropped, for the target does not have them.
        choice: Why this method, where it was chosen; None where it was named.
    """

    source: ModelIdentity
    target: ModelIdentity
    method: str
    evidence: Mapping[str, float] = field(default_factory=dict)
    left_out: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    choice: Choice | None = None


@dataclass(frozen=True, slots=True)
class PatchRecord:
    """The content of `patch.json`.

    Attributes:
        base: The model that the patch may be used with now.
        capture: Where the deltas come from.
        ports: Oldest first; the last one's target is `base`.
        tensors: blake3 digest of each stored tensor's bytes.
        program: Version of PortLLM that wrote the record.
        files: blake3 digest of each other file of the patch; known once they are written.
    """

    base: ModelIdentity
    capture: Capture
    ports: tuple[PortStep, ...]
    tensors: Mapping[str, str]
    program: str
    files: Mapping[str, str] = field(default_factory=dict)


def record_to_json(record: PatchRecord) -> dict[str, object]:
    """The record as JSON values; `record_from_json` is its inverse."""
    return {
        "format": FORMAT,
        "program": record.program,
        "base": identity_to_json(record.base),
        "capture": _capture_to_json(record.capture),
        "ports": [
            {
                "from": identity_to_json(step.source),
                "to": identity_to_json(step.target),
                "method": step.method,
                "evidence": dict(step.evidence),
                **({"left_out": {name: list(lost) for name, lost in step.left_out.items()}} if step.left_out else {}),
                **({} if step.choice is None else {"choice": _choice_to_json(step.choice)}),
            }
            for step in record.ports
        ],
        "tensors": dict(sorted(record.tensors.items())),
        "files": dict(sorted(record.files.items())),
    }


def record_from_json(value: Mapping[str, object]) -> PatchRecord:
    """The record that these values, which must fit the schema, stand for."""
    match value:
        case {
            "base": base,
            "capture": {"method": str(method), "settings": dict(settings), **more},
            "ports": list(ports),
            "tensors": dict(tensors),
            "files": dict(files),
            "program": str(program),
        }:
            steps = tuple(
                PortStep(
                    identity_from_json(p["from"]),
                    identity_from_json(p["to"]),
                    p["method"],
                    p["evidence"],
                    {name: tuple(lost) for name, lost in p.get("left_out", {}).items()},
                    _choice(p),
                )
                for p in ports
            )
            return PatchRecord(
                identity_from_json(base), Capture(method, settings, _fitted_to(more)), steps, tensors, program, files
            )
        case _:
            raise ValueError("the values do not match the schema of patch.json")


def _choice_to_json(choice: Choice) -> dict[str, object]:
    return {
        "verdict": choice.verdict,
        "reason": choice.reason,
        "findings": list(choice.findings),
        "forced": choice.is_forced,
    }


def _choice(step: object) -> Choice | None:
    match step:
        case {
            "choice": {
                "verdict": str(verdict),
                "reason": str(reason),
                "findings": list(findings),
                "forced": bool(forced),
            }
        }:
            return Choice(verdict, reason, tuple(findings), forced)
        case _:
            return None


def _capture_to_json(capture: Capture) -> dict[str, object]:
    values: dict[str, object] = {"method": capture.method, "settings": dict(capture.settings)}
    if capture.fitted_to is not None:
        values["fitted_to"] = {"scheme": capture.fitted_to.scheme, "left_alone": list(capture.fitted_to.left_alone)}
    return values


def _fitted_to(capture: object) -> FittedTo | None:
    match capture:
        case {"fitted_to": {"scheme": str(scheme), "left_alone": list(names)}}:
            return FittedTo(scheme, tuple(names))
        case _:
            return None


def identity_to_json(identity: ModelIdentity) -> dict[str, object]:
    """An identity as JSON values."""
    return {
        "name": identity.name,
        "fingerprint": identity.fingerprint,
        "digest": identity.digest,
        "revision": identity.revision,
        **({} if identity.quantization is None else {"quantization": identity.quantization}),
    }


def identity_from_json(value: object) -> ModelIdentity:
    """The identity that these values stand for; ValueError where they stand for none."""
    match value:
        case {"name": str(name), "fingerprint": str(fingerprint), "digest": str() | None as digest, **rest}:
            revision, quantization = (
                value if isinstance(value := rest.get(key), str) else None for key in ("revision", "quantization")
            )
            return ModelIdentity(name, fingerprint, digest, revision, quantization)
        case _:
            raise ValueError("the values do not match the schema of a model's identity")
