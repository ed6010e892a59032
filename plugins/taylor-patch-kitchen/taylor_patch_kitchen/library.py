"""comfy-kitchen, or why it cannot be used."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch


@cache
def library() -> ModuleType | str:
    """The module comfy_kitchen, or the reason why it cannot be imported."""
    try:
        import comfy_kitchen
    except Exception as error:
        return (f"comfy-kitchen cannot be imported ({type(error).__name__}: {error}). "
                "Install it with ComfyUI's Python: pip install comfy-kitchen")
    return comfy_kitchen


def missing(function: str) -> tuple[str, ...]:
    """Why comfy_kitchen.`function` can run no call here; empty when it can."""
    found = library()
    if isinstance(found, str):
        return (found,)
    # 0.2.32 has a sol_attn without token_aug, which nothing says can run here.
    if not (hasattr(found, function) and hasattr(found, f"{function}_is_available")):
        return (f"this comfy-kitchen has no {function} that is known here; 0.2.33 has it: pip install --upgrade comfy-kitchen",)
    if not torch.cuda.is_available():
        return ("no CUDA GPU",)
    if not getattr(found, f"{function}_is_available")():
        return (f"comfy-kitchen has no {function} for this GPU",)
    return ()
