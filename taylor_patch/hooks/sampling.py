"""comfy.samplers: CFGGuider.outer_sample opens and closes a SamplingRun."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.engine import engine
from taylor_patch.hooks import chain
from taylor_patch.hooks.cold import ColdPatch
from taylor_patch.hooks.memory import free_before_run
from taylor_patch.hooks.override import in_place
from taylor_patch.run import family_of

log = logging.getLogger("taylor_patch")

_patch = ColdPatch("CFGGuider.outer_sample", ("self", "noise", "latent_image", "sampler", "sigmas"))


def install(module: ModuleType) -> None:
    """Wrap CFGGuider.outer_sample; called once a run, so a wrapt wrapper costs nothing that matters."""
    _patch.install(module, _outer_sample)


def uninstall() -> None:
    """Put the original method back."""
    _patch.uninstall()


def _outer_sample(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        chain.report()
    except Exception as error:
        log.debug("taylor_patch: who else patched is not known (%s: %s)", type(error).__name__, error)
    shape = _latent_shape(args, kwargs)
    with engine().run(_schedule(args, kwargs)) as run, in_place(getattr(instance, "model_options", None), _family(instance)):
        free_before_run(getattr(instance, "model_patcher", None), shape or ())
        run.latent_shape = shape  # for estimate_memory, which ComfyUI calls next
        try:
            return wrapped(*args, **kwargs)
        finally:
            # What was asked for, by which the run's memory is remembered; evaluations take windows of it, or cond and uncond at once.
            run.latent_shape = shape


def _family(guider: Any) -> str:
    """Name of the model family, "" where there is none."""
    model = getattr(getattr(guider, "model_patcher", None), "model", None)
    return "" if model is None else family_of(model)


def _latent_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Of outer_sample(noise, ..., latent_shapes=...), None where it is not there. Picture and sound may be packed into one tensor; the
    picture comes first."""
    try:
        packed = kwargs.get("latent_shapes")
        return tuple(packed[0] if packed else kwargs.get("noise", args[0] if args else None).shape)  # type: ignore[union-attr]
    except (AttributeError, TypeError, LookupError):
        return None


def _schedule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """The sigmas of outer_sample(noise, latent_image, sampler, sigmas, ...) as floats, [] where they are not there."""
    sigmas = kwargs.get("sigmas", args[3] if len(args) > 3 else None)
    try:
        return [float(sigma) for sigma in sigmas.tolist()]  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        return []

