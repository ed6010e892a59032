"""Wrapping a function that is called once a run or once a model evaluation, by wrapt, with a way back."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import wrapt

from taylor_patch.hooks.contract import check_leading


class ColdPatch:
    """One wrapped attribute, for example "CFGGuider.outer_sample", and the names of its first parameters."""

    def __init__(self, path: str, leading: tuple[str, ...] = ()) -> None:
        self.path, self.leading = path, leading
        self._undo: tuple[Any, str, Any] | None = None

    def install(self, module: ModuleType, wrapper: Callable[..., Any]) -> None:
        """Wrap the attribute once. Raises AttributeError where the module has none or it takes other arguments (UnknownContract)."""
        if self._undo is not None:
            return
        parent, attribute, original = wrapt.resolve_path(module, self.path)
        check_leading(self.path, original, self.leading)
        wrapt.wrap_function_wrapper(module, self.path, wrapper)
        self._undo = (parent, attribute, original)

    def uninstall(self) -> None:
        """Restore the original unless somebody has wrapped it again since; then ours stays beneath and passes through."""
        if self._undo is not None:
            parent, attribute, original = self._undo
            if getattr(parent.__dict__.get(attribute), "__wrapped__", None) is original:
                setattr(parent, attribute, original)
            self._undo = None
