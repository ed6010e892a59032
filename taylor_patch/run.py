"""The sampling run in progress: step, sigma, model and counts. Every thread has its own position."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from taylor_patch.grid import patch_sizes


@dataclass(frozen=True)
class RunSummary:
    """What a finished run did; handed to plugins and kept for status()."""

    model: str | None
    steps: int
    evaluations: int
    calls: Mapping[str, int]
    """Backend name ("exact" for ComfyUI's own) -> attention calls."""
    fallbacks: Mapping[str, int]
    """Reason -> calls answered by exact attention for it."""
    seconds: float
    outcome: str
    """"finished", or the name of the exception that ended the run."""

    def line(self) -> str:
        """One line for the log."""
        calls = ", ".join(f"{name} {count}" for name, count in sorted(self.calls.items())) or "none"
        reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(self.fallbacks.items(), key=lambda kv: -kv[1]))
        return (f"{self.model or 'model'}: {self.evaluations} model evaluations in {self.seconds:.1f} s, attention calls: {calls}"
                + (f" (exact because: {reasons})" if reasons else "") + ("" if self.outcome == "finished" else f", {self.outcome}"))


@dataclass
class Evaluation:
    """One call of the diffusion model."""

    run: SamplingRun
    latent_shape: tuple[int, ...] | None
    sigma: float | None
    step: int | None
    family: str | None
    patches: tuple[tuple[int, int, int], ...]
    has_reference: bool = False
    double_blocks: int = 0
    exact: str | None = None
    """Why all of this evaluation is exact, or None."""
    calls: int = 0
    """Attention calls so far; the hook counts every one, so that the number can stand for the block index."""

    def block_index(self, options: Mapping[str, Any]) -> int:
        """Index of the running call's transformer block over the whole model; the number of the call where the model does not say."""
        index = options.get("block_index")
        if index is None or "block" in options:  # UNets count within a block
            return self.calls - 1
        return int(index) + (self.double_blocks if options.get("block_type") == "single" else 0)


@dataclass
class SamplingRun:
    """State from the start of a sampling run to its end."""

    schedule: tuple[float, ...] = ()
    model: str | None = None
    started: float = field(default_factory=time.monotonic)
    evaluations: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    broken: set[tuple[Any, ...]] = field(default_factory=set)
    """(backend, signature) pairs that failed in this run."""
    known_exact: dict[Any, str] = field(default_factory=dict)
    """Shapes and arguments of calls that the router left to exact attention -> why."""
    start_sigma: float | None = None

    def step_of(self, sigma: float) -> int | None:
        """Index of `sigma` in the schedule; of the step it lies in for samplers that evaluate between sigmas."""
        found = None
        for index, bound in enumerate(self.schedule[:-1]):
            if sigma <= bound * (1 + 1e-4):
                found = index
        return found

    def exact(self, reason: str) -> None:
        """Count a call that exact attention answers."""
        self.fallbacks[reason] += 1

    def summary(self, outcome: str) -> RunSummary:
        """Frozen copy of the counts."""
        exact = {"exact": sum(self.fallbacks.values())} if self.fallbacks else {}
        return RunSummary(self.model, max(len(self.schedule) - 1, 0), self.evaluations, {**exact, **self.calls}, dict(self.fallbacks),
                          time.monotonic() - self.started, outcome)


class _Position(threading.local):
    def __init__(self) -> None:
        self.runs: list[SamplingRun] = []
        self.evaluations: list[Evaluation] = []


_position = _Position()
_open: list[SamplingRun] = []
_lock = threading.Lock()


@contextmanager
def sampling_run(schedule: Sequence[float]) -> Iterator[SamplingRun]:
    """Open a run for this thread; runs may nest (a node that samples inside a callback)."""
    run = SamplingRun(tuple(schedule))
    _position.runs.append(run)
    with _lock:
        _open.append(run)
    try:
        yield run
    finally:
        _position.runs.remove(run)
        with _lock:
            _open.remove(run)


def current_run() -> SamplingRun | None:
    """This thread's run; in a worker thread (one a device) the run that was opened last."""
    runs = _position.runs or _open
    return runs[-1] if runs else None


def family_of(model: Any) -> str:
    """Class name of ComfyUI's BaseModel subclass; that of its configuration (SD15) for families without a class of their own."""
    name = type(model).__name__
    return type(model.model_config).__name__ if name == "BaseModel" and hasattr(model, "model_config") else name


@contextmanager
def evaluation(run: SamplingRun, model: Any, latent_shape: Sequence[int] | None, sigma: float | None,
               has_reference: bool = False) -> Iterator[Evaluation]:
    """Enter one call of the diffusion model. model: ComfyUI's BaseModel or anything with a `diffusion_model`."""
    diffusion_model = getattr(model, "diffusion_model", None)
    family = family_of(model)
    run.model = family
    run.evaluations += 1
    current = Evaluation(run, None if latent_shape is None else tuple(latent_shape), sigma, None if sigma is None else run.step_of(sigma),
                         family, patch_sizes(diffusion_model), has_reference, len(getattr(diffusion_model, "double_blocks", ())))
    _position.evaluations.append(current)
    try:
        yield current
    finally:
        _position.evaluations.pop()


def current_evaluation() -> Evaluation | None:
    """The model call that this thread is in."""
    return _position.evaluations[-1] if _position.evaluations else None
