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
from taylor_patch.errors import said
from taylor_patch.hooks.contract import INSIDE, PARAMETERS, SLOT, check_attention
from taylor_patch.run import DeviceState, Evaluation, SamplingRun, Tally, current_evaluation, current_run

log = logging.getLogger("taylor_patch")

NAMES = ("optimized_attention", "optimized_attention_masked")
ARGUMENTS = frozenset({*PARAMETERS, "transformer_options", "scale", "enable_gqa", INSIDE})
WISHES = frozenset({"low_precision_attention", "preferred_attention"})
OVERRIDE = "a node's attention override"
PREFERRED = "the checkpoint's preferred attention"

OURS = "__taylor_patch_override__"
"""Marks our function in SLOT (override.py)."""
PREVIOUS = "taylor_patch_previous_override"
"""Key of transformer_options: the override that ours was put on top of."""

_originals: dict[str, Callable[..., Any]] = {}
_ours: dict[str, Callable[..., Any]] = {}
_module: ModuleType | None = None
_spec: object = None
"""The module's __spec__ when it was patched; importlib.reload makes a new one."""


def install(module: ModuleType) -> None:
    """Replace both names in `module` and in every module that imported them already; anew where the module has been reloaded or its
    functions were put back. Raises UnknownContract where they are missing or take other arguments than those known here."""
    global _module, _spec
    if _module is module and _spec is module.__spec__ and not any(getattr(module, name, None) is old for name, old in _originals.items()):
        return
    check_attention(module)
    imported = dict(_originals)
    uninstall()
    originals = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
    made: dict[int, Callable[..., Any]] = {}
    for name, original in originals.items():
        replacement = made.setdefault(id(original), replace(original))
        _originals[name], _ours[name] = original, replacement
        for old in (original, imported.get(name, original)):  # modules keep what they imported before a reload
            _rebind(name, old, replacement)
        setattr(module, name, replacement)
    _module, _spec = module, module.__spec__
    from taylor_patch.hooks import registry  # which answers by the functions below

    registry.install(module, originals["optimized_attention"])
    current = engine()
    if current.problem is None:  # which is in the log already
        form = "taylor_patch: on: %s. TAYLOR_PATCH=0 turns it off." if current.config.settings.enabled else "taylor_patch: %s."
        log.info(form, current.describe())


def uninstall() -> None:
    """Put the original objects back wherever a module holds ours, under whatever name. Another's wrapper around ours stays, and ours
    beneath it only calls the original from then on."""
    global _module, _spec
    if _module is not None:
        for name, ours in _ours.items():
            for holder in [_module, *sys.modules.values()]:
                for key in [key for key, held in list(getattr(holder, "__dict__", {}).items()) if held is ours]:
                    setattr(holder, key, _originals[name])
            ours.__taylor_patch_remove__()  # type: ignore[attr-defined]
        from taylor_patch.hooks import registry

        registry.uninstall()
    _originals.clear()
    _ours.clear()
    _module = _spec = None


def patched() -> tuple[str, ...]:
    """Names in place now."""
    return tuple(name for name in _originals if hasattr(getattr(_module, name, None), "__taylor_patch_original__"))


def original_function() -> Callable[..., Any]:
    """ComfyUI's optimized_attention as it was."""
    return _originals.get("optimized_attention") or sys.modules["comfy.ldm.modules.attention"].optimized_attention  # type: ignore[no-any-return]


def _rebind(name: str, old: object, new: object) -> None:
    """`from ... import name` made copies: where a module holds `old` under `name`, give it `new`."""
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get(name) is old:
            setattr(module, name, new)


def replace(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that stands in for `original`; both take ComfyUI's attention arguments. Its __taylor_patch_remove__() makes it call
    the original and do nothing else."""
    removed = False

    def remove() -> None:
        nonlocal removed
        removed = True

    def optimized_attention(*args: Any, **kwargs: Any) -> Any:
        # Cheapest first. Nested calls and calls outside sampling (text encoders, VAE, upscalers) are not ours.
        if removed or INSIDE in kwargs:
            return original(*args, **kwargs)
        options = kwargs.get("transformer_options")
        if options is None or "sigmas" not in options:
            return original(*args, **kwargs)
        out = _answer_outside_graph(args, kwargs, original) if is_compiling() else answer(args, kwargs, original)
        return original(*args, **kwargs) if out is None else out

    functools.update_wrapper(optimized_attention, original, updated=())
    optimized_attention.__taylor_patch_original__ = original  # type: ignore[attr-defined]
    optimized_attention.__taylor_patch_remove__ = remove  # type: ignore[attr-defined]
    if hasattr(original, "container_function"):
        optimized_attention.container_function = original.container_function  # type: ignore[attr-defined]
    return optimized_attention


@torch.compiler.disable
def _answer_outside_graph(args: tuple[Any, ...], kwargs: dict[str, Any], original: Callable[..., Any]) -> Tensor | None:
    """Decisions depend on step and block, so a traced graph must not hold them as constants: one graph break. By our override it
    would be more, so the call does not go there."""
    options = kwargs["transformer_options"]
    if hasattr(options.get(SLOT), OURS):
        kwargs["transformer_options"] = without_ours(options)
    return answer(args, kwargs, original)


def answer(args: tuple[Any, ...], kwargs: dict[str, Any], original: Callable[..., Any] | None = None, override: bool | None = None,
           backend: str | None = None) -> Tensor | None:
    """A backend's result for a sampling call, in the layout that was asked for; None, with the reason counted, where the original
    function has to answer, with `kwargs` as they then are.

    override: a node's override would answer the call; None: look whether there is one. backend: the one to take, whatever the router says.
    original: ComfyUI's function, to be timed where its time is wanted.
    """
    evaluation = current_evaluation()
    run = current_run() if evaluation is None else evaluation.run
    if run is None:
        return None
    tally, options = run.tally if evaluation is None else evaluation.tally, kwargs["transformer_options"]
    if override is None and SLOT in options:
        return _beside_override(evaluation, tally, args, kwargs)
    if evaluation is not None:
        evaluation.calls += 1
    current = engine()
    router = current.router
    if router.off and (backend is None or not router.config.settings.enabled):
        tally.exact(router.off)
        return None
    try:
        q = args[0] if args else kwargs["q"]
        if type(q) is not Tensor and hasattr(q, "peek"):
            q = q.peek()
        shape, device, skip = q.shape, q.device, args[6] if len(args) > 6 else kwargs.get("skip_reshape", False)
        here = run.devices.get(device)
        if here is None:
            here = run.devices[device] = DeviceState(*router.least_tokens(device))
        if shape[2 if skip else 1] < here.least and backend is None:
            tally.exact(here.too_few)
            return None
        respected, reason = OVERRIDE if override else None, None if evaluation is None else evaluation.exact
        if not ARGUMENTS.issuperset(kwargs):
            respected = respected or (PREFERRED if prefers(kwargs) else None)
            reason = _demands_exact(kwargs) or reason
        if respected and not router.may_overrule:
            reason = respected
        if reason:
            tally.exact(reason)
            return None
        key = None
        # A choice for exact attention holds for the rest of the run, unless rules look at step and block.
        if len(args) > 2 and type(args[1]) is Tensor and not router.has_rules and backend is None:
            # What AttentionCall.signature and the scale follow from; each device has a `known_exact` of its own.
            mask, image = args[4] if len(args) > 4 else kwargs.get("mask"), options.get("img_slice")
            key = (shape, args[1].shape, q.dtype, args[3] if len(args) > 3 else kwargs["heads"], skip, kwargs.get("scale"),
                   None if mask is None else mask.shape, None if image is None else tuple(image), options.get("block"),
                   None if evaluation is None else (evaluation.latent_shape, evaluation.has_reference))
            if (known := here.known_exact.get(key)) is not None:
                tally.exact(known)
                return None
        return _handle(current, run, evaluation, tally, here, backend, respected, key, original, *args, **kwargs)
    except Unsupported as error:
        tally.exact(str(error))
    except Exception as error:
        if type(error).__name__ == "InterruptProcessingException":
            raise
        tally.exact(f"error in taylor_patch ({said(error)})")
    return None


def _beside_override(evaluation: Evaluation | None, tally: Tally, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """`answer` where transformer_options has an override, which may be ours."""
    options = kwargs["transformer_options"]
    if hasattr(options[SLOT], OURS):
        if not prefers(kwargs):
            tally.handed_on = None
            return None  # the call comes back through our override
        # ComfyUI lets an override win over the checkpoint's attention. Ours must not.
        kwargs["transformer_options"] = options = without_ours(options)
    elif not engine().router.may_overrule:
        if evaluation is not None:
            evaluation.calls += 1
        tally.exact(OVERRIDE)
        tally.handed_on = OVERRIDE
        return None
    return _counted_once(tally, args, kwargs, SLOT in options, None)


def _counted_once(tally: Tally, args: tuple[Any, ...], kwargs: dict[str, Any], override: bool, backend: str | None) -> Tensor | None:
    """`answer`; where a node's override gets the call next, with a note of what it was counted as, should it come back."""
    tally.handed_on, tally.noting = None, override
    out = answer(args, kwargs, None, override, backend)
    tally.noting = False
    return out


def answer_inside(args: tuple[Any, ...], kwargs: dict[str, Any], override: bool, backend: str | None = None) -> Tensor | None:
    """`answer` for a call that ComfyUI has dispatched already: to our override, or to a backend that a node chose in its registry.

    It may have been counted as a node's on its way here, and is counted once.
    """
    evaluation = current_evaluation()
    run = current_run() if evaluation is None else evaluation.run
    if run is None:
        return None
    tally = run.tally if evaluation is None else evaluation.tally
    if tally.handed_on is not None:
        tally.take_back()
        if evaluation is not None:
            evaluation.calls -= 1
    return _counted_once(tally, args, kwargs, override, backend)


def without_ours(options: dict[str, Any]) -> dict[str, Any]:
    """Copy of transformer_options as it was before our override was put in: with the earlier override, if there was one."""
    options = dict(options)
    previous = options.pop(PREVIOUS, None)
    if previous is None:
        del options[SLOT]
    else:
        options[SLOT] = previous
    return options


def prefers(kwargs: dict[str, Any]) -> bool:
    """Whether the checkpoint brings an attention function. Newer versions of ComfyUI always pass the keyword, mostly without one."""
    return getattr(kwargs.get("preferred_attention"), "function", None) is not None


def _demands_exact(kwargs: dict[str, Any]) -> str | None:
    """Why a call with keywords that are not plain arguments has to be exact whatever the rules say, or None."""
    if kwargs.get("low_precision_attention") is False:
        return "the model asked for full precision"
    unknown = kwargs.keys() - ARGUMENTS - WISHES
    return f"unknown keyword {', '.join(sorted(unknown))}" if unknown else None


def _handle(current: Engine, run: SamplingRun, evaluation: Evaluation | None, tally: Tally, here: DeviceState, backend: str | None,
            respected: str | None, key: Any, original: Callable[..., Any] | None, q: Any, k: Any, v: Any, heads: int,
            mask: Tensor | None = None, attn_precision: Any = None, skip_reshape: bool = False, skip_output_reshape: bool = False, *,
            transformer_options: dict[str, Any], scale: float | None = None, enable_gqa: bool = False, **wishes: Any) -> Tensor | None:
    """Choose and run a backend; from q on the arguments are ComfyUI's.

    respected: whose wish holds unless a rule overrules it. key: what the choice for exact attention is remembered by.
    """
    containers = [x for x in (q, k, v) if type(x) is not Tensor and hasattr(x, "peek")]
    if containers:
        q, k, v = (x.peek() if hasattr(x, "peek") else x for x in (q, k, v))
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        tally.exact("gradients are wanted")
        return None
    call = from_comfyui(q, k, v, heads, mask=mask, skip_reshape=skip_reshape, scale=scale, enable_gqa=enable_gqa)
    call = _placed(call, evaluation, transformer_options, current.router.target_error)
    if respected is not None and not current.router.overrules(call):
        tally.exact(respected)
        return None
    choice = current.choose(call, run, backend)
    if choice.backend is None:
        reason = "; ".join(choice.reasons)
        if key is not None:
            here.known_exact[key] = reason
        tally.exact(reason)
        return None
    given = ({} if scale is None else {"scale": scale}) | ({"enable_gqa": True} if enable_gqa else {}) | wishes
    exact = None if original is None else functools.partial(
        original, q, k, v, heads, mask=mask, attn_precision=attn_precision, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape,
        transformer_options=transformer_options, **given)
    out = current.attempt(choice.backend, call, run, evaluation, exact)
    if out is None:
        return None
    for container in containers:
        container.take()
    return out if skip_output_reshape else merge_heads(out)


def _placed(call: AttentionCall, evaluation: Evaluation | None, options: dict[str, Any],
            target_error: Callable[[AttentionCall], float]) -> AttentionCall:
    """`call` with its position in the run and its token grids."""
    if evaluation is None:
        placed = dataclasses.replace(call, grid_reason="outside a model evaluation")
    else:
        known = (evaluation.latent_shape, evaluation.patches, evaluation.layout, evaluation.has_reference, options)
        found, why, of_keys = None, "cross-attention", None
        if call.self_attention:
            found, why = grid.infer(call.q.shape[2], *known)
        else:
            found, of_keys = (grid.infer_all(x.shape[2], *known) for x in (call.q, call.k))
        placed = dataclasses.replace(call, grid=found, grid_reason=why, key_grid=of_keys, step=evaluation.step, sigma=evaluation.sigma,
                                     block=evaluation.block_index(options), model=evaluation.family,
                                     fingerprint=evaluation.fingerprint, memo=evaluation.run.memo, cond_or_uncond=_prompts(options))
    return dataclasses.replace(placed, target_error=target_error(placed))


def _prompts(options: dict[str, Any]) -> tuple[int, ...]:
    """AttentionCall.cond_or_uncond of the model's transformer options; empty where they hold something else than numbers."""
    found = options.get("cond_or_uncond")
    return tuple(found) if isinstance(found, list | tuple) and all(isinstance(one, int) for one in found) else ()
