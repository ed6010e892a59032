"""The sampling run in progress: step, sigma, model and counts. Every thread has its own position."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

from taylor_patch.call import AttentionCall
from taylor_patch.families import Layout, layout
from taylor_patch.grid import patch_sizes
from taylor_patch.telemetry import Answer, Check, ExactTime, StepRecord, compared, comparison_text, quality_text, saved_text

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
    saved_seconds: float | None = None
    """Estimated time saved against exact attention; None where there is no measurement to go by."""
    speed_up: float | None = None
    """Estimated time of exact attention over that of the backends, for the same calls."""
    comparison: str = ""
    """How far the run was from exact attention, as text, where it was compared."""

    def line(self) -> str:
        """One line for the log."""
        spent = ", ".join(f"{name} {milliseconds / 1000:.1f} s" for name, milliseconds in sorted(self.milliseconds.items()))
        parts = (f"attention calls: {counted(self.calls, self.fallbacks)}", spent, saved_text(self.saved_seconds, self.speed_up), self.quality,
                 self.comparison,
                 "" if self.outcome == "finished" else self.outcome)
        return f"{self.model or 'model'}: {self.evaluations} model evaluations in {self.seconds:.1f} s, " + ", ".join(filter(None, parts))


@dataclass
class Totals:
    """Sums over runs, for status() and whoever watches a process."""

    runs: Counter[str] = field(default_factory=Counter)
    """Outcome -> runs."""
    evaluations: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    milliseconds: Counter[str] = field(default_factory=Counter)
    saved_seconds: float = 0.0

    REASONS: ClassVar[int] = 100
    """Reasons told apart; those beyond count as "other"."""

    def add(self, summary: RunSummary) -> None:
        """Count a run."""
        self.runs[summary.outcome] += 1
        self.evaluations += summary.evaluations
        self.calls.update(summary.calls)
        self.milliseconds.update(summary.milliseconds)
        self.saved_seconds += summary.saved_seconds or 0.0
        for reason, count in summary.fallbacks.items():
            self.fallbacks[reason if reason in self.fallbacks or len(self.fallbacks) < self.REASONS else "other"] += count

    def including(self, running: RunSummary | None) -> Totals:
        """A copy that counts the run in progress too."""
        made = Totals(Counter(self.runs), self.evaluations, Counter(self.calls), Counter(self.fallbacks), Counter(self.milliseconds),
                      self.saved_seconds)
        if running is not None:
            made.add(running)
        return made


def counted(calls: Mapping[str, int], fallbacks: Mapping[str, int]) -> str:
    """"near_far 57, exact 3 (exact because: cross-attention: 3)": calls by backend, and why the others were exact."""
    shown = [f"{name} {count}" for name, count in sorted(calls.items())]
    reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(fallbacks.items(), key=lambda item: -item[1]))
    return (", ".join(shown) or "none") + (f" (exact because: {reasons})" if reasons else "")


@dataclass
class Tally:
    """How many attention calls each backend answered, and how many were left to exact attention, by reason."""

    calls: Counter[str] = field(default_factory=Counter)
    fallbacks: Counter[str] = field(default_factory=Counter)
    log_calls: bool = False
    """Log a line for every attention call."""
    unchecked: int = 0
    """Calls that were to be sampled, for which memory was short."""
    handed_on: str | None = None
    """Reason of the last exact call where that went to a node's override, which may be, or ask, one of our backends."""
    noting: bool = False
    """Keep the reason of the next exact call in handed_on."""

    def exact(self, reason: str) -> None:
        """Count a call that exact attention answers."""
        self.fallbacks[reason] += 1
        if self.log_calls:
            log.info("taylor_patch: exact: %s", reason)
        if self.noting:
            self.handed_on = reason

    def handled(self, backend: str, call: AttentionCall) -> None:
        """Count a call that a backend has answered."""
        self.calls[backend] += 1
        if self.log_calls:
            log.info("taylor_patch: %s: q %s %s, step %s, block %s", backend, list(call.q.shape),
                     str(call.q.dtype).removeprefix("torch."), call.step, call.block)

    def take_back(self) -> None:
        """Forget the last exact call: it has come back and will be counted again."""
        reason, self.handed_on = self.handed_on, None
        if reason is not None:
            self.fallbacks[reason] -= 1
            if not self.fallbacks[reason]:
                del self.fallbacks[reason]

    def add(self, other: Tally) -> None:
        """Count what `other` counted too. Its thread may be counting still."""
        self.calls.update(dict(other.calls))
        self.unchecked += other.unchecked
        self.fallbacks.update(dict(other.fallbacks))


@dataclass
class DeviceState:
    """What a run knows of the calls on one device; ComfyUI gives each device a thread of its own."""

    least: float
    """Calls with fewer query tokens are exact."""
    too_few: str
    """The reason for that."""
    known_exact: dict[Any, str] = field(default_factory=dict)
    """Shapes and arguments of calls that the router left to exact attention -> why."""


@dataclass
class Evaluation:
    """One call of the diffusion model, in the thread of one device."""

    run: SamplingRun
    latent_shape: tuple[int, ...] | None
    sigma: float | None
    step: int | None
    family: str | None
    patches: tuple[tuple[int, int, int], ...]
    has_reference: bool = False
    double_blocks: int = 0
    fingerprint: str | None = None
    """fingerprint_of the model."""
    layout: Layout = field(default_factory=Layout)
    prompts: tuple[Any, ...] | None = None
    """ComfyUI's cond_or_uncond: which prompts are evaluated, 0 positive and 1 negative."""
    exact: str | None = None
    """Why all of this evaluation is exact, or None."""
    calls: int = 0
    """Attention calls so far; the hook counts every one, so that the number can stand for the block index."""
    answers: list[Answer] = field(default_factory=list)
    """The calls that backends answered, what was measured of them still on the device."""
    checks: list[Check] = field(default_factory=list)
    """What has to hold for the result to count, still on the device."""
    max_head_dim: int = 0
    tally: Tally = field(default_factory=Tally)
    """This evaluation's counts; they join the run's when it ends, so that threads of one run do not write to the same."""

    @property
    def kind(self) -> Any:
        """What tells evaluations of a step apart: the prompts and the latent's shape."""
        return (self.prompts, self.latent_shape)

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
    tally: Tally = field(default_factory=Tally)
    broken: set[tuple[Any, ...]] = field(default_factory=set)
    """(backend, signature) pairs that failed in this run."""
    too_far: set[tuple[Any, ...]] = field(default_factory=set)
    """(backend, signature, block) whose sampled error exceeded the limit."""
    attempted: set[tuple[Any, ...]] = field(default_factory=set)
    """(backend, signature) that a backend has been given; the first time its inputs are compared before and after."""
    too_slow: dict[tuple[Any, ...], tuple[int, str]] = field(default_factory=dict)
    """(backend, signature, block) that exact attention serves better -> (evaluation in which that was seen, why)."""
    sampled: set[Any] = field(default_factory=set)
    """Evaluation.kind of those that were sampled in full."""
    devices: dict[Any, DeviceState] = field(default_factory=dict)
    under_way: list[Tally] = field(default_factory=list)
    """Counts of the evaluations in progress."""
    sigmas: dict[float, float] = field(default_factory=dict)
    """Part of the schedule, 0 to 1 -> sigma there."""
    guard_failed: bool = False
    """Whether the guard raised in this run; then it looks at no more calls."""
    compare: bool = False
    """Compute exactly, too, what a backend answers."""
    fingerprints: dict[int, str | None] = field(default_factory=dict)
    """id of a diffusion model -> fingerprint_of it."""
    memo: dict[Any, Any] = field(default_factory=dict)
    """What backends have settled in this run; AttentionCall.memo."""
    exact_times: dict[Any, ExactTime] = field(default_factory=dict)
    """Signature of calls that a backend answers -> what exact attention takes for them."""
    name: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    """What tells this run's records from others'; made at random."""
    records: list[StepRecord] = field(default_factory=list)
    unrecorded: deque[Callable[[], None]] = field(default_factory=deque)
    """What makes the records of evaluations that have ended; called while the device works on the next, so that it need not wait."""
    latent_shape: tuple[int, ...] | None = None
    workspaces: dict[tuple[str, Any], int] = field(default_factory=dict)
    """(backend, signature) -> the workspace in bytes that the backend stated."""

    def catch_up(self) -> None:
        """Make the records that are still to be made."""
        while self.unrecorded:
            try:
                make = self.unrecorded.popleft()
            except IndexError:  # another device's thread was faster
                return
            make()

    def step_of(self, sigma: float) -> int | None:
        """Index of `sigma` in the schedule; of the step it lies in for samplers that evaluate between sigmas."""
        found = None
        for index, bound in enumerate(self.schedule[:-1]):
            if sigma <= bound * (1 + 1e-4):
                found = index
        return found

    def summary(self, outcome: str) -> RunSummary:
        """Frozen copy of the counts."""
        spent: Counter[str] = Counter()
        for record in self.records:
            spent.update(record.milliseconds)
        counts = Tally()
        with _lock:
            for tally in (self.tally, *self.under_way):
                counts.add(tally)
        times = compared(self.records)
        saved, speed_up = (None, None) if times is None else ((times[1] - times[0]) / 1000, times[1] / max(times[0], 1e-6))
        quality = quality_text(self.records, counts.unchecked)
        return RunSummary(self.model, max(len(self.schedule) - 1, 0), self.evaluations, with_exact(counts.calls, counts.fallbacks),
                          dict(counts.fallbacks), time.monotonic() - self.started, outcome, dict(spent), quality, saved, speed_up,
                          comparison_text(self.records) or ("compared with exact attention: no call to compare" if self.compare else ""))


def with_exact(calls: Mapping[str, int], fallbacks: Mapping[str, int]) -> dict[str, int]:
    """`calls` and, under "exact", the calls that exact attention answered."""
    return {**({"exact": sum(list(fallbacks.values()))} if fallbacks else {}), **calls}


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


def open_runs() -> tuple[SamplingRun, ...]:
    """The runs in progress in this process, of all threads."""
    with _lock:
        return tuple(_open)


def family_of(model: Any) -> str:
    """Class name of ComfyUI's BaseModel subclass; that of its configuration (SD15) for families without a class of their own."""
    name = type(model).__name__
    return type(model.model_config).__name__ if name == "BaseModel" and hasattr(model, "model_config") else name


def fingerprint_of(model: Any) -> str | None:
    """Family and a hash of the parameters' names and shapes: the same for fine-tunes of a model, and for nothing else. No weight is read.

    None where the model does not show its parameters.
    """
    try:
        shapes = [(name, tuple(parameter.shape)) for name, parameter in model.diffusion_model.named_parameters()]
    except Exception:
        return None
    return f"{family_of(model)}-{hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]}"


def describe(run: SamplingRun, model: Any, latent_shape: Sequence[int] | None, sigma: float | None, has_reference: bool = False) -> Evaluation:
    """The Evaluation of one call of the diffusion model. model: ComfyUI's BaseModel or anything with a `diffusion_model`."""
    diffusion_model, family = getattr(model, "diffusion_model", None), family_of(model)
    if id(diffusion_model) not in run.fingerprints:
        run.fingerprints[id(diffusion_model)] = fingerprint_of(model)
    return Evaluation(run, None if latent_shape is None else tuple(latent_shape), sigma, None if sigma is None else run.step_of(sigma),
                      family, patch_sizes(diffusion_model), has_reference, len(getattr(diffusion_model, "double_blocks", ())),
                      run.fingerprints[id(diffusion_model)], layout(family, diffusion_model))


@contextmanager
def evaluation(current: Evaluation) -> Iterator[Evaluation]:
    """Enter one call of the diffusion model."""
    run = current.run
    run.model = current.family
    run.latent_shape = current.latent_shape
    current.tally.log_calls = run.tally.log_calls
    with _lock:
        run.evaluations += 1
        run.under_way.append(current.tally)
    _position.evaluations.append(current)
    try:
        yield current
    finally:
        _position.evaluations.pop()
        with _lock:
            run.under_way[:] = [tally for tally in run.under_way if tally is not current.tally]
            run.tally.add(current.tally)


def current_evaluation() -> Evaluation | None:
    """The model call that this thread is in."""
    entered = _position.evaluations
    return entered[-1] if entered else None
