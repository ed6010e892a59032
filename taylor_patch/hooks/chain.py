"""Who else patched ComfyUI's functions, and in which order."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from taylor_patch.hooks.attention import NAMES

log = logging.getLogger("taylor_patch")

COLD = (("comfy.samplers", "CFGGuider.outer_sample"), ("comfy.model_base", "BaseModel.apply_model"),
        ("comfy.sampler_helpers", "estimate_memory"))
COMFYUI = ("comfy",)
"""Packages whose functions are ComfyUI's own."""
_reported: set[str] = set()


def parties(function: Callable[..., Any] | None) -> list[str]:
    """Whose a function is and whose it wraps, outermost first: "taylor_patch", "ComfyUI", or "package.module.function" of others."""
    found: list[str] = []
    while function is not None and len(found) < 32:
        party = _party(getattr(function, "_self_wrapper", function))  # wrapt keeps the wrapper there
        if found[-1:] != [party]:
            found.append(party)
        function = getattr(function, "__wrapped__", None)
    return found


def _party(function: Any) -> str:
    """By the code, not by __module__, which functools.wraps copies from the wrapped function."""
    module = getattr(function, "__globals__", {}).get("__name__") or getattr(function, "__module__", None) or type(function).__module__
    if module.split(".")[0] == "taylor_patch":
        return "taylor_patch"
    if module.split(".")[0] in COMFYUI:
        return "ComfyUI"
    code = getattr(function, "__code__", None)
    return f"{module}.{code.co_name if code is not None else getattr(function, '__name__', type(function).__name__)}"


def chains() -> dict[str, list[str]]:
    """Name -> parties, for every function that is patched, and for every module in which another stands under the name of ComfyUI's."""
    found = {}
    attention = sys.modules.get("comfy.ldm.modules.attention")
    ours = {name: getattr(attention, name, None) for name in NAMES}
    for name, function in ours.items():
        if function is not None:
            found[name] = parties(function)
    for target, path in COLD:
        owner: Any = sys.modules.get(target)
        for part in path.split("."):
            owner = getattr(owner, "__dict__", {}).get(part)
        if owner is not None:
            found[path] = parties(owner)
    for module_name, module in list(sys.modules.items()):
        for name in NAMES:
            held = getattr(module, "__dict__", {}).get(name)
            if callable(held) and held is not ours[name] and module is not attention and not module_name.startswith("taylor_patch"):
                found[f"{name} in {module_name}"] = parties(held)
    return found


def strangers() -> list[str]:
    """A sentence for every chain that has a party besides ComfyUI and us, or lacks us."""
    return [f"{name}: {' over '.join(found)}" for name, found in chains().items() if {*found} != {"taylor_patch", "ComfyUI"}]


def report() -> None:
    """A log line for each of `strangers`, once in a process."""
    for sentence in strangers():
        if sentence not in _reported:
            _reported.add(sentence)
            log.info("taylor_patch: others patched this too: %s", sentence)
