"""comfy.samplers: CFGGuider.outer_sample opens and closes a SamplingRun."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.engine import engine
from taylor_patch.hooks.cold import ColdPatch

_patch = ColdPatch("CFGGuider.outer_sample")


def install(module: ModuleType) -> None:
    """Wrap CFGGuider.outer_sample; called once a run, so a wrapt wrapper costs nothing that matters."""
    _patch.install(module, _outer_sample)


def uninstall() -> None:
    """Put the original method back."""
    _patch.uninstall()


def _outer_sample(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with engine().run(_schedule(args, kwargs)):
        return wrapped(*args, **kwargs)


def _schedule(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[float]:
    """The sigmas of outer_sample(noise, latent_image, sampler, sigmas, ...) as floats, [] where they are not there."""
    sigmas = kwargs.get("sigmas", args[3] if len(args) > 3 else None)
    try:
        return [float(sigma) for sigma in sigmas.tolist()]  # type: ignore[union-attr]
    except (AttributeError, TypeError, ValueError):
        return []

