"""The errors that whoever runs this can mend."""


class InputError(ValueError):
    """A wrong setting, file or model.

    The message is one line: the place (file:line, field or --setting), what is wrong, the fix.
    """
