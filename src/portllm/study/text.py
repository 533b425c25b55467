"""How far a study is, as lines or as JSON."""

from collections import Counter

from portllm.study.definition.estimate import Estimated
from portllm.study.definition.plan import steps_of
from portllm.study.run import StepReport, StudyStatus

MINUTE, HOUR = 60, 3600


def render_status(status: StudyStatus, *, steps: bool) -> str:
    """What `study status` prints: done and left by kind, and the time; with `steps`, each step that is left."""
    kinds = Counter(step.kind for step in steps_of(status.study))
    left = Counter(step.kind for step in status.left.steps)
    n_done = status.n_steps - len(status.left.steps)
    took = f", in {lasting(status.seconds)}" if n_done else ""
    lines = [f"{n_done} of {status.n_steps} steps are done{took}; {still(status.left)}."]
    lines += [f"{status.study.title}: {status.study.base}, in {status.out}"]
    lines += [f"  {kind:<7} {count - left[kind]} of {count} done" for kind, count in kinds.items()]
    if steps:
        lines += [f"  {step.name}" for step in status.left.steps]
    return "\n".join(lines)


def status_to_json(status: StudyStatus) -> dict[str, object]:
    """What `study status --json` prints."""
    return {
        "title": status.study.title,
        "output": str(status.out),
        "n_steps": status.n_steps,
        "n_done": status.n_steps - len(status.left.steps),
        "seconds": status.seconds,
        "left": [step.name for step in status.left.steps],
        "seconds_left": status.left.seconds,
        "n_unknown": status.left.n_unknown,
    }


def render_step(step: StepReport) -> str:
    """The line that `study run` prints when a step is done."""
    dropped = f"; {len(step.dropped)} outputs dropped" if step.dropped else ""
    return f"{step.step.name}: {lasting(step.record.seconds)}{dropped}; {still(step.left)}"


def still(left: Estimated) -> str:
    """How long it will take.

    Example:
        >>> still(Estimated((), 0.0, 0))
        'nothing left'
    """
    if not left.steps:
        return "nothing left"
    if left.n_unknown == len(left.steps):
        return f"{len(left.steps)} steps left"
    unknown = f" and {left.n_unknown} steps of unknown duration" if left.n_unknown else ""
    return f"{len(left.steps)} steps left: about {lasting(left.seconds)}{unknown}"


def lasting(seconds: float) -> str:
    """A time as people say it.

    Example:
        >>> lasting(7.25), lasting(200), lasting(5400)
        ('7.2 s', '3 min 20 s', '1 h 30 min')
    """
    if seconds < MINUTE:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
