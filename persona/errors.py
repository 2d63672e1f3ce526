"""The one exception that a user may meet: something known went wrong and one line says what to do.

Verbs print it as that line and exit with status 2; anything else that escapes is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """A foreseen failure. The message is one line: what was given, what is allowed, what to do."""
