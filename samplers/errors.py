"""The one exception that a user's mistake raises; the command line prints it as one line and exits with 2."""


class UserError(ValueError):
    """What is wrong, where, and what would be right, in one line."""
