"""What the dataclass of a backend's options may look like, so that any TOML file can be checked against it and written from it."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal

from taylor_patch.errors import PluginError, said
from taylor_patch.options import problems_of

ALLOWED = "bool, int, float, str, Literal of texts and whole numbers, tuple[str, ...], or several of them joined by |"


def checked(kind: Any) -> type:
    """`kind`, the dataclass of [backends.NAME]. Raises PluginError, which names the field, where it cannot be one.

    Every field has an annotation of ALLOWED and a default that fits it; problems(), where there is one, returns an empty mapping for the
    defaults.
    """
    if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
        raise PluginError(f"its options_type is {kind!r}, which is not a dataclass")
    hints = _hints(kind)
    for field in dataclasses.fields(kind):
        here = f"{kind.__name__}.{field.name}"
        if not all(_is_allowed(choice) for choice in _choices(hints[field.name])):
            raise PluginError(f"{here} is annotated {_shown(field.type)}; allowed are {ALLOWED}")
        if field.init and field.default is dataclasses.MISSING:
            raise PluginError(f"{here} has no default; write one behind =, of {ALLOWED}")
        if field.init and not any(_fits(field.default, choice) for choice in _choices(hints[field.name])):
            raise PluginError(f"{here} has the default {field.default!r}, which is not {_shown(field.type)}")
    try:
        found = problems_of(kind())
    except PluginError:
        raise
    except (Exception, SystemExit) as error:
        raise PluginError(f"{kind.__name__}: its defaults cannot be used ({said(error)})") from error
    for name, problem in found.items():
        raise PluginError(f"{kind.__name__}.{name}: its default is refused ({problem})")
    return kind


def _hints(kind: type) -> dict[str, Any]:
    try:
        return typing.get_type_hints(kind)
    except Exception as error:
        missing = getattr(error, "name", None)
        names = [field.name for field in dataclasses.fields(kind) if missing and missing in str(field.type)]
        raise PluginError(f"{kind.__name__}{''.join(f'.{name}' for name in names[:1])}: its annotation cannot be resolved ({said(error)}); "
                          f"allowed are {ALLOWED}") from error


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _is_allowed(hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return all(type(value) in (str, int) for value in typing.get_args(hint))
    return hint in (bool, int, float, str) or (typing.get_origin(hint) is tuple and typing.get_args(hint) == (str, ...))


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return any(value == literal and type(value) is type(literal) for literal in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _shown(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    return annotation.__name__ if isinstance(annotation, type) and typing.get_origin(annotation) is None else str(annotation)
