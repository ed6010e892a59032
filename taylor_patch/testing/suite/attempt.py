"""One question to a backend: its answer, or what is wrong with it in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend, Fallback, not_finite
from taylor_patch.call import AttentionCall
from taylor_patch.engine import check_form
from taylor_patch.testing.cases import exact, relative_error

RAISED = (Exception, SystemExit)
"""What a backend may raise in an error; KeyboardInterrupt is the user's."""
ROUNDING = {torch.float32: 0.0, torch.float16: 0.01, torch.bfloat16: 0.02}
"""What is added to max_error for inputs of a dtype."""


class Broken(Exception):
    """What is wrong with an answer; the text is the finding."""


def told(error: BaseException) -> str:
    """Name and text of an exception, in one line."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def memory_of(x: Tensor) -> Tensor:
    """All bytes of the memory that x is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def device_error(device: str) -> str | None:
    """The error that the work on `device` has ended in, waiting for it; None where all is well.

    After an error such as a misaligned address every later call to CUDA in the process fails, with the same words.
    """
    if device == "cpu":
        return None
    try:
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        return told(error)
    return None


def reasons_of(method: Callable[..., Any], *args: Any) -> tuple[str, ...]:
    """What `unavailable` or `reasons_against` says. Raises Broken where it raises, or returns anything but a tuple of texts."""
    name = method.__name__
    try:
        reasons = method(*args)
    except RAISED as error:
        raise Broken(f"{name} raised {told(error)}") from None
    if not isinstance(reasons, tuple) or not all(isinstance(reason, str) and reason for reason in reasons):
        raise Broken(f"{name} returned {reasons!r}, not a tuple of texts")
    return reasons


def attempt(backend: Backend, call: AttentionCall, device: str) -> Tensor:
    """The result of an accepted call. Raises Broken for a wrong form, an exception, or an input that has changed; Fallback passes.

    Values that are not finite pass too.
    """
    tensors = {name: getattr(call, name) for name in ("q", "k", "v", "key_mask", "row_mask")}
    before = {name: memory_of(x).clone() for name, x in tensors.items() if x is not None}
    try:
        out = backend.run(call)
        if error := device_error(device):
            raise RuntimeError(error)
    except Fallback:
        raise
    except RAISED as error:
        raise Broken(f"accepted the call and then raised {told(error)}") from None
    if written := [name for name, nbytes in before.items() if not torch.equal(memory_of(tensors[name]), nbytes)]:
        raise Broken(f"writes into {', '.join(written)}")
    if problem := check_form(out, call):
        raise Broken(problem)
    if out.requires_grad:
        raise Broken("returned a tensor that requires grad, though no input does")
    return out


def finite(backend: Backend, call: AttentionCall, device: str) -> Tensor:
    """As attempt, but Fallback and values that are not finite are Broken too."""
    try:
        out = attempt(backend, call, device)
    except Fallback as reason:
        raise Broken(f"accepted the call and then fell back ({reason})") from None
    if not bool(torch.isfinite(out).all()):
        raise Broken("returned values that are not finite")
    if bool(not_finite(out)):
        raise Broken("notes values that are not finite (note_not_finite), and there are none")
    return out


def error_against_exact(out: Tensor, call: AttentionCall, max_error: float) -> float:
    """The relative error of a result. Raises Broken where it is above max_error and the dtype's rounding."""
    error, limit = relative_error(out, exact(call)), max_error + ROUNDING[call.q.dtype]
    if not error <= limit:
        raise Broken(f"relative error {error:.3g} against exact attention is above {limit:g}")
    return error
