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
from torch.compiler import is_compiling

from taylor_patch import grid
from taylor_patch.call import AttentionCall, Unsupported, from_comfyui, merge_heads
from taylor_patch.engine import Engine, engine
from taylor_patch.run import Evaluation, SamplingRun, current_evaluation, current_run

log = logging.getLogger("taylor_patch")

NAMES = ("optimized_attention", "optimized_attention_masked")
PARAMETERS = ("q", "k", "v", "heads", "mask", "attn_precision", "skip_reshape", "skip_output_reshape")
ARGUMENTS = frozenset({*PARAMETERS, "transformer_options", "scale", "enable_gqa"})
WISHES = frozenset({"low_precision_attention", "preferred_attention"})

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
        out = _answer_outside_graph(args, kwargs) if is_compiling() else answer(args, kwargs)
        return original(*args, **kwargs) if out is None else out

    functools.update_wrapper(optimized_attention, original, updated=())
    optimized_attention.__taylor_patch_original__ = original  # type: ignore[attr-defined]
    if hasattr(original, "container_function"):
        optimized_attention.container_function = original.container_function  # type: ignore[attr-defined]
    return optimized_attention


@torch.compiler.disable
def _answer_outside_graph(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """Decisions depend on step and block, so a traced graph must not hold them as constants: one graph break."""
    return answer(args, kwargs)


def answer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A backend's result for a sampling call, in the layout that was asked for; None, with the reason counted, where the original
    function has to answer."""
    evaluation = current_evaluation()
    run = current_run() if evaluation is None else evaluation.run
    if run is None:
        return None
    if evaluation is not None:
        evaluation.calls += 1
    current = engine()
    router = current.router
    if router.off:
        run.exact(router.off)
        return None
    try:
        q = args[0] if args else kwargs["q"]
        if type(q) is not Tensor and hasattr(q, "peek"):
            q = q.peek()
        shape, skip = q.shape, args[6] if len(args) > 6 else kwargs.get("skip_reshape", False)
        least, too_few = router.least_tokens(q.device)
        if shape[2 if skip else 1] < least:
            run.exact(too_few)
            return None
        if reason := _demands_exact(kwargs, evaluation):
            run.exact(reason)
            return None
        key = None
        # A choice for exact attention holds for the rest of the run, unless rules look at step and block.
        if len(args) > 2 and type(args[1]) is Tensor and not router.has_rules:
            mask, image = args[4] if len(args) > 4 else kwargs.get("mask"), kwargs["transformer_options"].get("img_slice")
            key = (shape, args[1].numel(), None if mask is None else mask.shape, None if image is None else tuple(image),
                   None if evaluation is None else evaluation.latent_shape)
            if (known := run.known_exact.get(key)) is not None:
                run.exact(known)
                return None
        return _handle(current, run, evaluation, key, *args, **kwargs)
    except Unsupported as error:
        run.exact(str(error))
    except Exception as error:
        if type(error).__name__ == "InterruptProcessingException":
            raise
        run.exact(f"error in taylor_patch ({type(error).__name__}: {error})")
    return None


def _demands_exact(kwargs: dict[str, Any], evaluation: Evaluation | None) -> str | None:
    """Why the caller or the user wants this call answered by ComfyUI, or None."""
    if "optimized_attention_override" in kwargs["transformer_options"]:
        return "a node's attention override"
    if not ARGUMENTS.issuperset(kwargs):
        if kwargs.get("low_precision_attention") is False:
            return "the model asked for full precision"
        if getattr(kwargs.get("preferred_attention"), "function", None) is not None:
            return "the checkpoint's preferred attention"
        if unknown := kwargs.keys() - ARGUMENTS - WISHES:
            return f"unknown keyword {', '.join(sorted(unknown))}"
    return None if evaluation is None else evaluation.exact


def _handle(current: Engine, run: SamplingRun, evaluation: Evaluation | None, key: Any, q: Any, k: Any, v: Any,
            heads: int, mask: Tensor | None = None, attn_precision: Any = None, skip_reshape: bool = False,
            skip_output_reshape: bool = False, *, transformer_options: dict[str, Any], scale: float | None = None,
            enable_gqa: bool = False, **_: Any) -> Tensor | None:
    """Choose and run a backend; from q on the arguments are ComfyUI's. key: what the run remembers a choice for exact attention by."""
    containers = [x for x in (q, k, v) if type(x) is not Tensor and hasattr(x, "peek")]
    if containers:
        q, k, v = (x.peek() if hasattr(x, "peek") else x for x in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        run.exact("gradients are wanted")
        return None
    call = from_comfyui(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, scale=scale, enable_gqa=enable_gqa)
    call = _placed(call, evaluation, transformer_options, current.router.target_error)
    choice = current.choose(call, run)
    if choice.backend is None:
        reason = "; ".join(choice.reasons)
        if key is not None:
            run.known_exact[key] = reason
        run.exact(reason)
        return None
    out = current.attempt(choice.backend, call, run, evaluation)
    if out is None:
        return None
    for container in containers:
        container.take()
    return out if skip_output_reshape else merge_heads(out)


def _placed(call: AttentionCall, evaluation: Evaluation | None, options: dict[str, Any],
            target_error: Callable[[AttentionCall], float]) -> AttentionCall:
    """`call` with its position in the run and its token grid."""
    if evaluation is None:
        placed = dataclasses.replace(call, grid_reason="outside a model evaluation")
    else:
        found, why = None, "cross-attention"
        if call.self_attention:
            found, why = grid.infer(call.q.shape[2], evaluation.latent_shape, evaluation.patches, evaluation.layout,
                                    evaluation.has_reference, options)
        placed = dataclasses.replace(call, grid=found, grid_reason=why, step=evaluation.step, sigma=evaluation.sigma,
                                     block=evaluation.block_index(options), model=evaluation.family)
    return dataclasses.replace(placed, target_error=target_error(placed))
