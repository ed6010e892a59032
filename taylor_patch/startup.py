"""Activation: register post-import hooks for ComfyUI's modules, and nothing else.

Runs at interpreter start, in pip and git helpers too, so it imports only the standard library and wrapt, never torch
or comfy. A hook that raised would make ComfyUI's own import fail: each one is guarded here.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

# ComfyUI module -> our module whose install(module) patches it.
HOOKS = {
    "comfy.ldm.modules.attention": "taylor_patch.hooks.attention",
    "comfy.samplers": "taylor_patch.hooks.sampling",
    "comfy.model_base": "taylor_patch.hooks.evaluation",
    "comfy.sampler_helpers": "taylor_patch.hooks.memory",
    "server": "taylor_patch.hooks.server",
}

registered = False
fired: dict[str, str] = {}
"""ComfyUI module -> "ok", or why its hook failed; read by `doctor` and `taylor_patch.status()`."""


def activate() -> None:
    """Register the hooks, once in a process."""
    global registered
    if registered:
        return
    from wrapt import register_post_import_hook

    registered = True
    for target in HOOKS:
        module = sys.modules.get(target)
        if module is None:
            register_post_import_hook(_guarded(target), target)
        elif not getattr(module.__spec__, "_initializing", False):
            # Half-initialised modules are left alone: their names are not there yet.
            fire(target, module)


def _guarded(target: str) -> Any:
    def hook(module: ModuleType) -> None:
        fire(target, module)

    return hook


def fire(target: str, module: ModuleType) -> None:
    """Run the hook for `target`; a failure is one line on stderr and a record, never an exception."""
    try:
        importlib.import_module(HOOKS[target]).install(module)
        fired[target] = "ok"
    except (Exception, SystemExit) as error:
        fired[target] = f"{type(error).__name__}: {error}"
        print(f"taylor_patch: {target} is not patched ({fired[target]}). "
              "ComfyUI uses its own attention; `taylor-patch doctor` says more.", file=sys.stderr)
