"""InputError, which reports invalid user input, and helpers that format its messages."""

import difflib
import importlib
import reprlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

MAX_LENGTH = 200  # characters of a value in a message


class InputError(ValueError):
    """Raised if a config, dataset, file, checkpoint or tensor of the user is invalid.

    The message is one line: what is wrong, where, and the next command to type or key to set.
    Scripts print it without a traceback and exit with status 2.
    """


def exit_status(script: Callable[..., int | None], *arguments) -> int:
    """Runs ``script``; returns its exit status, 2 after an InputError or 130 after Ctrl-C."""
    try:
        return script(*arguments) or 0
    except InputError as error:
        print(f"error: {one_line_cause(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def import_optional(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports a module that only ``purpose`` needs, from ``package`` if that has another name.

    Raises:
        InputError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {module}, which is not installed; install it with: pip install "
            f"{package or module}"
        ) from error


def suggest(name: str, known: Iterable[str], otherwise: str, first: Iterable[str] = ()) -> str:
    """Suggests up to three names similar to an unknown one, or else returns ``otherwise``.

    Args:
        name: the unknown name.
        known: all valid names.
        otherwise: the advice if no name is similar.
        first: names to suggest instead of similar ones.
    """
    close = list(first)[:3] or difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def one_line_cause(error: BaseException) -> str:
    """Returns the message of ``error`` in one line, without the traceback of a worker process."""
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


def format_value(value: object, *, quote: bool = False) -> str:
    """Formats a value of any type for an error message: one short line of printable characters.

    Args:
        value: the value.
        quote: whether to put strings in quotation marks.
    """
    text = value if isinstance(value, str) and not quote else _repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= MAX_LENGTH else f"{text[: MAX_LENGTH - 3]}..."


def _repr(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # Python does not format integers of more than 4300 digits
        return "a number with thousands of digits"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = MAX_LENGTH
