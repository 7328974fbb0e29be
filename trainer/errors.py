"""The one exception a user can cause: the command line prints its message and no traceback."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. The message says what was given, what was expected and what to do."""
