"""What is known of ComfyUI's functions. One that takes other arguments is left alone: a patch that guesses would break a picture."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
"""Of optimized_attention, in order; attention_sub_quad calls the first three query, key and value."""
INSIDE = "_inside_attn_wrapper"
"""Keyword of a call that ComfyUI has dispatched already."""
SLOT = "optimized_attention_override"
"""Key of transformer_options: the function that ComfyUI calls instead, with the original before the call's own arguments."""


class UnknownContract(AttributeError):
    """This ComfyUI's function is not one that taylor_patch knows."""


def check_leading(name: str, function: Callable[..., Any], expected: Sequence[str]) -> None:
    """Raise UnknownContract unless the first parameters of `function` have these names. More may follow.

    A function that takes just anything, as another plugin's wrapper may, passes.
    """
    parameters = list(inspect.signature(function).parameters.values())
    if parameters and all(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return
    found = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(expected)]
    renamed = {"query": "q", "key": "k", "value": "v"}
    if [renamed.get(parameter, parameter) for parameter in found] != list(expected):
        raise UnknownContract(f"{name}({', '.join(p.name for p in parameters)}) is not known to taylor_patch, which expects "
                              f"({', '.join(expected)}, ...); look for a newer taylor_patch")


def check_attention(module: ModuleType) -> None:
    """Raise UnknownContract unless comfy.ldm.modules.attention has what the hook on it rests on."""
    function = getattr(module, "optimized_attention", None)
    if function is None:
        raise UnknownContract("comfy.ldm.modules.attention has no optimized_attention; this ComfyUI is not known to taylor_patch")
    for name in ("optimized_attention", "optimized_attention_masked"):
        check_leading(name, getattr(module, name, function), PARAMETERS)
    container = getattr(module, "AttentionTensorContainer", None)
    if container is not None and not (hasattr(container, "peek") and hasattr(container, "take")):
        raise UnknownContract("AttentionTensorContainer has no peek and take; this ComfyUI is not known to taylor_patch")
