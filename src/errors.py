"""The one exception that means "the user can fix this"."""


class UserError(Exception):
    """State a mistake in one line: what was wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 1.
    """
