"""Settings that are out of their range are refused all at once, before any work is done."""

from portllm.errors import PortLLMError


def require_ranges(what: str, *rules: tuple[str, object, str, bool]) -> None:
    """Raise PortLLMError if a rule does not hold.

    Args:
        what: Whose settings they are.
        *rules: Name, value, what was expected, and whether the value is so.

    Example:
        >>> require_ranges("training settings", ("rank", 8, "1 or more", True))
    """
    problems = [f"{name} is {value}; expected {expected}" for name, value, expected, holds in rules if not holds]
    if problems:
        raise PortLLMError(f"{what}: {'; '.join(problems)}.")
