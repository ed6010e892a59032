"""comfy.model_base: BaseModel.apply_model is one model evaluation; step and sigma are read here, once."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from taylor_patch.engine import NOT_FINITE, engine, not_finite
from taylor_patch.hooks.cold import ColdPatch
from taylor_patch.run import Evaluation, SamplingRun, counted, current_run, describe, evaluation, with_exact

log = logging.getLogger("taylor_patch")

_patch = ColdPatch("BaseModel.apply_model")


def install(module: ModuleType) -> None:
    """Wrap BaseModel.apply_model."""
    _patch.install(module, apply_model)


def uninstall() -> None:
    """Put the original method back."""
    _patch.uninstall()


def apply_model(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`wrapped`(x, t, ...) as one evaluation of the run in progress; once more, exactly, where a backend's values were not finite."""
    run = current_run()
    if run is None:
        return wrapped(*args, **kwargs)
    first = _describe(run, instance, args, kwargs)
    out = _evaluate(first, wrapped, args, kwargs)
    bad = not_finite(first)
    if not bad:
        return out
    # The picture must not suffer: the same evaluation once more, from the same inputs, exact.
    reason = f"{', '.join(bad)}: {NOT_FINITE}"
    log.warning("taylor_patch: %s; this step is computed again by exact attention, which takes its place for such calls in this run.", reason)
    again = _describe(run, instance, args, kwargs)
    again.exact = reason
    return _evaluate(again, wrapped, args, kwargs)


def _evaluate(current: Evaluation, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the model, and log the evaluation's line where the configuration wants it."""
    run = current.run
    with evaluation(current):
        before = run.calls.copy(), run.fallbacks.copy()
        try:
            return wrapped(*args, **kwargs)
        finally:
            if engine().config.settings.log in ("step", "call"):
                calls, fallbacks = run.calls - before[0], run.fallbacks - before[1]
                log.info("taylor_patch: %s: step %s, sigma %.4g: %s", current.family, current.step,
                         float("nan") if current.sigma is None else current.sigma, counted(with_exact(calls, fallbacks), fallbacks))


def _describe(run: SamplingRun, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
    """What the call of apply_model(x, t, ...) is; one that cannot be read is exact, with the reason."""
    try:
        x = kwargs.get("x", args[0] if args else None)
        t = kwargs.get("t", args[1] if len(args) > 1 else None)
        current = describe(run, model, getattr(x, "shape", None), _first(t), bool(kwargs.get("ref_latents")))
        if getattr(sys.modules.get("comfy.model_management"), "in_training", False):
            current.exact = "training"
        elif _before_start(run, model, current.sigma):
            current.exact = "before start_percent"
        return current
    except Exception as error:
        return Evaluation(run, None, None, None, None, (), exact=f"model evaluation not understood ({type(error).__name__}: {error})")


def _first(t: Any) -> float | None:
    """sigma of the evaluation; all of a batch share it. One read from the device for each evaluation."""
    try:
        return float(t.flatten()[0])
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def _before_start(run: SamplingRun, model: Any, sigma: float | None) -> bool:
    """True while the schedule has not reached start_percent."""
    percent = engine().config.settings.start_percent
    if percent <= 0 or sigma is None:
        return False
    if run.start_sigma is None:
        try:
            run.start_sigma = float(model.model_sampling.percent_to_sigma(percent))
        except Exception:
            # Without the model's own scale the position in the schedule stands in for it.
            steps = run.schedule or (sigma,)
            run.start_sigma = steps[min(int(percent * (len(steps) - 1)), len(steps) - 1)]
    return sigma > run.start_sigma
