"""What unlabeled prompts say of a patch on an evolved model, as values; `docs/check.md` has the formulas."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from portllm.measures.fidelity import Fidelity
from portllm.measures.outputs import Distance, KeptShare, Shift, effect_kept
from portllm.measures.terms import Terms

WORST = 0.1
"""The share of modules that count as the worst: a single one would be a matter of luck."""


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the four models say after the prompts, from one to another.

    The old specialist is base and patch, the ported model evolved and ported patch.

    Attributes:
        specialist_to_base: What the patch does at home.
        specialist_to_evolved: How far the evolved model is from the specialist without a patch.
        specialist_to_ported: How far it is with the ported one.
        ported_to_evolved: What the ported patch does on the evolved model.
        base_to_evolved: What the update does.
        shift: What the patch does to log-probabilities in both models; None where it does nothing in one of them.
    """

    specialist_to_base: Distance
    specialist_to_evolved: Distance
    specialist_to_ported: Distance
    ported_to_evolved: Distance
    base_to_evolved: Distance
    shift: Shift | None

    @property
    def kept(self) -> KeptShare | None:
        """The share of the specialist's effect that the port keeps; None where there is none."""
        return effect_kept(self.specialist_to_ported, self.specialist_to_evolved)


@dataclass(frozen=True, slots=True)
class TextMeasures:
    """What was measured of one patch.

    Attributes:
        patch: What the user called it.
        n_prompts: Prompts that were read.
        n_cut: Those that lost their beginning.
        n_tokens: Tokens at which modules were looked at.
        shared: What the old specialists begin every answer with, after which models were asked; often nothing.
        outputs: What the models say.
        modules: Fidelity by module that the patch changes by a low-rank delta; those that read nothing are left out.
        similarity: Linear CKA of base and evolved after each layer; the same for every patch.
        terms: By module, the terms of the loss around the base; None where gradients were not asked for, or the patch
            holds more than LoRA deltas of linear modules.
    """

    patch: str
    n_prompts: int
    n_cut: int
    n_tokens: int
    shared: str
    outputs: Outputs
    modules: Mapping[str, Fidelity]
    similarity: tuple[float, ...]
    terms: Mapping[str, Terms] | None = None

    @property
    def total(self) -> Terms | None:
        """The sums of the terms."""
        return None if self.terms is None else sum(self.terms.values(), Terms())

    def features(self) -> dict[str, float]:
        """Every number about the whole model, by name, in a fixed order; what could not be measured is left out.

        Those of modules are means over modules; `..._worst` is the mean over the tenth of the modules where it is
        worst. See `docs/check.md` for each.
        """
        found = {**_of_outputs(self.outputs), **_of_modules(list(self.modules.values()))}
        if self.similarity:
            found["cka"] = _mean(self.similarity)
            found["cka_least"] = min(self.similarity)
            found["cka_last"] = self.similarity[-1]
        if (total := self.total) is not None:
            found |= _of_terms(total, self.outputs)
        return found


def text_to_json(measures: TextMeasures) -> dict[str, object]:
    """What was measured as JSON values: the features, and what they are made of."""
    return {
        "prompts": measures.n_prompts,
        "prompts_cut": measures.n_cut,
        "tokens": measures.n_tokens,
        "answers_begin_with": measures.shared,
        "features": measures.features(),
        "modules": {name: asdict(found) for name, found in measures.modules.items()},
        "cka": list(measures.similarity),
        "terms": None if measures.terms is None else {name: found.to_json() for name, found in measures.terms.items()},
    }


def _of_outputs(outputs: Outputs) -> dict[str, float]:
    found = {
        "patch_kl": outputs.specialist_to_base.mean,
        "update_kl": outputs.base_to_evolved.mean,
        "evolved_kl": outputs.specialist_to_evolved.mean,
        "ported_kl": outputs.specialist_to_ported.mean,
        "ported_patch_kl": outputs.ported_to_evolved.mean,
        "patch_agreement": outputs.specialist_to_base.agreement,
        "update_agreement": outputs.base_to_evolved.agreement,
        "evolved_agreement": outputs.specialist_to_evolved.agreement,
        "ported_agreement": outputs.specialist_to_ported.agreement,
    }
    if outputs.shift is not None:
        found |= {"shift_cosine": outputs.shift.cosine, "shift_ratio": outputs.shift.ratio}
    if (kept := outputs.kept) is not None:
        found["effect_kept"] = kept.value
        if math.isfinite(kept.error):
            found["effect_kept_error"] = kept.error
    return found


def _of_modules(modules: list[Fidelity]) -> dict[str, float]:
    if not modules:
        return {}
    found = {name: _mean([getattr(module, name) for module in modules]) for name in Fidelity.__dataclass_fields__}
    worst: dict[str, Callable[[Fidelity], float]] = {
        "read_cosine": lambda module: module.read_cosine,
        "effect_cosine": lambda module: module.effect_cosine,
        "effect_change": lambda module: -module.effect_change,
    }
    count = math.ceil(WORST * len(modules))
    for name, goodness in worst.items():
        lowest = sorted(modules, key=goodness)[:count]
        found[f"{name}_worst"] = _mean([getattr(module, name) for module in lowest])
    return found


def _of_terms(total: Terms, outputs: Outputs) -> dict[str, float]:
    found = {"gain_on_base": -total.first_order_base, "gain_on_evolved": -total.first_order_evolved}
    distances = {"base": outputs.specialist_to_base.mean, "evolved": outputs.specialist_to_evolved.mean}
    found |= {f"gain_share_on_{name}": found[f"gain_on_{name}"] / nats for name, nats in distances.items() if nats}
    found["interference"] = total.interference
    if total.cosine is not None:
        found["interference_cosine"] = total.cosine
    return found


def _mean(values: list[float] | tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
