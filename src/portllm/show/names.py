"""What models and patches are called in sentences and titles: their names, not where they lie. Pure."""


def short_name(given: str) -> str:
    """The last part of a path; a name of the Hub, or of a built-in model, stays whole.

    Example:
        >>> [short_name(given) for given in ("/models/v2/", "../v2", "runs/a/v2", "org/model@main", "builtin:smollm2")]
        ['v2', 'v2', 'v2', 'org/model@main', 'builtin:smollm2']
    """
    is_path = given.startswith(("/", ".", "~")) or given.count("/") > 1
    return _last(given) if is_path else given


def patch_name(given: str) -> str:
    """The name of a patch, which is always a folder.

    Example:
        >>> patch_name("runs/tickets"), patch_name(".")
        ('tickets', '.')
    """
    return _last(given)


def method_name(method: str) -> str:
    """The word for a port method, for those that have one of their own.

    Example:
        >>> method_name("add"), method_name("align")
        ('addition', 'align')
    """
    return {"add": "addition"}.get(method, method)


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path
