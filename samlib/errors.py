"""The one exception for bad input: the command line turns it into exit code 2."""


class InputError(ValueError):
    """Something a user wrote is wrong. The message names the field, the value and the remedy."""
