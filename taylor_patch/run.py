"""The sampling run in progress: step, sigma, model and counts. Every thread has its own position."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from taylor_patch.call import AttentionCall
from taylor_patch.families import Layout, layout
from taylor_patch.grid import patch_sizes
from taylor_patch.telemetry import Answer, StepRecord, quality_text

log = logging.getLogger("taylor_patch")


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
    milliseconds: Mapping[str, float] = field(default_factory=dict)
    """Backend name -> milliseconds in it."""
    quality: str = ""
    """Sampled error against exact attention, as text."""

    def line(self) -> str:
        """One line for the log."""
        spent = ", ".join(f"{name} {milliseconds / 1000:.1f} s" for name, milliseconds in sorted(self.milliseconds.items()))
        parts = (f"attention calls: {counted(self.calls, self.fallbacks)}", spent, self.quality,
                 "" if self.outcome == "finished" else self.outcome)
        return f"{self.model or 'model'}: {self.evaluations} model evaluations in {self.seconds:.1f} s, " + ", ".join(filter(None, parts))


def counted(calls: Mapping[str, int], fallbacks: Mapping[str, int]) -> str:
    """"near_far 57, exact 3 (exact because: cross-attention: 3)": calls by backend, and why the others were exact."""
    shown = [f"{name} {count}" for name, count in sorted(calls.items())]
    reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(fallbacks.items(), key=lambda item: -item[1]))
    return (", ".join(shown) or "none") + (f" (exact because: {reasons})" if reasons else "")


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
    layout: Layout = field(default_factory=Layout)
    exact: str | None = None
    """Why all of this evaluation is exact, or None."""
    calls: int = 0
    """Attention calls so far; the hook counts every one, so that the number can stand for the block index."""
    answers: list[Answer] = field(default_factory=list)
    """The calls that backends answered, what was measured of them still on the device."""
    max_head_dim: int = 0

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
    too_far: set[tuple[Any, ...]] = field(default_factory=set)
    """(backend, signature, block) whose sampled error exceeded the limit."""
    too_slow: dict[tuple[Any, ...], tuple[int, str]] = field(default_factory=dict)
    """(backend, signature, block) that exact attention serves better -> (evaluation in which that was seen, why)."""
    sampled: bool = False
    """Whether an evaluation of this run has been sampled."""
    known_exact: dict[Any, str] = field(default_factory=dict)
    """Shapes and arguments of calls that the router left to exact attention -> why."""
    sigmas: dict[float, float] = field(default_factory=dict)
    """Part of the schedule, 0 to 1 -> sigma there."""
    log_calls: bool = False
    """Log a line for every attention call."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """What tells this run's records from others'; made at random."""
    records: list[StepRecord] = field(default_factory=list)
    latent_shape: tuple[int, ...] | None = None
    workspaces: dict[tuple[str, Any], int] = field(default_factory=dict)
    """(backend, signature) -> the workspace in bytes that the backend stated."""

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
        if self.log_calls:
            log.info("taylor_patch: exact: %s", reason)

    def handled(self, backend: str, call: AttentionCall) -> None:
        """Count a call that a backend has answered."""
        self.calls[backend] += 1
        if self.log_calls:
            log.info("taylor_patch: %s: q %s %s, step %s, block %s", backend, list(call.q.shape),
                     str(call.q.dtype).removeprefix("torch."), call.step, call.block)

    def summary(self, outcome: str) -> RunSummary:
        """Frozen copy of the counts."""
        spent: Counter[str] = Counter()
        for record in self.records:
            spent.update(record.milliseconds)
        return RunSummary(self.model, max(len(self.schedule) - 1, 0), self.evaluations, with_exact(self.calls, self.fallbacks),
                          dict(self.fallbacks), time.monotonic() - self.started, outcome, dict(spent), quality_text(self.records))


def with_exact(calls: Mapping[str, int], fallbacks: Mapping[str, int]) -> dict[str, int]:
    """`calls` and, under "exact", the calls that exact attention answered."""
    return {**({"exact": sum(fallbacks.values())} if fallbacks else {}), **calls}


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


def describe(run: SamplingRun, model: Any, latent_shape: Sequence[int] | None, sigma: float | None, has_reference: bool = False) -> Evaluation:
    """The Evaluation of one call of the diffusion model. model: ComfyUI's BaseModel or anything with a `diffusion_model`."""
    diffusion_model, family = getattr(model, "diffusion_model", None), family_of(model)
    return Evaluation(run, None if latent_shape is None else tuple(latent_shape), sigma, None if sigma is None else run.step_of(sigma),
                      family, patch_sizes(diffusion_model), has_reference, len(getattr(diffusion_model, "double_blocks", ())),
                      layout=layout(family, diffusion_model))


@contextmanager
def evaluation(current: Evaluation) -> Iterator[Evaluation]:
    """Enter one call of the diffusion model."""
    current.run.model = current.family
    current.run.latent_shape = current.latent_shape
    current.run.evaluations += 1
    _position.evaluations.append(current)
    try:
        yield current
    finally:
        _position.evaluations.pop()


def current_evaluation() -> Evaluation | None:
    """The model call that this thread is in."""
    entered = _position.evaluations
    return entered[-1] if entered else None
