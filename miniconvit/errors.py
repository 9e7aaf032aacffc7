"""The one kind of error that a user is meant to read."""


class UserError(ValueError):
    """A sentence for the user: what was expected, what was found, what to do.

    The command line prints it on standard error and exits with status 2, without a traceback.
    """
