"""comfy.sampler_helpers: estimate_memory also counts what the backends will want, before ComfyUI places the weights.

Nothing is ever unloaded from inside a forward pass: that moves weights in use. `memory_reserve = "free_memory"` asks ComfyUI to
unload before the run instead, which is what the experiment that this package comes from did in each attention call.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.engine import engine
from taylor_patch.hooks.cold import ColdPatch
from taylor_patch.run import current_run, open_runs

log = logging.getLogger("taylor_patch")

_patch = ColdPatch("estimate_memory", ("model", "noise_shape"))


def install(module: ModuleType) -> None:
    """Wrap estimate_memory(model, noise_shape, conds) -> (memory_required, minimum_memory_required), in bytes."""
    _patch.install(module, _estimate_memory)


def uninstall() -> None:
    """Put the original function back."""
    _patch.uninstall()


def _estimate_memory(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    estimate = wrapped(*args, **kwargs)
    try:
        shape, run = kwargs.get("noise_shape", args[1] if len(args) > 1 else ()), current_run()
        if len(shape) == 3 and run is not None and run.latent_shape:  # picture and sound packed into one tensor
            shape = run.latent_shape
        extra = engine().reserve(kwargs.get("model", args[0] if args else None), shape)
        required, minimum = estimate
        return required + extra, minimum + extra
    except Exception as error:
        log.warning("taylor_patch: no memory is reserved (%s: %s)", type(error).__name__, error)
        return estimate


def free_before_run(patcher: Any, latent_shape: Any) -> None:
    """With memory_reserve = "free_memory": unload models until the backends' workspace is free. The run's own models are placed after.

    A run inside another one frees nothing: the outer one's weights are in use.
    """
    try:
        nbytes = 0 if len(open_runs()) > 1 else engine().reserve(patcher, latent_shape, "free_memory")
        if nbytes:
            sys.modules["comfy.model_management"].free_memory(nbytes, patcher.load_device)
    except Exception as error:
        log.warning("taylor_patch: no memory is freed (%s: %s)", type(error).__name__, error)
