"""comfy.sampler_helpers: estimate_memory also counts what the backends will want, before ComfyUI places the weights.

Nothing is ever unloaded from inside a forward pass: that moves weights in use.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.engine import engine
from taylor_patch.hooks.cold import ColdPatch

log = logging.getLogger("taylor_patch")

_patch = ColdPatch("estimate_memory")


def install(module: ModuleType) -> None:
    """Wrap estimate_memory(model, noise_shape, conds) -> (memory_required, minimum_memory_required), in bytes."""
    _patch.install(module, _estimate_memory)


def uninstall() -> None:
    """Put the original function back."""
    _patch.uninstall()


def _estimate_memory(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    estimate = wrapped(*args, **kwargs)
    try:
        extra = engine().reserve(kwargs.get("model", args[0] if args else None), kwargs.get("noise_shape", args[1] if len(args) > 1 else ()))
        required, minimum = estimate
        return required + extra, minimum + extra
    except Exception as error:
        log.warning("taylor_patch: no memory is reserved (%s: %s)", type(error).__name__, error)
        return estimate
