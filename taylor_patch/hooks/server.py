"""server: PromptServer.add_routes also gets the page at /taylor_patch.

Other programs have modules called `server` too, so nothing is imported here before ComfyUI's own was recognised. Nothing depends on the
page: where its routes cannot be added, one debug line says so.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.hooks.cold import ColdPatch

log = logging.getLogger("taylor_patch")

_patch = ColdPatch("PromptServer.add_routes")


def install(module: ModuleType) -> None:
    """Wrap PromptServer.add_routes, which ComfyUI calls once before the server starts."""
    if not hasattr(getattr(module, "PromptServer", None), "add_routes"):
        log.debug("taylor_patch: no page: %s has no PromptServer.add_routes", module.__name__)
        return
    _patch.install(module, _add_routes)


def uninstall() -> None:
    """Put the original method back. Routes that were added stay; the page then says that nothing is patched."""
    _patch.uninstall()


def _add_routes(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        from taylor_patch.live.routes import add

        # Before ComfyUI's own: its last route answers every path, and it repeats what is in the table under /api.
        add(instance.routes)
    except Exception as error:
        log.debug("taylor_patch: no page: its routes cannot be added (%s: %s)", type(error).__name__, error)
    return wrapped(*args, **kwargs)
