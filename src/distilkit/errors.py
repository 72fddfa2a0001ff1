"""The error that reports a wrong input."""


class UserError(ValueError):
    """Report a wrong input; the message gives the value, the limit and the cure."""
