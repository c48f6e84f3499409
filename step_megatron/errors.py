"""The base of errors that a user can mend."""


class UserError(Exception):
    """Something outside the program is wrong (a mirror, a file, a setting); the message says what and how to mend it.

    Mixed into errors of a room beside a built-in one; the command line prints the message without a traceback.
    """

    # A KeyError mixed in would print its message in quotes.
    __str__ = Exception.__str__
