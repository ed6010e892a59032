"""comfy.model_base: BaseModel.apply_model is one model evaluation; step and sigma are read here, once."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from taylor_patch.engine import engine
from taylor_patch.errors import said
from taylor_patch.families import REFERENCES
from taylor_patch.hooks.cold import ColdPatch
from taylor_patch.run import Evaluation, SamplingRun, current_run, describe, evaluation, with_exact
from taylor_patch.telemetry import Reading, StepRecord, read

log = logging.getLogger("taylor_patch")

REPEATS = 2
"""How often an evaluation is computed again without the blocks that were too far off, before all of it is exact."""

_patch = ColdPatch("BaseModel.apply_model", ("self", "x", "t"))


def install(module: ModuleType) -> None:
    """Wrap BaseModel.apply_model."""
    _patch.install(module, apply_model)


def uninstall() -> None:
    """Put the original method back."""
    _patch.uninstall()


def apply_model(wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`wrapped`(x, t, ...) as one evaluation of the run in progress; once more where a backend's result may not be used."""
    run = current_run()
    if run is None:
        return wrapped(*args, **kwargs)
    # The picture must not suffer: the same evaluation once more, from the same inputs, without the blocks that were too far off ...
    for _ in range(1 + REPEATS):
        out, found = _evaluate(_describe(run, instance, args, kwargs), wrapped, args, kwargs)
        if found.failed or not found.too_far:
            break
    if not found.failed and not found.too_far:
        return out
    # ... and wholly exact where a check failed, or where other blocks are too far off each time.
    reason = "; ".join(sorted({f"{check.backend}: {check.problem}" for check in found.failed})) or "error above quality_limit in other blocks"
    log.warning("taylor_patch: %s; this step is computed again by exact attention%s.", reason,
                ", which takes its place for such calls in this run" if found.failed else "")
    again = _describe(run, instance, args, kwargs)
    again.exact = reason
    return _evaluate(again, wrapped, args, kwargs)[0]


def _evaluate(current: Evaluation, wrapped: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Reading]:
    """(the model's result, what was read of it: to be used only where no check failed and no block was too far off).

    Such backends and blocks are exact from then on.
    """
    run, started = current.run, time.monotonic()
    with evaluation(current):
        out = wrapped(*args, **kwargs)
    run.catch_up()
    try:
        found = read(current.answers, current.checks)  # the one read from the device, which has to finish the evaluation for it
    except Exception as error:
        log.warning("taylor_patch: the step's figures cannot be read (%s)", said(error))
        return out, Reading()
    finally:  # the record that is still to be made must keep nothing on the device
        current.answers.clear()
        current.checks.clear()
    seconds = time.monotonic() - started
    run.broken.update((check.backend, check.signature) for check in found.failed)
    repeated = bool(found.failed or found.too_far)
    if found.timed and not repeated:
        run.sampled.add(current.kind)
    if found.too_far and not run.too_far:
        (name, _, block), worst = next(iter(found.too_far.items()))
        log.warning("taylor_patch: %s: error %.3g in block %s and %d more is above quality_limit times the error asked for; the step is "
                    "computed again, and such blocks are exact from here on in this run.", name, worst, block, len(found.too_far) - 1)
    run.too_far.update(found.too_far)
    try:
        engine().judge(run, found)
    except Exception as error:
        log.warning("taylor_patch: the backends could not be told of the step (%s)", said(error))
    run.unrecorded.append(partial(_record, current, found, seconds, repeated))
    return out, found


def _record(current: Evaluation, found: Reading, seconds: float, repeated: bool) -> None:
    """Keep, log and write what the evaluation did."""
    tally = current.tally
    try:
        engine().record(current.run, StepRecord(current.family, current.step, current.sigma, seconds, with_exact(tally.calls, tally.fallbacks),
                                                dict(tally.fallbacks), current.max_head_dim, tuple(block() for block in found.timed), repeated))
    except Exception as error:
        log.warning("taylor_patch: the step's record failed (%s)", said(error))


def _describe(run: SamplingRun, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Evaluation:
    """What the call of apply_model(x, t, ...) is; one that cannot be read is exact, with the reason."""
    try:
        x = kwargs.get("x", args[0] if args else None)
        t = kwargs.get("t", args[1] if len(args) > 1 else None)
        packed = kwargs.get("latent_shapes")  # pictures and sound in one tensor; the picture comes first
        shape = packed[0] if packed else getattr(x, "shape", None)
        current = describe(run, model, shape, _first(t), any(kwargs.get(name) is not None and len(kwargs[name]) for name in REFERENCES))
        prompts = (kwargs.get("transformer_options") or {}).get("cond_or_uncond")
        current.prompts = None if prompts is None else tuple(prompts)
        if getattr(sys.modules.get("comfy.model_management"), "in_training", False):
            current.exact = "training"
        else:
            current.exact = _outside_range(run, model, current.sigma)
        return current
    except Exception as error:
        return Evaluation(run, None, None, None, None, (), exact=f"model evaluation not understood ({type(error).__name__}: {error})")


def _first(t: Any) -> float | None:
    """sigma of the evaluation; all of a batch share it. One read from the device for each evaluation."""
    try:
        return float(t.flatten()[0])
    except (AttributeError, IndexError, TypeError, ValueError, RuntimeError):
        return None


def _outside_range(run: SamplingRun, model: Any, sigma: float | None) -> str | None:
    """Why the evaluation lies outside start_percent to end_percent of the schedule, or None."""
    settings = engine().config.settings
    if sigma is None:
        return None
    if settings.start_percent > 0 and sigma > _sigma_at(run, model, settings.start_percent):
        return "before start_percent"
    if settings.end_percent < 1 and sigma < _sigma_at(run, model, settings.end_percent):
        return "after end_percent"
    return None


def _sigma_at(run: SamplingRun, model: Any, percent: float) -> float:
    """sigma at this part of the schedule; without the model's own scale the position among the steps stands in for it."""
    if percent not in run.sigmas:
        try:
            run.sigmas[percent] = float(model.model_sampling.percent_to_sigma(percent))
        except Exception:
            steps = run.schedule or (0.0,)
            run.sigmas[percent] = steps[min(int(percent * (len(steps) - 1)), len(steps) - 1)]
    return run.sigmas[percent]
