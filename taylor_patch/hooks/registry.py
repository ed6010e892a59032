"""Our backends under their names in ComfyUI's registry of attention functions, for nodes that choose from it."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from taylor_patch.engine import engine
from taylor_patch.hooks.attention import answer_inside

log = logging.getLogger("taylor_patch")

_registered: list[str] = []
_module: ModuleType | None = None


def install(module: ModuleType, original: Callable[..., Any]) -> None:
    """Register every backend but `sdpa` where this ComfyUI has a registry. A name that is taken stays as it is; nothing is raised."""
    global _module
    known = getattr(module, "REGISTERED_ATTENTION_FUNCTIONS", None)
    if known is None or not hasattr(module, "register_attention_function"):
        return
    _module = module
    try:
        for name in engine().registry.backends:
            if name != "sdpa" and name not in known:
                module.register_attention_function(name, attention_function(name, original))
                _registered.append(name)
    except Exception as error:
        log.warning("taylor_patch: backends are not in ComfyUI's registry of attention functions (%s: %s)", type(error).__name__, error)


def uninstall() -> None:
    """Take the names out again."""
    for name in _registered:
        _module.REGISTERED_ATTENTION_FUNCTIONS.pop(name, None)  # type: ignore[union-attr]
    _registered.clear()


def attention_function(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """ComfyUI's attention by one backend; `original` answers what it cannot do, and every call outside sampling."""

    def attention(*args: Any, **kwargs: Any) -> Any:
        out = _outside_graph(name, args, kwargs) if is_compiling() else _answer(name, args, kwargs)
        return original(*args, **kwargs) if out is None else out

    functools.update_wrapper(attention, original, updated=())
    # It peeks into containers and takes them only where the backend answers, so it stands for the plain form and the other.
    attention.container_function = attention  # type: ignore[attr-defined]
    return attention


@torch.compiler.disable
def _outside_graph(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    return _answer(name, args, kwargs)


def _answer(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if "sigmas" not in (kwargs.get("transformer_options") or {}):
        return None
    return answer_inside(args, kwargs, override=False, backend=name)
