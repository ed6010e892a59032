"""The second route: our function in transformer_options, where ComfyUI looks for a node's attention override. ADR 7.

It is one plain function without state, so that copies of the options and graphs of torch.compile always hold the right one. What
was there before stays beside it in the options.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.compiler import is_compiling

from taylor_patch.engine import engine
from taylor_patch.hooks.attention import OURS, PREVIOUS, answer_inside, original_function
from taylor_patch.hooks.contract import SLOT


@contextmanager
def in_place(model_options: Any, family: str) -> Iterator[None]:
    """Our override in a sampling run's model options, on top of an earlier one, where `hook = "override"` or, for the model family,
    `override_models` asks for it."""
    current = engine()
    settings = current.config.settings
    wanted = settings.hook == "override" or any(fnmatchcase(family.lower(), pattern.lower()) for pattern in settings.override_models)
    if not wanted or current.router.off or not isinstance(model_options, dict):
        yield
        return
    options = model_options.setdefault("transformer_options", {})
    earlier = options.get(SLOT)
    if earlier is attention_override:  # a run inside a run, with options copied from it
        yield
        return
    if earlier is not None:
        options[PREVIOUS] = earlier
    options[SLOT] = attention_override
    try:
        yield
    finally:
        if options.get(SLOT) is attention_override:
            del options[SLOT]
            if options.pop(PREVIOUS, None) is not None:
                options[SLOT] = earlier


def attention_override(func: Any, *args: Any, **kwargs: Any) -> Any:
    """ComfyUI's override contract: func is the attention function that was called, the others its arguments, in plain tensors."""
    if is_compiling():
        return _outside_graph(func, args, kwargs)
    return _answer(func, args, kwargs)


def _containers(*args: Any, **kwargs: Any) -> Any:
    """The same where q, k, v came in containers that may be taken once; ComfyUI does not say for which function."""
    if is_compiling():
        return _outside_graph(None, args, kwargs)
    return _answer(None, args, kwargs)


attention_override.container_function = _containers  # type: ignore[attr-defined]
setattr(attention_override, OURS, True)


@torch.compiler.disable
def _outside_graph(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _answer(func, args, kwargs)


def _answer(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    previous = (kwargs.get("transformer_options") or {}).get(PREVIOUS)
    out = answer_inside(args, kwargs, previous is not None)
    if out is not None:
        return out
    if func is not None:
        return func(*args, **kwargs) if previous is None else previous(func, *args, **kwargs)
    original = original_function()
    if previous is None:
        return original(*args, **kwargs)
    if hasattr(previous, "container_function"):
        return previous.container_function(*args, **kwargs)
    return previous(inspect.unwrap(original), *(container.take() for container in args[:3]), *args[3:], **kwargs)
