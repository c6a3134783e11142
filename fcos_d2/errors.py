"""The one exception that means "the input is wrong, and here is what to do about it"."""

import difflib
import importlib
import reprlib
import sys
from collections.abc import Callable, Iterable
from types import ModuleType

LONGEST = 200  # characters of a value in a message


class InputError(ValueError):
    """A user's input (config, dataset, file, weights, tensor) cannot be used.

    The message is one line: what is wrong, where, and the next command to type or key to set.
    Scripts print it without a traceback and exit with status 2.
    """


def exit_status(script: Callable[..., int | None], *arguments) -> int:
    """Returns the status of ``script``; prints a line for an InputError (2) or Ctrl-C (130)."""
    try:
        return script(*arguments) or 0
    except InputError as error:
        print(f"error: {one_line_cause(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def import_optional(module: str, purpose: str, package: str | None = None) -> ModuleType:
    """Imports a module that only ``purpose`` needs; ``package`` is its pip name if it differs.

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
    """Returns advice about an unknown name: up to three similar ones, or else ``otherwise``.

    Args:
        name: what the user wrote.
        known: the names that exist.
        otherwise: the advice if no name is similar.
        first: names that are more likely meant than similar ones.
    """
    close = list(first)[:3] or difflib.get_close_matches(name, known)
    return f"did you mean {' or '.join(close)}?" if close else otherwise


def one_line_cause(error: BaseException) -> str:
    """Returns the message of ``error`` without the traceback that a DataLoader worker adds."""
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
    """Formats a value from a user's file for an error message: printable, one line, and short.

    Args:
        value: anything.
        quote: put strings in quotation marks.
    """
    text = value if isinstance(value, str) and not quote else _repr(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _repr(value: object) -> str:
    try:
        return _REPR.repr(value)
    except ValueError:  # Python does not format integers of more than 4300 digits
        return "a number with thousands of digits"


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = LONGEST
