"""How far the weights have moved since the base that a ported patch was trained on. Pure: a record in, numbers out.

A patch that is ported again and again meets the drift of every update on its way, and each may be short while all of
them together are not. Each port notes how far its update moved the weights, `r_i = |W_i - W_(i-1)| / |W_(i-1)|`, where
both models were at hand. By the triangle inequality, and since `|W_i| <= (1 + r_i) |W_(i-1)|`,

    |W_n - W_0| / |W_0|  <=  (1 + r_1) (1 + r_2) ... (1 + r_n) - 1.

Updates that know nothing of each other add up to less (in the squares); ones that go on in one direction reach it. So
it is a bound, and said to be one; where the first base is at hand, the distance to it is measured instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from portllm.files.record import encode
from portllm.measures.estimate import NORMAL_95, DriftEstimate
from portllm.patch.record import ModelIdentity, PatchRecord


@dataclass(frozen=True, slots=True)
class Hop:
    """One update on the way of a patch.

    Attributes:
        source: The name of the model before.
        target: The name of the model after.
        drift: Relative drift of the weights that the patch changes, at the upper end of what was measured; None where
            it was not.
    """

    source: str
    target: str
    drift: float | None


@dataclass(frozen=True, slots=True)
class Chain:
    """The way of a ported patch from the base that it was trained on.

    Attributes:
        trained_on: That base.
        hops: Every update on the way, the one that is checked last.
        measured: Drift from that base to the evolved model, where it is at hand; else None.
    """

    trained_on: ModelIdentity
    hops: tuple[Hop, ...]
    measured: DriftEstimate | None = None

    @property
    def at_most(self) -> float | None:
        """What the relative drift since training cannot exceed; None where part of the way was not measured.

        Example:
            >>> base = ModelIdentity("base", "s4k1:" + "0" * 40, None)
            >>> Chain(base, (Hop("a", "b", 0.5), Hop("b", "c", 0.1))).at_most
            0.65
        """
        drifts = [hop.drift for hop in self.hops]
        if any(drift is None for drift in drifts):
            return None
        return float(f"{math.prod(1 + (drift or 0.0) for drift in drifts) - 1:.6g}")

    @property
    def unmeasured(self) -> tuple[Hop, ...]:
        """The updates whose drift nobody has measured."""
        return tuple(hop for hop in self.hops if hop.drift is None)

    def to_json(self) -> dict[str, object]:
        """As JSON values, but for what was measured, which is written as every drift is."""
        return {
            "trained_on": encode(self.trained_on),
            "updates": [{"from": hop.source, "to": hop.target, "drift": hop.drift} for hop in self.hops],
            "drift_at_most": self.at_most,
        }


def chain_of(
    record: PatchRecord | None, base: ModelIdentity, evolved: ModelIdentity, drift: DriftEstimate | None
) -> Chain | None:
    """The way of a patch to the evolved model; None for one that was never ported.

    Args:
        record: The patch's.
        base: The model that it is ported from now.
        evolved: The evolved model.
        drift: From the one to the other, of the weights that the patch changes.
    """
    if record is None or not record.ports:
        return None
    hops = [Hop(port.source.name, port.target.name, _noted(port.evidence)) for port in record.ports]
    for number, port in enumerate(record.ports):
        if port.source.fingerprint == port.target.fingerprint:
            hops[number] = Hop(port.source.name, port.target.name, 0.0)
    if base.fingerprint != record.base.fingerprint:  # another base is meant, which nobody has compared with its own
        hops.append(Hop(record.base.name, base.name, None))
    last = None if drift is None else drift.relative.high
    hops.append(Hop(base.name, evolved.name, last if last is not None and math.isfinite(last) else None))
    return Chain(record.ports[0].source, tuple(hops))


def _noted(evidence: Mapping[str, int | float]) -> float | None:
    """The drift that a port noted: what `check` found, with its error, or what the fingerprints' samples said."""
    drift = evidence.get("drift", evidence.get("sampled_drift"))
    if drift is None or not math.isfinite(drift) or drift < 0:
        return None
    error = evidence.get("drift_error", 0.0) if "drift" in evidence else 0.0
    return drift + NORMAL_95 * error if math.isfinite(error) else None
