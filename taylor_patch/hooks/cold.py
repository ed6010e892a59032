"""Wrapping a function that is called once a run or once a model evaluation, by wrapt, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt


class ColdPatch:
    """One wrapped attribute, for example "CFGGuider.outer_sample"."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._undo: tuple[Any, str, Any] | None = None

    def install(self, module: ModuleType, wrapper: Callable[..., Any]) -> None:
        """Wrap the attribute once. Raises AttributeError where the module has none."""
        if self._undo is not None:
            return
        parent, attribute, original = wrapt.resolve_path(module, self.path)
        wrapt.wrap_function_wrapper(module, self.path, wrapper)
        self._undo = (parent, attribute, original)

    def uninstall(self) -> None:
        """Restore the original unless somebody has wrapped it again since; then ours stays beneath and passes through."""
        if self._undo is not None:
            parent, attribute, original = self._undo
            if getattr(parent.__dict__.get(attribute), "__wrapped__", None) is original:
                setattr(parent, attribute, original)
            self._undo = None
