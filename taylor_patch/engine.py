"""The engine: one configuration, its router, and the safe way to run a backend on a call."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_patch import cache, guard, plugins, startup
from taylor_patch import config as configuration
from taylor_patch.backends.base import Backend, Fallback, not_finite
from taylor_patch.call import AttentionCall
from taylor_patch.errors import ConfigError, PluginError, said
from taylor_patch.memory import Workspaces, predict
from taylor_patch.out_of_memory import HeadGroups, is_out_of_memory, part_of, run_in_groups
from taylor_patch.router import Choice, Router
from taylor_patch.run import Evaluation, RunSummary, SamplingRun, Totals, counted, family_of, sampling_run
from taylor_patch.telemetry import (
    Answer,
    Check,
    Comparison,
    ExactTime,
    LogFile,
    Reading,
    StepRecord,
    Timer,
    figures_text,
    gain_text,
    step_content,
)

log = logging.getLogger("taylor_patch")

NOT_FINITE = "returned values that are not finite"
WROTE_INPUTS = "wrote into q, k or v"
EXACT_TIME = "exact_time"
"""Kind of what is kept on disk of the times of exact attention."""
LOOK_AGAIN = 4
"""Model evaluations after which a backend that was too slow in a block is tried there again: what attention looks like changes with sigma."""


class Engine:
    """Plugins, configuration and router, swapped as a whole when a file changes."""

    def __init__(self, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self._overrides, self.environ = overrides, environ
        self._lock = threading.Lock()
        self.last_run: RunSummary | None = None
        self.last_steps: tuple[StepRecord, ...] = ()
        """The steps of last_run."""
        self.compare_next = False
        """Whether the next sampling run also computes exactly, all rows, what a backend answers, and says how far apart the two are."""
        self.totals = Totals()
        self.problem: str | None = None
        self.workspaces = Workspaces()
        self.head_groups = HeadGroups()
        self.registry = plugins.load(configuration.allowed_plugins(overrides, environ, comfyui_user()), environ=environ)
        self._stamp = self._current_stamp()
        off = None
        try:
            loaded = self.load()
        except PluginError:  # with TAYLOR_PATCH_STRICT only
            raise
        except (Exception, SystemExit) as error:
            where = error.place if isinstance(error, ConfigError) else type(error).__name__
            self.problem, off = _problem(error), f"invalid configuration ({where})"
            log.warning("taylor_patch: %sexact until the configuration is corrected: %s",
                        "patched, but " if startup.registered else "", self.problem)
            loaded = configuration.Config(configuration.Settings(enabled=False))
        self._put_in_force(loaded, off)

    def layers(self) -> list[configuration.Layer]:
        """All sources of settings as they are now, strongest first. Raises ConfigError for one that cannot be read."""
        return configuration.layers_of(self._overrides, self.environ, comfyui_user())

    def load(self) -> configuration.Config:
        """The configuration as its sources are now, which the next sampling run will have. Raises ConfigError."""
        return configuration.merge(self.layers(), self.registry.option_types, self.registry.why_absent)

    def _current_stamp(self) -> object:
        try:
            return configuration.stamp(configuration.files(self.environ, comfyui_user()))
        except ConfigError as error:
            return str(error)

    def _put_in_force(self, loaded: configuration.Config, off: str | None = None) -> None:
        self.config = loaded
        for sentence in loaded.ignored:
            log.warning("taylor_patch: %s", sentence)
        cache.switch(loaded.settings.cache)
        self.log_file = LogFile(Path(loaded.settings.log_file).expanduser()) if loaded.settings.log_file else None
        self.router = Router(loaded, self.registry, off)
        self.registry.notify("taylor_patch_configure", config=loaded)

    def reload(self) -> None:
        """Look at the configuration files again; an invalid one keeps the last good configuration and says so."""
        with self._lock:
            stamp = self._current_stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                loaded = self.load()
            except (Exception, SystemExit) as error:
                self.problem = _problem(error)
                log.warning("taylor_patch: the last good configuration stays in force: %s", self.problem)
                return
            problem, self.problem = self.problem, None
            if problem or loaded != self.config:
                self._put_in_force(loaded)
                log.info("taylor_patch: configuration reloaded: %s", self.describe())

    def describe(self) -> str:
        """The settings in force, for a log line."""
        return self.config.describe() if self.config.settings.enabled else f"off by {self.router.off}"

    @contextmanager
    def run(self, schedule: list[float]) -> Iterator[SamplingRun]:
        """A sampling run from start to end, normal or not; prints its line."""
        try:
            self.reload()
        except Exception as error:
            log.warning("taylor_patch: the configuration was not looked at again (%s: %s)", type(error).__name__, error)
        outcome = "finished"
        with sampling_run(schedule) as current:
            current.tally.log_calls = self.config.settings.log == "call"
            current.compare, self.compare_next = self.compare_next, False
            try:
                yield current
            except BaseException as error:
                outcome = f"ended by {type(error).__name__}"
                raise
            finally:
                self._finish(current, outcome)

    def reserve(self, patcher: Any, latent_shape: Sequence[int], how: bool | str = True) -> int:
        """Bytes to keep free for the backends in the coming run; 0 where memory is managed on demand, or memory_reserve is not `how`.

        patcher: ComfyUI's ModelPatcher.
        """
        settings = self.config.settings
        if settings.memory_reserve != how or self.router.off or getattr(patcher, "is_dynamic", lambda: False)():
            return 0
        family = family_of(patcher.model)
        nbytes = self.workspaces.of(family, latent_shape)
        if nbytes is None:
            nbytes = predict(self.router, patcher.model, latent_shape, torch.device(getattr(patcher, "load_device", "cpu")))
        nbytes = int(nbytes * settings.memory_reserve_factor)
        if nbytes and settings.memory_reserve_log:
            log.info("taylor_patch: memory: %.0f MiB are kept free for the attention of %s", nbytes / 2**20, family)
        return nbytes

    def judge(self, run: SamplingRun, found: Reading) -> None:
        """Tell the backends what was observed of their calls, and let them say where exact attention is the better choice."""
        for (name, signature, block), observed in found.observed.items():
            backend = self.router.backends[name]
            counts = (name, signature) not in run.broken and (name, signature, block) not in run.too_far
            backend.read_back(signature, block, observed, counts, run.memo)
            reason = backend.too_slow(observed)
            if reason is not None:
                run.too_slow[name, signature, block] = (run.evaluations, reason)

    def record(self, run: SamplingRun, step: StepRecord) -> None:
        """Keep, log and write what an evaluation did."""
        run.records.append(step)
        if self.config.settings.log in ("step", "call"):
            spent = ", ".join(f"{name} {milliseconds:.1f} ms" for name, milliseconds in sorted(step.milliseconds.items()))
            log.info("taylor_patch: %s", ", ".join(filter(None, (
                f"{step.model}: step {step.step}, sigma {'?' if step.sigma is None else format(step.sigma, '.4g')}: "
                f"{counted(step.calls, step.fallbacks)}", spent,
                "" if step.saved_milliseconds is None else f"estimated {gain_text(step.saved_milliseconds)}", figures_text(step),
                f"configuration: {self.describe()}"))))
        if self.log_file is not None:
            self.log_file.write("step", run.name, {**step_content(step), "settings": configuration.plain(self.config)})

    def _finish(self, run: SamplingRun, outcome: str) -> None:
        try:
            run.catch_up()
            self.last_run, self.last_steps = run.summary(outcome), tuple(run.records)
            if self.config.settings.log != "off":
                log.info("taylor_patch: %s", self.last_run.line())
            self.totals.add(self.last_run)
            for found in run.exact_times.values():
                if found.measured and found.key is not None and (milliseconds := found.milliseconds()) is not None:
                    cache.store(EXACT_TIME, found.key, {"milliseconds": milliseconds})
            self.workspaces.record(run.model, run.latent_shape, max(run.workspaces.values(), default=0))
            if self.log_file is not None:
                summary = {"schedule": run.schedule, "settings": configuration.plain(self.config), **dataclasses.asdict(self.last_run)}
                self.log_file.write("run", run.name, summary)
            self.router.keep({name for name, _ in run.broken}, run.memo)
            self.registry.notify("taylor_patch_run_finished", summary=self.last_run)
        except Exception as error:
            log.warning("taylor_patch: the run's summary failed (%s: %s)", type(error).__name__, error)

    def choose(self, call: AttentionCall, run: SamplingRun, name: str | None = None) -> Choice:
        """The router's choice (of the backend `name` where that is given), less the backends that failed on such a call in this run."""
        choice = self.router.choose(call, name)
        if choice.backend is not None and (choice.backend.name, call.signature) in run.broken:
            return Choice(None, (f"{choice.backend.name}: failed earlier in this run",))
        return choice

    def attempt(self, backend: Backend, call: AttentionCall, run: SamplingRun, evaluation: Evaluation | None = None,
                exact: partial[Any] | None = None) -> Tensor | None:
        """[B, H, N_q, D] from `backend`, or None where exact attention has to answer; counted either way.

        exact: ComfyUI's own attention on the same inputs; timed where its time is not known yet.
        On a GPU the check for values that are not finite is left on the device, in evaluation.answers.
        """
        tally = run.tally if evaluation is None else evaluation.tally
        if evaluation is not None:
            evaluation.max_head_dim = max(evaluation.max_head_dim, call.q.shape[-1])
        if (backend.name, call.signature, call.block) in run.too_far:
            tally.exact(f"{backend.name}: error above quality_limit in this block")
            return None
        slow = run.too_slow.get((backend.name, call.signature, call.block))
        if slow is not None and run.evaluations - slow[0] < LOOK_AGAIN:
            tally.exact(f"{backend.name}: {slow[1]}")
            return None
        key = (backend.name, call.signature)
        exact_time = before = None
        if evaluation is not None:
            exact_time = self._exact_time(call, run, exact)
            before = None if key in run.attempted else checksums(call)
        run.attempted.add(key)
        most = self.head_groups.of(backend.name, call)
        out_of_memory, problem = False, None
        try:
            timer = Timer(call.q.device)
            with own_precision(call.q.device):
                out = run_in_groups(backend, call, most)
            timer.stop()
            denominators, observed = backend.denominators(), backend.observed(call)
            problem = check_form(out, call)
            if problem is None:
                strange = not_finite(out)
                if (evaluation is None or not checks_later(out.device)) and bool(strange):
                    problem = NOT_FINITE
        except Fallback as reason:
            tally.exact(f"{backend.name}: {reason}")
            return None
        except (Exception, SystemExit, GeneratorExit) as error:  # of these only ComfyUI's cancel button may end the run
            if type(error).__name__ == "InterruptProcessingException":
                raise
            out_of_memory = is_out_of_memory(error)
            problem = "out of memory" if out_of_memory else said(error)
        finally:
            if evaluation is not None and before is not None:
                evaluation.checks.append(Check(*key, WROTE_INPUTS, ~same(before, checksums(call))))
        if problem is None:
            tally.handled(backend.name, call)
            if key not in run.workspaces:
                run.workspaces[key] = stated_workspace(backend, part_of(call, 0, most))
            if evaluation is not None:
                if checks_later(out.device):
                    evaluation.checks.append(Check(*key, NOT_FINITE, strange))
                evaluation.answers.append(Answer(backend.name, call.signature, call.block, timer,
                                                 call.target_error * (self.config.settings.quality_limit or math.inf),
                                                 self._figures(backend, call, out, evaluation), denominators, exact_time, observed,
                                                 self._comparison(call, out, run)))
            run.catch_up()
            return out
        tally.exact(f"{backend.name}: {problem}")
        shown = f"q {list(call.q.shape)} {str(call.q.dtype).removeprefix('torch.')}"
        # The error is gone by now, and with it the frames that held the backend's tensors.
        if out_of_memory and (fewer := self._make_room(backend, call)):
            log.warning('taylor_patch: backend "%s" ran out of memory on %s; exact attention answers this call, and the backend works on %d '
                        "key heads at a time from here on.", backend.name, shown, fewer)
            return None
        run.broken.add(key)
        log.warning('taylor_patch: backend "%s" failed on %s (%s); exact attention takes its place for such calls in this run.',
                    backend.name, shown, problem)
        return None

    def _make_room(self, backend: Backend, call: AttentionCall) -> int | None:
        """Let go of what the backend keeps, and give it fewer key heads at a time; None where it has only one already."""
        try:
            backend.release()
        except Exception as error:
            log.warning("taylor_patch: %s could not release its memory (%s)", backend.name, said(error))
        return self.head_groups.halve(backend.name, call)

    def _exact_time(self, call: AttentionCall, run: SamplingRun, exact: partial[Any] | None) -> ExactTime | None:
        """What exact attention takes for such calls. Known from an earlier run, or timed on the first two calls, before the backend's."""
        found = run.exact_times.get(call.signature)
        if found is None:
            if exact is None or not self.config.settings.quality_check:
                return None
            place = cache.place(call)
            key = None if place is None else {**place, "function": getattr(exact.func, "__qualname__", ""), "torch": torch.__version__}
            kept = None if key is None else (cache.load(EXACT_TIME, key) or {}).get("milliseconds")
            usable = isinstance(kept, int | float) and math.isfinite(kept) and kept > 0
            found = run.exact_times[call.signature] = ExactTime(key, float(kept) if usable else None)  # type: ignore[arg-type]
        if exact is not None and found.wanted:
            found.measure(exact, call.q.device)
        return found

    def _figures(self, backend: Backend, call: AttentionCall, out: Tensor, evaluation: Evaluation) -> Tensor | None:
        """The guard's figures where this call is sampled. The guard must never cost the picture: what it raises turns it off for the run,
        but for memory that is short, which leaves only this call unlooked at."""
        settings, run = self.config.settings, evaluation.run
        if run.guard_failed or not settings.quality_check or \
                not guard.is_sampled(evaluation.calls, evaluation.step, settings.quality_check_log_every, evaluation.kind not in run.sampled):
            return None
        try:
            with own_precision(call.q.device):
                return guard.figures(backend, call, out, settings.quality_check_samples, guard.seed_of(evaluation.calls, evaluation.step))
        except Exception as error:
            if is_out_of_memory(error):
                evaluation.tally.unchecked += 1
                return None
            run.guard_failed = True
            log.warning("taylor_patch: the quality check failed (%s: %s) and is off for the rest of this run.", type(error).__name__, error)
            return None

    def _comparison(self, call: AttentionCall, out: Tensor, run: SamplingRun) -> Comparison | None:
        """The call once more, by PyTorch's exact attention, where the run is compared; what it raises ends the comparison only."""
        if not run.compare:
            return None
        try:
            timer = Timer(call.q.device)
            exact = self.router.backends["sdpa"].run(call)
            timer.stop()
            return Comparison(guard.distance(out, exact), timer)
        except Exception as error:
            run.compare = False
            log.warning("taylor_patch: the comparison with exact attention ended (%s: %s).", type(error).__name__, error)
            return None


def _problem(error: BaseException) -> str:
    return str(error) if isinstance(error, ConfigError) else f"the configuration cannot be made: {said(error)}"


def own_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Backends work in the dtype of their inputs; torch.autocast, where a node has it on, would change single operators in them."""
    return torch.autocast(device.type, enabled=False) if torch.is_autocast_enabled(device.type) else nullcontext()


def stated_workspace(backend: Backend, call: AttentionCall) -> int:
    """The backend's workspace in bytes; 0 where it does not state one."""
    try:
        return int(backend.workspace_nbytes(call))
    except Exception:
        return 0


def checksums(call: AttentionCall) -> Tensor:
    """Sums of q, k and v, float32 [3] on the device."""
    return torch.stack([x.sum(dtype=torch.float32) for x in (call.q, call.k, call.v)])


def same(a: Tensor, b: Tensor) -> Tensor:
    """Whether all values are equal, nan to nan too; a scalar on the device."""
    return ((a == b) | (a.isnan() & b.isnan())).all()


def check_form(out: object, call: AttentionCall) -> str | None:
    """What is wrong with the type, shape, dtype or device of a backend's result, or None."""
    if not isinstance(out, Tensor):
        return f"returned {type(out).__name__} instead of a tensor"
    if out.shape != call.q.shape or out.dtype != call.q.dtype or out.device != call.q.device:
        return f"returned {list(out.shape)} {out.dtype} on {out.device} for q {list(call.q.shape)} {call.q.dtype} on {call.q.device}"
    return None


def checks_later(device: torch.device) -> bool:
    """True where reading a value back would wait for the device."""
    return device.type != "cpu"


def comfyui_user() -> Path | None:
    """ComfyUI's user folder in a running ComfyUI."""
    folder_paths = sys.modules.get("folder_paths")
    try:
        return Path(folder_paths.get_user_directory()) if folder_paths else None
    except Exception:
        return None


_engine: Engine | None = None
_engine_lock = threading.Lock()


def engine() -> Engine:
    """The engine of this process, made at first use."""
    global _engine
    if _engine is None:
        with _engine_lock:
            if _engine is None:
                _engine = Engine()
    return _engine


def current() -> Engine | None:
    """The engine in use, or None before the first use."""
    return _engine


def use(new: Engine | None) -> None:
    """Put another engine in the place of this process's; with None the next use reads plugins and configuration anew."""
    global _engine
    _engine = new


def reset() -> None:
    """Forget the engine; the next use reads plugins and configuration anew."""
    use(None)
