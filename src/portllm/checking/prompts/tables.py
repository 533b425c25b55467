"""What prompts say of a patch as tables, for the terminal and the page alike: outputs first, then inwards. Pure."""

import math
from collections.abc import Mapping, Sequence

from portllm.checking.prompts.measures import TextMeasures
from portllm.measures.outputs import KeptShare
from portllm.show.numbers import percent

Rows = list[tuple[str, ...]]
"""The first row names the columns."""


def text_title(text: TextMeasures) -> str:
    """On what it was measured."""
    return f"on {text.n_prompts} prompts, if added unchanged"


def text_facts(text: TextMeasures) -> dict[str, str]:
    """What the prompts say of one patch."""
    return {**_outputs(text), **_modules(text), **_terms(text)}


def text_rows(texts: Sequence[TextMeasures]) -> Rows:
    """What the same prompts say of several patches: a line for each."""
    rows: Rows = [("patch", "effect kept", "agrees", "without", "shift", "effect", "changed", "interference")]
    for text in texts:
        found = text.features()
        rows.append(
            (
                text.patch,
                _kept(text.outputs.kept),
                percent(found["ported_agreement"]),
                percent(found["evolved_agreement"]),
                *(_cosine(found.get(name)) for name in ("shift_cosine", "effect_cosine")),
                percent(found["effect_change"]) if "effect_change" in found else "",
                _cosine(found.get("interference_cosine")),
            )
        )
    return rows


def text_notes(texts: Sequence[TextMeasures]) -> list[str]:
    """What a reader should know of the prompts."""
    cut, shared = texts[0].n_cut, texts[0].shared
    notes = [f"{cut} prompts were too long and were truncated from the left; --max-tokens keeps more"] if cut else []
    if shared:
        notes.append(f"the old specialists begin every answer with {shared!r}: the comparison starts after it")
    return notes


def _outputs(text: TextMeasures) -> dict[str, str]:
    outputs, found = text.outputs, text.features()
    rows = {
        "effect kept": f"{_kept(outputs.kept)} of the old specialist's behavior beyond the evolved model: KL "
        f"{_nats(found['ported_kl'])} with the patch, {_nats(found['evolved_kl'])} without",
        "agreement": f"{percent(found['ported_agreement'])} of first tokens match the old specialist, "
        f"{percent(found['evolved_agreement'])} without the patch",
        "moved by": f"the patch {_nats(found['patch_kl'])} on the base, {_nats(found['ported_patch_kl'])} on the "
        f"evolved model; the update {_nats(found['update_kl'])}",
    }
    if outputs.shift is not None:
        rows["shift"] = (
            f"cosine {outputs.shift.cosine:.3f} between the patch's effect on the outputs before and after the "
            f"update; norm ratio {outputs.shift.ratio:.3g}"
        )
    return rows


def _modules(text: TextMeasures) -> dict[str, str]:
    found = text.features()
    rows = {}
    if text.modules:
        rows["reads"] = (
            f"cosine {found['read_cosine']:.3f}, norm ratio {found['read_ratio']:.3g}; worst tenth of "
            f"{len(text.modules)} modules {found['read_cosine_worst']:.3f}"
        )
        rows["adds"] = (
            f"cosine {found['effect_cosine']:.3f}, norm ratio {found['effect_ratio']:.3g}; changed by "
            f"{percent(found['effect_change'])}, worst tenth {percent(found['effect_change_worst'])}"
        )
    if "cka" in found:
        rows["hidden states"] = f"CKA {found['cka']:.3f} of base and evolved, minimum {found['cka_least']:.3f}"
    return rows


def _terms(text: TextMeasures) -> Mapping[str, str]:
    if text.terms is None:
        return {}
    found = text.features()
    cosine = _cosine(found.get("interference_cosine")) or "undefined: nothing drifted"
    return {
        "first order": f"gains {_nats(found['gain_on_evolved'])} on the evolved model, "
        f"{_nats(found['gain_on_base'])} on the base",
        "interference": f"cosine {cosine} with the drift, in the metric of the curvature",
    }


def _kept(kept: KeptShare | None) -> str:
    if kept is None:
        return "nothing to keep"
    error = "" if math.isinf(kept.error) else f" ± {100 * kept.error:.1g}"
    return f"{100 * kept.value:.3g}{error} %"


def _nats(value: float) -> str:
    return f"{value:.3g} nats"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
