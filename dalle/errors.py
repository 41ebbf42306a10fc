"""The one exception for a user's mistake."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the caller can mend: a wrong file, flag, caption, shape or config.

    The message is one sentence that says what was expected, what came, and how to mend it. The command line prints it
    without a traceback.
    """
