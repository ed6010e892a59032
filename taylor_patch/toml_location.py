"""Where a key stands in a TOML text; the parsers keep no positions."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]")


def locate(text: str, path: Sequence[str | int]) -> tuple[int, int]:
    """(line, column), from 1, of the key at `path`; of the nearest table above it where the key is written inline.

    path: names, with a number after the name of an array of tables.
    """
    names = [str(part) for part in path if isinstance(part, str)]
    at = next((n for n, part in enumerate(path) if isinstance(part, int)), None)
    entry, array = (None, []) if at is None else (path[at], names[:at])
    table: list[str] = []
    seen: dict[str, int] = {}
    best, best_depth = (1, 1), 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            table = [part.strip().strip("\"'") for part in header[2].split(".")]
            name = ".".join(table)
            seen[name] = seen.get(name, -1) + 1
            found, column = table, header.start(2) + 1
        elif key := re.match(r"\s*([A-Za-z0-9_\-\"'.]+)\s*=", line):
            found, column = [*table, *(part.strip("\"'") for part in key[1].split("."))], key.start(1) + 1
        else:
            continue
        if entry is not None and table[: len(array)] == array and seen.get(".".join(array)) != entry:
            continue
        if len(found) <= len(names) and found == names[: len(found)] and len(found) > best_depth:
            best, best_depth = (number, column), len(found)
    return best
