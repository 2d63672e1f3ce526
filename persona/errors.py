"""The one exception that a user may meet: something foreseen failed and one line says what to do.

Commands print it as that line and exit with status 2; anything else that escapes is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """A foreseen failure. The message is one line: what was given, what is allowed, what to do."""


def describe_value(value: object) -> str:
    """What a value is, for an error: short, and without the content of tensors or texts."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        names = [repr(name) for name in list(value)[:6]] + ["..."] * (len(value) > 6)
        return f"a dict of {', '.join(names) or 'nothing'}"
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    if value is None or isinstance(value, (bool, int, float)):
        return repr(value)
    return f"a {type(value).__name__}"
