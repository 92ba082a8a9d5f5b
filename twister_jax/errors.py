"""Errors a person can act on."""


class UserError(Exception):
    """Something the user can fix: the command line prints it as one line and ends with `exit_code`."""

    exit_code = 2


class MissingExtraError(UserError):
    """A feature needs packages that are not installed; the message has the command that installs them."""

    def __init__(self, extra: str, what: str):
        super().__init__(f"{what} needs packages that are not installed: pip install 'twister_jax[{extra}]'")
