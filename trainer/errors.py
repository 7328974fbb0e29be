"""The exception for errors that a user can correct. The command line prints its message without a traceback."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can correct. Its message says what was given, what was expected and what to do."""
