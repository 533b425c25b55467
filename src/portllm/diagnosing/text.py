"""What `doctor` prints, for people and as JSON."""

from portllm.diagnosing.doctor import DoctorReport, Extra
from portllm.installed import Needed, how_to_get
from portllm.show.numbers import counted
from portllm.show.printable import one_line
from portllm.show.table import columns, n_bytes, table


def render_doctor(report: DoctorReport) -> str:
    """What `doctor` prints: what is wrong and what helps, the machine, what is installed, and what lies on disk."""
    lines = [_first(report), *(f"  - {one_line(problem)}" for problem in report.problems)]
    lines += ["", f"portllm {report.version}", *table(_machine(report))]
    lines += ["packages", *columns([_package(package) for package in report.packages])] if report.packages else []
    lines += ["extras", *columns([_extra(extra) for extra in report.extras])]
    lines += [
        "caches",
        *columns([(cache.name, n_bytes(cache.n_bytes), str(cache.folder)) for cache in report.caches]),
        *(f"  to clear {cache.name}: {one_line(cache.how_to_clear)}" for cache in report.caches if cache.n_bytes),
    ]
    if report.trials:
        lines += [
            "tried",
            *columns([("ok" if it.works else "NO", it.name, one_line(it.finding)) for it in report.trials]),
        ]
    return "\n".join(lines)


def _first(report: DoctorReport) -> str:
    if report.problems:
        return f"Not well: {counted(len(report.problems), 'problem')}."
    missing = [extra.name for extra in report.extras if not extra.is_installed]
    extras = f"; extras that are not installed: {', '.join(missing)}" if missing else ", with every extra"
    return f"Well: all that PortLLM needs is here{extras}."


def _machine(report: DoctorReport) -> dict[str, str]:
    token = f"token from {report.token}" if report.token else "no token; for gated or private models: hf auth login"
    return {
        "folder": str(report.folder),
        "python": report.python,
        "system": f"{report.system}, {counted(report.cores, 'core')}, {n_bytes(report.memory)} of memory",
        "torch": f"built for {report.torch_built_for}",
        "devices": ", ".join(("cpu", *report.gpus)),
        "loops in C": f"{report.loops[-1]}"
        if report.loops
        else "none: merging and checking take several times as long",
        "hub": f"{report.hub}, {'offline (HF_HUB_OFFLINE), ' if report.is_offline else ''}{token}",
        **{f"builtin:{name}": missing or "installed" for name, missing in report.models.items()},
    }


def _package(package: Needed) -> tuple[str, str, str]:
    state = "ok" if package.suits else "NO"
    return state, package.requirement, package.found or "not installed"


def _extra(extra: Extra) -> tuple[str, str, str]:
    if extra.is_installed:
        return extra.name, "installed", extra.purpose
    return extra.name, "missing", f"{extra.purpose}. {how_to_get(extra.name)}"


def doctor_to_json(report: DoctorReport) -> dict[str, object]:
    """The report as JSON values."""
    return {
        "version": report.version,
        "folder": str(report.folder),
        "python": report.python,
        "system": report.system,
        "cores": report.cores,
        "memory_bytes": report.memory,
        "packages": [_package_to_json(package) for package in report.packages],
        "extras": {
            extra.name: {
                "installed": extra.is_installed,
                "packages": [_package_to_json(package) for package in extra.packages],
            }
            for extra in report.extras
        },
        "builtin": {name: not missing for name, missing in report.models.items()},
        "torch_built_for": report.torch_built_for,
        "gpus": list(report.gpus),
        "loops": list(report.loops),
        "caches": [
            {"name": cache.name, "folder": str(cache.folder), "bytes": cache.n_bytes, "clear": cache.how_to_clear}
            for cache in report.caches
        ],
        "hub": {"endpoint": report.hub, "offline": report.is_offline, "token_from": report.token},
        "tried": [{"name": trial.name, "works": trial.works, "finding": trial.finding} for trial in report.trials],
        "problems": list(report.problems),
    }


def _package_to_json(package: Needed) -> dict[str, object]:
    return {"requirement": package.requirement, "found": package.found, "suits": package.suits}
