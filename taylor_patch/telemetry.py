"""What a model evaluation did: read from the device once at its end, logged, and written as JSON lines."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_patch.guard import FIGURES

log = logging.getLogger("taylor_patch")

SCHEMA_VERSION = 1
DENOMINATORS = ("count", "bad_fraction", "least", "greatest", "mean")
"""Statistics of denominators: how many, the fraction that is bad (not above the backend's eps), and their range."""
LOG_FILE_LIMIT = 16 << 20
"""Bytes after which the log file is renamed to NAME.1 (replacing an older one) and begun anew."""


class Timer:
    """Milliseconds between start and stop: events on the current stream of a CUDA device, read later; the clock elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._cuda = device, device.type == "cuda"
        self._start = self._mark()
        self._stop: Any = None

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def stop(self) -> None:
        """Mark the end."""
        self._stop = self._mark()

    def milliseconds(self) -> float:
        """The time; on CUDA only after the device has passed the end."""
        return float(self._start.elapsed_time(self._stop)) if self._cuda else (self._stop - self._start) * 1000


@dataclass(frozen=True)
class Comparison:
    """A call that was also computed exactly. error: relative L2 distance over all rows, a scalar on the device; timer: exact attention's."""

    error: Tensor
    timer: Timer


class ExactTime:
    """What exact attention takes for calls of one form: as an earlier run has kept it, or the less of two calls that are timed.

    key: what it is kept under, None where it is not.
    """

    CALLS = 2

    def __init__(self, key: Mapping[str, Any] | None, kept: float | None = None) -> None:
        self.key, self.measured = key, kept is None
        self._milliseconds = kept
        self._timers: list[Timer] = []
        self._failed = False

    @property
    def wanted(self) -> bool:
        """Whether another call should be timed."""
        return self.measured and not self._failed and self._milliseconds is None and len(self._timers) < self.CALLS

    def measure(self, exact: Callable[[], object], device: torch.device) -> None:
        """Time exact attention on the inputs of the call at hand. What it raises ends the measuring, unless it is ComfyUI's interrupt."""
        try:
            timer = Timer(device)
            exact()
            timer.stop()
            self._timers.append(timer)
        except Exception as error:
            if type(error).__name__ == "InterruptProcessingException":
                raise
            self._failed = True

    def milliseconds(self) -> float | None:
        """The time, None while it is not known; on CUDA only after the device has passed the calls that were timed."""
        if self._milliseconds is None and len(self._timers) == self.CALLS:
            self._milliseconds = min(timer.milliseconds() for timer in self._timers)
            self._timers.clear()
        return self._milliseconds


@dataclass
class Check:
    """What may keep an evaluation's result from counting, still on the device. problem: what it means where `fault` is not zero."""

    backend: str
    signature: Any
    problem: str
    fault: Tensor


@dataclass
class Answer:
    """One call that a backend answered. figures are still on the device."""

    backend: str
    signature: Any
    block: int | None
    timer: Timer
    limit: float = math.inf
    """Sampled error from which the block is exact."""
    figures: Tensor | None = None
    denominators: Mapping[str, float] | None = None
    exact: ExactTime | None = None
    observed: Mapping[str, Tensor] = field(default_factory=dict)
    """What the backend says of the call (Backend.observed)."""
    comparison: Comparison | None = None


@dataclass(frozen=True)
class BlockRecord:
    """An Answer, read. figures: FIGURES by name, empty where the call was not sampled. exact_milliseconds: what exact attention takes
    for such a call, None where that is not known. compared: "error" and "exact_milliseconds" where the call was also computed exactly."""

    backend: str
    block: int | None
    milliseconds: float
    figures: Mapping[str, float] = field(default_factory=dict)
    denominators: Mapping[str, float] | None = None
    exact_milliseconds: float | None = None
    observed: Mapping[str, float] = field(default_factory=dict)
    compared: Mapping[str, float] | None = None


@dataclass(frozen=True)
class StepRecord:
    """One evaluation of the model."""

    model: str | None
    step: int | None
    sigma: float | None
    seconds: float
    calls: Mapping[str, int]
    fallbacks: Mapping[str, int]
    max_head_dim: int
    blocks: tuple[BlockRecord, ...]
    repeated: bool = False
    """The result was not used: the step was computed again."""

    @property
    def milliseconds(self) -> dict[str, float]:
        """Backend -> milliseconds in it."""
        total: dict[str, float] = defaultdict(float)
        for block in self.blocks:
            total[block.backend] += block.milliseconds
        return dict(total)

    @property
    def saved_milliseconds(self) -> float | None:
        """Estimated time saved against exact attention, by the calls for which its time is known; None where it is for none."""
        found = compared([self])
        return None if found is None else found[1] - found[0]

    @property
    def R(self) -> int | None:
        """The most Taylor features that a call was expanded in; None where no backend works with any."""
        return max((int(block.denominators["R"]) for block in self.blocks if block.denominators and "R" in block.denominators), default=None)

    @property
    def denominators(self) -> dict[str, float] | None:
        """DENOMINATORS of all calls together; None where none was looked at."""
        found = [block.denominators for block in self.blocks if block.denominators and block.denominators.keys() >= set(DENOMINATORS)]
        if not found:
            return None
        count = sum(part["count"] for part in found)
        bad, mean = (sum(part[name] * part["count"] for part in found) / count for name in ("bad_fraction", "mean"))
        return {"count": count, "bad_fraction": bad, "least": min(part["least"] for part in found),
                "greatest": max(part["greatest"] for part in found), "mean": mean}

    def values(self, name: str) -> list[float]:
        """A figure of all sampled calls."""
        return [block.figures[name] for block in self.blocks if name in block.figures]


@dataclass(frozen=True)
class Reading:
    """The answers of an evaluation, read. failed: checks that found a fault. too_far: (backend, signature, block) of answers whose sampled
    error exceeds their limit, with the error. timed: makes each answer's record; reading some 60 timers takes long enough to be left until
    the device has other work."""

    timed: tuple[Callable[[], BlockRecord], ...] = ()
    failed: tuple[Check, ...] = ()
    too_far: Mapping[tuple[str, Any, int | None], float] = field(default_factory=dict)
    observed: Mapping[tuple[str, Any, int | None], Mapping[str, float]] = field(default_factory=dict)
    """(backend, signature, block) -> what the backend said of the last such call."""


def read(answers: Iterable[Answer], checks: Iterable[Check] = ()) -> Reading:
    """Everything that the answers and checks left on the device, with one read from it."""
    answers, checks = list(answers), list(checks)
    left = [check.fault.reshape(1).float() for check in checks] + [answer.figures for answer in answers if answer.figures is not None]
    left += [value.reshape(1).float() for answer in answers for value in answer.observed.values()]
    left += [answer.comparison.error.reshape(1).float() for answer in answers if answer.comparison is not None]
    flat = torch.cat(left).tolist() if left else []
    failed = tuple(check for check, fault in zip(checks, flat, strict=False) if fault)
    rest = iter(flat[len(checks) :])
    bad = {(check.backend, check.signature) for check in failed}
    all_figures = [{} if answer.figures is None else {name: next(rest) for name in FIGURES} for answer in answers]
    all_observed = [{name: next(rest) for name in answer.observed} for answer in answers]
    all_compared = [None if (one := answer.comparison) is None else (next(rest), one.timer) for answer in answers]
    timed, far, said = [], {}, {}
    for answer, figures, observed, against in zip(answers, all_figures, all_observed, all_compared, strict=True):
        timed.append(partial(_block, answer.backend, answer.block, answer.timer, figures, answer.denominators,
                             None if answer.exact is None else answer.exact.milliseconds(), observed, against))
        if observed:
            said[answer.backend, answer.signature, answer.block] = observed
        if (answer.backend, answer.signature) not in bad and figures.get("quality_raw", 0.0) > answer.limit:
            far[answer.backend, answer.signature, answer.block] = figures["quality_raw"]
    return Reading(tuple(timed), failed, far, said)


def _block(backend: str, block: int | None, timer: Timer, figures: Mapping[str, float], denominators: Mapping[str, float] | None,
           exact_milliseconds: float | None, observed: Mapping[str, float], compared: tuple[float, Timer] | None) -> BlockRecord:
    """The record of an answer, with its timers read."""
    return BlockRecord(backend, block, timer.milliseconds(), figures, denominators, exact_milliseconds, observed,
                       None if compared is None else {"error": compared[0], "exact_milliseconds": compared[1].milliseconds()})


def compared(records: Iterable[StepRecord]) -> tuple[float, float] | None:
    """(milliseconds of our backends, of exact attention for the same calls) over the calls for which the latter is known, or None.

    Exact attention would not have had to repeat a step.
    """
    pairs = [(block.milliseconds, 0.0 if record.repeated else block.exact_milliseconds) for record in records for block in record.blocks
             if block.exact_milliseconds is not None]
    return (sum(ours for ours, _ in pairs), sum(exact for _, exact in pairs)) if pairs else None


def saved_text(saved_seconds: float | None, speed_up: float | None) -> str:
    """"estimated 3.1 s saved (attention 2.4 times as fast as exact)", or an empty string where there is no estimate."""
    if saved_seconds is None or speed_up is None:
        return ""
    return (f"estimated {abs(saved_seconds):.1f} s {'saved' if saved_seconds >= 0 else 'lost'} "
            f"(attention {speed_up:.2g} times as fast as exact)")


def quality_text(records: Iterable[StepRecord], unchecked: int = 0) -> str:
    """"error 0.021 (largest 0.034, 12 calls sampled)" of quality_raw in results that were used, or an empty string without any.

    unchecked: calls that were to be sampled, for which memory was short.
    """
    values = [value for record in records if not record.repeated for value in record.values("quality_raw")]
    missed = f"{unchecked} calls not sampled for lack of memory" if unchecked else ""
    found = f"error {sum(values) / len(values):.3g} (largest {max(values):.3g}, {len(values)} calls sampled)" if values else ""
    return ", ".join(filter(None, (found, missed)))


def comparison_text(records: Iterable[StepRecord]) -> str:
    """"compared with exact attention: 80 calls, error 0.02 (largest 0.04), 4.1 s instead of 8.3 s", or an empty string where none was."""
    blocks = [(block, block.compared) for record in records for block in record.blocks if block.compared is not None]
    if not blocks:
        return ""
    errors = [compared["error"] for _, compared in blocks]
    ours, exact = sum(block.milliseconds for block, _ in blocks), sum(compared["exact_milliseconds"] for _, compared in blocks)
    return (f"compared with exact attention: {len(blocks)} calls, error {sum(errors) / len(errors):.3g} (largest {max(errors):.3g}), "
            f"{ours / 1000:.3g} s instead of {exact / 1000:.3g} s")


def gain_text(milliseconds: float) -> str:
    """"8.7 ms saved", or "lost" where the time is below 0."""
    return f"{abs(milliseconds):.1f} ms {'saved' if milliseconds >= 0 else 'lost'}"


def figures_text(record: StepRecord) -> str:
    """The figures of an evaluation for its log line: sampled ones as means, for quality_raw and quality_eff the largest too."""
    shown = []
    if record.values("quality_raw"):
        mean = {name: sum(values) / len(values) for name in FIGURES if (values := record.values(name))}
        shown += [f"{name} {mean[name]:.3g} (largest {max(record.values(name)):.3g})" for name in ("quality_raw", "quality_eff")]
        shown += [f"q norm {mean['q_norm']:.3g}, k norm {mean['k_norm']:.3g}",
                  f"q.k p1 {mean['logit_p01']:.3g} p50 {mean['logit_p50']:.3g} p99 {mean['logit_p99']:.3g} "
                  f"largest {max(record.values('logit_max')):.3g}"]
    if record.R is not None:
        shown.append(f"R {record.R}")
    if (found := record.denominators) is not None:
        shown.append(f"denominators least {found['least']:.3g}, fraction bad {found['bad_fraction']:.3g}")
    return ", ".join([*shown, f"max_head_dim {record.max_head_dim}"])


class LogFile:
    """JSON lines in the file `path`; a failure to write is one warning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._failed = False

    def write(self, kind: str, run: str, content: Mapping[str, Any]) -> None:
        """Append {"version", "kind", "run", "time", **content}. docs/telemetry.md describes the kinds."""
        line = json.dumps({"version": SCHEMA_VERSION, "kind": kind, "run": run, "time": round(time.time(), 3), **content})
        try:
            if self.path.exists() and self.path.stat().st_size > LOG_FILE_LIMIT:
                os.replace(self.path, self.path.with_name(self.path.name + ".1"))
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._failed:
                log.warning("taylor_patch: log_file %s cannot be written (%s); nothing is recorded.", self.path, error)
            self._failed = True


def step_content(record: StepRecord) -> dict[str, Any]:
    """A StepRecord as JSON content: four digits, null for values that are not finite."""
    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}") if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list | tuple) else value

    return rounded({**asdict(record), "milliseconds": record.milliseconds, "saved_milliseconds": record.saved_milliseconds, "R": record.R,  # type: ignore[no-any-return]
                    "denominators": record.denominators})
