"""The exceptions that this package raises on purpose."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TaylorPatchError(Exception):
    """Base of all errors of taylor_patch; its text says what was asked, what was found and what to do."""


class ConfigError(TaylorPatchError):
    """A configuration is wrong; the text begins with file:line:column."""


class BackendRefused(TaylorPatchError):
    """A backend that was asked for by name cannot run this call; the text lists every reason."""


class PluginError(TaylorPatchError):
    """A plugin could not be loaded or registered something that is not a backend."""


def said(error: BaseException) -> str:
    """Name and text of an exception, for a line; the name alone where the text cannot be made. A PluginError needs no name."""
    try:
        return str(error) if isinstance(error, PluginError) else f"{type(error).__name__}: {error}"
    except Exception:
        return type(error).__name__


def nearest(name: str, valid: Iterable[str]) -> str:
    """"Did you mean ...?" with the closest of `valid`, or an empty string where none is close."""
    match = difflib.get_close_matches(name, list(valid), n=1)
    return f' Did you mean "{match[0]}"?' if match else ""
