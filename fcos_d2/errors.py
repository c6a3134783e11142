"""The one exception that means "the input is wrong, and here is what to do about it"."""


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
