"""Keys of the configuration with their meaning and range: how Settings and the options of backends are declared."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from taylor_patch.errors import PluginError

T = TypeVar("T")


def option(default: T, meaning: str, *, at_least: float | None = None, above: float | None = None, at_most: float | None = None) -> T:
    """A field of a frozen dataclass of options, with what its schema and the documents say of it.

    default: its value where nothing is configured, a tuple for lists. meaning: one line. at_least, above, at_most: bounds of a number,
    `above` excluded; where a key also takes words, they hold for numbers only.
    Returns the field; the type is that of the value, which instances have.
    """
    bounds = {"minimum": at_least, "exclusiveMinimum": above, "maximum": at_most}  # as JSON Schema calls them
    metadata = {"description": meaning, **{name: bound for name, bound in bounds.items() if bound is not None}}
    return dataclasses.field(default=default, metadata=metadata)  # type: ignore[no-any-return]


def problems_of(options: Any) -> dict[str, str]:
    """Key -> what is wrong with its value: bounds of its `option`, then what the class's own `problems()` says. Empty when all is well.

    Raises what problems() raises, and PluginError where it returns no mapping.
    """
    found = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool) and (problem := _outside(value, field.metadata)):
            found[field.name] = f"{value} is {problem}"
    own = options.problems() if hasattr(options, "problems") else {}
    if not isinstance(own, Mapping):
        raise PluginError(f"{type(options).__name__}.problems() returned {own!r}, not a dict of option -> what is wrong with it")
    return {**own, **found}


def _outside(value: float, bounds: Mapping[str, Any]) -> str:
    """How `value` misses the bounds (nan misses every one), or an empty string."""
    least, above, most = (bounds.get(name) for name in ("minimum", "exclusiveMinimum", "maximum"))
    inside = (least is None or value >= least) and (above is None or value > above) and (most is None or value <= most)
    if inside:
        return ""
    if most is not None and least is not None:
        return f"outside {least} to {most}"
    if most is not None and above is not None:
        return f"outside {above} to {most} ({above} excluded)"
    return f"below {least}" if least is not None else f"not above {above}" if above is not None else f"above {most}"
