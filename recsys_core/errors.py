"""What people can mend themselves."""


class UserError(Exception):
    """A mistake in what was asked, configured or delivered. The message says in a line or two what is wrong, where, and what to
    do; commands print it without a traceback and end with exit code 2."""
