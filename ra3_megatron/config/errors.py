"""Errors a user can cure, told apart from errors that are ours."""


class UserError(ValueError):
    """Bad input or an impossible request.

    The message says what was asked, what was found and what to change. The command line prints it as it is,
    without a traceback, and exits with code 2.
    """
