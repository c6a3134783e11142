"""Reads decisions from bytes, and corrupts values by such decisions."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence


class Choices:
    """Converts bytes to a sequence of choices; after the last byte, the first option is chosen.

    Options are ordered from harmless to hostile, so that shorter inputs are simpler.
    """

    def __init__(self, data: bytes):
        self._data = data

    def number(self, bound: int) -> int:
        """Returns a number in [0, bound)."""
        size = (bound.bit_length() + 7) // 8
        taken, self._data = self._data[:size], self._data[size:]
        return int.from_bytes(taken, "little") % bound

    def of(self, options: Sequence):
        """Returns one of the options."""
        return options[self.number(len(options))]

    def rest(self) -> bytes:
        """Returns all bytes that are left."""
        taken, self._data = self._data, b""
        return taken


def nested(depth: int, end: object = 1) -> list:
    """Returns nested lists."""
    for _ in range(depth):
        end = [end]
    return end


# Invalid values for fields of JSON files, checkpoints and configs.
HOSTILE = (
    *(None, True, -1, 0, 1, 2, 2**31, 2**63, -(2**63) - 1, 10**400, 0.5, -0.5, 1e30, 1e308),
    *(math.nan, math.inf, -math.inf, "", "1", "nan", "..", "../../x", "/", "a\nb", "\0", "\ud800"),
    *("\U0001f600", "[1].png", "**", "9" * 5000, "x" * 70_000, [], {}, [1], [1, 2, 3, 4], [None]),
    *({"id": 1}, {"": None}, nested(40), ["1", "2", "3", "4"], [[1, 2, 3, 4]]),
)


def places(value: object) -> Iterator[tuple[dict | list, object]]:
    """Yields every entry of nested dicts and lists as its container and its key or index."""
    entries = ()
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list):
        entries = list(enumerate(value))
    for key, entry in entries:
        yield value, key
        yield from places(entry)


def corrupt(choices: Choices, content: object, max_changes: int = 4) -> object:
    """Returns a copy of ``content`` with up to ``max_changes`` changed entries."""
    content = [copy.deepcopy(content)]
    for _ in range(choices.number(max_changes + 1)):
        container, key = choices.of(list(places(content)))
        change = choices.of(("replace", "remove", "duplicate", "rename"))
        if change == "replace" or container is content:
            container[key] = copy.deepcopy(choices.of(HOSTILE))
        elif change == "remove":
            del container[key]
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
        else:
            container[str(choices.of(HOSTILE[:40]))] = container[key]
    return content[0]
