"""The public functions: install, uninstall, status, attention."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from torch import Tensor

from taylor_patch import engine as engines
from taylor_patch import startup
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.errors import BackendRefused, nearest


def install() -> None:
    """Patch what ComfyUI has imported, and the rest when it imports it. Does what TAYLOR_PATCH=1 does at start-up."""
    startup.activate()
    for target in startup.HOOKS:
        module = sys.modules.get(target)
        if module is not None and not getattr(module.__spec__, "_initializing", False):
            startup.fire(target, module)


def uninstall() -> None:
    """Restore every patched name to the original object and forget plugins and configuration."""
    for hook in startup.HOOKS.values():
        if hook in sys.modules:
            importlib.import_module(hook).uninstall()
    startup.fired.clear()
    engines.reset()


def status() -> dict[str, Any]:
    """What is in place: {"registered", "hooks", "patched", "settings", "problem", "plugins", "last_run"}."""
    attention_hook = sys.modules.get("taylor_patch.hooks.attention")
    current = engines.engine()
    return {
        "registered": startup.registered,
        "hooks": dict(startup.fired),
        "patched": list(attention_hook.patched()) if attention_hook else [],
        "settings": current.describe(),
        "problem": current.problem,
        "plugins": current.registry.plugins,
        "last_run": current.last_run,
    }


def attention(q: Tensor, k: Tensor, v: Tensor, *, backend: str, scale: float | None = None, key_mask: Tensor | None = None,
              grid: TokenGrid | None = None, quality: float | None = None) -> Tensor:
    """Attention by a backend that is named, outside ComfyUI.

    q: [B, H, N_q, D]; k, v: [B, H_kv, N_kv, D]; key_mask: [B or 1, N_kv] additive float32; scale: 1/sqrt(D) unless given.
    Returns [B, H, N_q, D]. Raises BackendRefused with every reason; never takes another backend instead.
    """
    current = engines.engine()
    if backend not in current.router.backends:
        names = sorted(current.router.backends)
        raise BackendRefused(f'backend "{backend}" is not one of {", ".join(names)}.' + nearest(backend, names))
    call = AttentionCall(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale, key_mask=key_mask, grid=grid,
                         target_error=current.config.target_error if quality is None else quality)
    chosen = current.router.backends[backend]
    if reasons := chosen.reasons_against(call):
        raise BackendRefused(f'backend "{backend}" cannot run q {list(q.shape)} {str(q.dtype).removeprefix("torch.")}, '
                             f"k {list(k.shape)} on {q.device}: {'; '.join(reasons)}. Use backend=\"sdpa\" for exact attention.")
    return chosen.run(call)
