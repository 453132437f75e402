"""The one error a user sees."""


class SecateurError(Exception):
    """Something about the input, the recipe or the machine stops the work; the message says what, and the way out.

    The command line prints the message without a traceback and exits with code 2.
    """
