"""The errors that whoever runs this can mend."""


class InputError(ValueError):
    """A wrong setting, file or model.

    The message is one line: the place (file:line, field or --setting), what is wrong, the fix.
    """


def reason_of(error):
    """The first line of an error's text, or the name of its class where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
