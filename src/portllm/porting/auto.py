"""How patches go through one update: by a method that is named, or by the one that `check`'s verdict leads to."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from portllm.errors import PortError, Refusal
from portllm.matching.port_plan import PortPlan, plan_port
from portllm.matching.update import Update
from portllm.methods.table import METHODS
from portllm.patch.patch import Patch
from portllm.patch.record import Choice
from portllm.porting.choice import choose
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.checking.report import PatchReport
    from portllm.checking.update.measures import MeasuredUpdate

AUTO = "auto"
"""In place of a row of `METHODS`: choose one."""


@dataclass(frozen=True)
class Route:
    """An update, and how patches are carried through it; what the choice of a method needs of it is read once.

    Attributes:
        update: The two models.
        method: A row of `METHODS`, or `auto`.
        force: With `auto`, port what will not hold.
        allow_other_base: Go on though the base is not the one that a patch names.
        reads: Whether there are prompts, so that, with `auto`, what is tried can be measured.
    """

    update: Update
    method: str = "add"
    force: bool = False
    allow_other_base: bool = False
    reads: bool = False

    def __post_init__(self) -> None:
        if self.force and self.method != AUTO:
            raise PortError(f"force requires method '{AUTO}'; '{self.method}' ports whatever is compatible.")

    def plan(self, patch: Patch[TensorInfo]) -> PortPlan:
        """Plan to carry a patch; by `auto`, what does not fit is refused before anything is measured.

        Raises:
            UnknownMethodError: There is no such method.
            CheckpointError, RemoteError: A model cannot be read.
        """
        if self.method != AUTO:
            return self._plan_by(self.method, patch)
        plan = self._plan_by(next(iter(METHODS)), patch)
        if self.update.base is None and not any(refusal.where == "--base" for refusal in plan.refusals):
            unnamed = Refusal(
                "--base", f"method '{AUTO}' compares the evolved model with the base: pass the base with --base."
            )
            return replace(plan, refusals=tuple(sorted((*plan.refusals, unnamed))))
        return plan if plan.refusals else self._chosen(plan, patch)

    def _chosen(self, plan: PortPlan, patch: Patch[TensorInfo]) -> PortPlan:
        from portllm.checking.check import check_patch  # what is named needs no verdict

        report = check_patch(plan, self._measured)
        verdict, evidence = report.verdict, _evidence(report)
        decision = choose(verdict, evidence, force=self.force, reads=self.reads)
        choice = Choice(
            str(verdict.answer), decision.reason, tuple(reason.text for reason in verdict.reasons), decision.is_forced
        )
        if decision.method is None:
            found = f"{plan.patch.name}: {verdict.answer}; {decision.reason}"
            return replace(plan, choice=choice, refusals=(Refusal(f"--method {AUTO}", f"{found} {_remedies(plan)}"),))
        if decision.method != plan.method.id:  # another one may ask for more
            plan = self._plan_by(decision.method, patch)
        return replace(plan, choice=choice, evidence={**plan.evidence, **evidence})

    def _plan_by(self, method: str, patch: Patch[TensorInfo]) -> PortPlan:
        return plan_port(patch, self.update, method=method, allow_other_base=self.allow_other_base)

    @cached_property
    def _measured(self) -> "MeasuredUpdate":
        from portllm.checking.update.measures import measure_update

        return measure_update(self.update)


def _remedies(plan: PortPlan) -> str:
    names = f"--base {plan.target.name} --teacher {plan.patch.name} --teacher-base {plan.source.name}"
    return (
        "With prompts, --text measures what can be kept and tries more than addition (docs/methods/align.md). "
        f"Without labels the evolved model can learn from the old one: portllm train {names} (docs/refresh.md); "
        "--init-from starts from the patch as ported with --force. With labels, train again. --force ports it "
        "anyway."
    )


def _evidence(report: "PatchReport") -> dict[str, float]:
    """The numbers that the verdict rests on."""
    drift = report.drift
    found: dict[str, float | None] = {
        "cosine_with_drift": report.alignment.cosine,
        "relative_size": report.relative_size,
        "quantization_gap": None if report.quantization is None else report.quantization.ratio,
        **{f"overlap_{side}": share.share for side, share in report.overlaps.items()},
    }
    if drift is not None:
        found |= {"drift": drift.relative.value, "drift_error": drift.relative.error, "cosine": drift.cosine.value}
    return {name: float(f"{value:.6g}") for name, value in found.items() if value is not None and math.isfinite(value)}
