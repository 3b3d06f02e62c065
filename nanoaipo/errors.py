"""The errors that whoever runs this can mend."""

import errno
import os
import re

# what helps against a disk that does not take what is written
FIXES = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room in the quota",
    errno.EROFS: "let it be written, or choose another --out",
    errno.EACCES: "give this user the right to it, or choose another --out",
    errno.EPERM: "give this user the right to it, or choose another --out",
    errno.EEXIST: "choose another --out",
    errno.EISDIR: "choose another --out",
    errno.ENOTDIR: "choose another --out",
    errno.ENAMETOOLONG: "choose another --out",
    errno.EIO: "look after the disk",
}


LONGEST = 1000  # characters of a message


class InputError(ValueError):
    """A wrong setting, file or model.

    The message is one line: the place (file:line, field or --setting), what is wrong, the fix.
    """

    def __init__(self, message):
        super().__init__(as_line(message))


def as_line(text):
    """A text that may quote anything, as one line for a terminal.

    Line breaks and what else cannot be printed become escapes; a long text is cut in its middle,
    because place and fix stand at its ends. User, key and query of an address are left out.
    """
    if len(text) > LONGEST:
        half = LONGEST // 2
        text = f"{text[:half]} ... {text[-half:]}"
    text = re.sub(r"(https?://)\S*@", r"\1***@", text)
    text = re.sub(r"(https?://[^\s?#]*)[?#]\S*", r"\1?***", text)
    printable = []
    for c in text:
        if not c.isprintable():
            c = c.encode("unicode_escape").decode()
        printable.append(c)
    return "".join(printable)


def reason_of(error):
    """The first line of an error's text, or the name of its class where it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def disk_fault(error, out):
    """The line for an error of a disk that is full or may not be written, or None for any other.

    out: what was being written, for errors that do not name their file.
    """
    number = error_number(error)
    if number not in FIXES:
        return None
    place = getattr(error, "filename", None) or out or "the disk"
    return (
        f"{place}: {os.strerror(number)}: {FIXES[number]} and run the same command again, "
        "which goes on from what is whole"
    )


def error_number(error):
    """The number that the system gives an error, or None: libraries have it in their text."""
    if isinstance(error, OSError):
        return error.errno
    text = str(error)
    quoted = re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", text)  # safetensors; checkpoints
    if quoted:
        return int(quoted[1] or quoted[2])

    # torch's writer of checkpoints tells that it could not write, not why
    if "inline_container.cc" in text and "Reader" not in text:
        return errno.ENOSPC
    return None
