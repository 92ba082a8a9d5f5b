"""Errors a person can act on."""


class UserError(Exception):
    """Something the user can fix: the command line prints it as one line and ends with `exit_code`."""

    exit_code = 2
