"""The one error of this library that a user can mend."""


class UserError(ValueError):
    """Report a wrong input; the message gives the value, the limit and the cure."""
