"""The one exception that means "the input is wrong, and here is what to do about it"."""

import reprlib

LONGEST = 200  # characters of what a message quotes


class InputError(ValueError):
    """A user's input (config, data set, file, weights, tensor) cannot be used.

    The message is one line: what is wrong, where, and the next command to type or key to set.
    Scripts print it without a traceback and exit with status 2.
    """


def one_line_cause(error: BaseException) -> str:
    """The message of ``error`` without the traceback that a DataLoader worker wraps around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    if "Traceback" not in str(error):
        return " ".join(lines)
    return (
        lines[-1]
        .removeprefix(f"{type(error).__module__}.")
        .removeprefix(f"{type(error).__name__}: ")
    )


def shown(value: object) -> str:
    """A value of a user's file as a piece of a message: printable, on one line, and short."""
    text = value if isinstance(value, str) else _written(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def quoted(value: object) -> str:
    """The same with texts in quotation marks."""
    return shown(_written(value))


def _written(value: object) -> str:
    try:
        return _WRITER.repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "a number of thousands of digits"


_WRITER = reprlib.Repr()
_WRITER.maxstring = _WRITER.maxother = LONGEST
