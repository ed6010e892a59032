"""comfy.ldm.modules.attention: `optimized_attention` and `optimized_attention_masked` become one plain function.

A plain function, not a wrapt proxy: torch.compile silently skips a proxy, and deepcopy of model options fails on one.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from taylor_patch import grid
from taylor_patch.call import AttentionCall, Unsupported, from_comfyui, merge_heads
from taylor_patch.engine import engine
from taylor_patch.run import Evaluation, SamplingRun, current_evaluation, current_run

log = logging.getLogger("taylor_patch")

NAMES = ("optimized_attention", "optimized_attention_masked")
PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
KNOWN_KEYWORDS = frozenset({*PARAMETERS, "transformer_options", "scale", "enable_gqa", "low_precision_attention", "preferred_attention"})

_originals: dict[str, Callable[..., Any]] = {}
_module: ModuleType | None = None


def install(module: ModuleType) -> None:
    """Replace both names in `module` and in every module that imported them already. Raises AttributeError where they are missing."""
    global _module
    if _module is module and _originals:
        return
    originals = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
    if "optimized_attention" not in originals:
        raise AttributeError("comfy.ldm.modules.attention has no optimized_attention; this ComfyUI is not known to taylor_patch")
    made: dict[int, Callable[..., Any]] = {}
    for name, original in originals.items():
        replacement = made.setdefault(id(original), replace(original))
        _originals[name] = original
        _rebind(name, original, replacement)
        setattr(module, name, replacement)
    _module = module
    log.info("taylor_patch: on: %s. TAYLOR_PATCH=0 turns it off.", engine().describe())


def uninstall() -> None:
    """Put the original objects back, in every module that holds ours."""
    global _module
    if _module is not None:
        for name, original in _originals.items():
            _rebind(name, getattr(_module, name), original)
            setattr(_module, name, original)
    _originals.clear()
    _module = None


def patched() -> tuple[str, ...]:
    """Names in place now."""
    return tuple(name for name in _originals if hasattr(getattr(_module, name, None), "__taylor_patch_original__"))


def _rebind(name: str, old: object, new: object) -> None:
    """`from ... import name` made copies: where a module holds `old` under `name`, give it `new`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def replace(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands in for `original`; both take ComfyUI's attention arguments."""

    def optimized_attention(*args: Any, **kwargs: Any) -> Any:
        # Cheapest first. Nested calls and calls outside sampling (text encoders, VAE, upscalers) are not ours.
        if "_inside_attn_wrapper" in kwargs:
            return original(*args, **kwargs)
        options = kwargs.get("transformer_options")
        if options is None or "sigmas" not in options:
            return original(*args, **kwargs)
        if torch.compiler.is_compiling():
            return _outside_graph(original, args, kwargs)
        return dispatch(original, args, kwargs)

    functools.update_wrapper(optimized_attention, original, updated=())
    optimized_attention.__taylor_patch_original__ = original  # type: ignore[attr-defined]
    if hasattr(original, "container_function"):
        optimized_attention.container_function = original.container_function  # type: ignore[attr-defined]
    return optimized_attention


def dispatch(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer one sampling call by a backend, or by `original` with the very same objects."""
    run = current_run()
    if run is None:
        return original(*args, **kwargs)
    out = _answer(args, kwargs, run)
    return original(*args, **kwargs) if out is None else out


@torch.compiler.disable
def _outside_graph(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Decisions depend on step and block, so a traced graph must not hold them as constants: one graph break."""
    return dispatch(original, args, kwargs)


def _answer(args: tuple[Any, ...], kwargs: dict[str, Any], run: SamplingRun) -> Tensor | None:
    """The backend's result in the layout that was asked for, or None with the reason counted."""
    evaluation = current_evaluation()
    options = kwargs["transformer_options"]
    # Every call counts, so that the call counter stands for the block index where the model gives none.
    block = None if evaluation is None else evaluation.block_index(options)
    current = engine()
    router = current.router
    if router.off:
        run.exact("turned off in the configuration")
        return None
    if reason := _demands_exact(kwargs, options, evaluation):
        run.exact(reason)
        return None
    bound = {**dict(zip(PARAMETERS, args, strict=False)), **kwargs}
    containers = [bound[name] for name in ("q", "k", "v") if hasattr(bound.get(name), "peek")]
    try:
        tensors = [x.peek() if hasattr(x, "peek") else x for x in (bound["q"], bound["k"], bound["v"])]
        heads, skip = bound["heads"], bool(bound.get("skip_reshape"))
        tokens = tensors[0].shape[2 if skip else 1]
        if tokens < router.least_tokens:
            run.exact(f"fewer tokens than min_tokens = {router.least_tokens}")
            return None
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            run.exact("gradients are wanted")
            return None
        call = from_comfyui(tensors[0], tensors[1], tensors[2], heads, mask=bound.get("mask"), skip_reshape=skip, scale=bound.get("scale"),
                            enable_gqa=bool(bound.get("enable_gqa")))
        out = current.answer(_placed(call, evaluation, options, block, router.target_error), run)
    except Unsupported as reason:
        run.exact(str(reason))
        return None
    except Exception as error:
        if type(error).__name__ == "InterruptProcessingException":
            raise
        run.exact(f"error in taylor_patch ({type(error).__name__}: {error})")
        return None
    if out is None:
        return None
    for container in containers:
        container.take()
    return out if bound.get("skip_output_reshape") else merge_heads(out)


def _demands_exact(kwargs: dict[str, Any], options: dict[str, Any], evaluation: Evaluation | None) -> str | None:
    """Why the caller or the user wants this call answered by ComfyUI, or None."""
    if "optimized_attention_override" in options:
        return "a node's attention override"
    if kwargs.get("low_precision_attention") is False:
        return "the model asked for full precision"
    if getattr(kwargs.get("preferred_attention"), "function", None) is not None:
        return "the checkpoint's preferred attention"
    if not kwargs.keys() <= KNOWN_KEYWORDS:
        return f"unknown keyword {', '.join(sorted(kwargs.keys() - KNOWN_KEYWORDS))}"
    if getattr(sys.modules.get("comfy.model_management"), "in_training", False):
        return "training"
    return None if evaluation is None else evaluation.exact


def _placed(call: AttentionCall, evaluation: Evaluation | None, options: dict[str, Any], block: int | None,
            target_error: Callable[[AttentionCall], float]) -> AttentionCall:
    """`call` with its position in the run and its token grid."""
    if evaluation is None:
        placed = dataclasses.replace(call, grid_reason="token grid unknown: outside a model evaluation")
    else:
        found, why = None, "token grid unknown: cross-attention"
        if call.self_attention:
            found, why = grid.infer(call.q.shape[2], evaluation.latent_shape, evaluation.patches, evaluation.family,
                                    evaluation.has_reference, options)
        placed = dataclasses.replace(call, grid=found, grid_reason=why, step=evaluation.step, sigma=evaluation.sigma, block=block,
                                     model=evaluation.family)
    return dataclasses.replace(placed, target_error=target_error(placed))
