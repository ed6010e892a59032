"""The engine: one configuration, its router, and the safe way to run a backend on a call."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taylor_patch import config as configuration
from taylor_patch import plugins
from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.call import AttentionCall
from taylor_patch.errors import ConfigError
from taylor_patch.router import Choice, Router
from taylor_patch.run import Evaluation, RunSummary, SamplingRun, sampling_run

log = logging.getLogger("taylor_patch")

NOT_FINITE = "returned values that are not finite"


class Engine:
    """Plugins, configuration and router, swapped as a whole when a file changes."""

    def __init__(self, overrides: Mapping[str, Any] | None = None, environ: Mapping[str, str] = os.environ) -> None:
        self._overrides, self._environ = overrides, environ
        self._lock = threading.Lock()
        self.last_run: RunSummary | None = None
        self.problem: str | None = None
        self.registry = plugins.load(configuration.allowed_plugins(overrides, environ, _comfyui_user()), environ=environ)
        self._stamp = self._current_stamp()
        try:
            loaded = self._load()
        except ConfigError as error:
            self.problem = str(error)
            log.warning("taylor_patch: %s. Attention stays exact until this is corrected.", error)
            off = configuration.Layer("invalid configuration", {"taylor_patch": {"enabled": False}})
            loaded = configuration.merge([off], self.registry.option_types)
        self._put_in_force(loaded)

    def _load(self) -> configuration.Config:
        return configuration.load(self.registry.option_types, self._overrides, self._environ, _comfyui_user())

    def _current_stamp(self) -> object:
        try:
            return configuration.stamp(configuration.files(self._environ, _comfyui_user()))
        except ConfigError as error:
            return str(error)

    def _put_in_force(self, loaded: configuration.Config) -> None:
        self.config = loaded
        self.router = Router(loaded, self.registry)
        self.registry.notify("taylor_patch_configure", config=loaded)

    def reload(self) -> None:
        """Look at the configuration files again; an invalid one keeps the last good configuration and says so."""
        with self._lock:
            stamp = self._current_stamp()
            if stamp == self._stamp:
                return
            self._stamp = stamp
            try:
                loaded = self._load()
            except ConfigError as error:
                self.problem = str(error)
                log.warning("taylor_patch: %s. The last good configuration stays in force.", error)
                return
            self.problem = None
            if loaded != self.config:
                self._put_in_force(loaded)
                log.info("taylor_patch: configuration reloaded: %s", self.describe())

    def describe(self) -> str:
        """The settings in force, for a log line."""
        s = self.config.settings
        return f'backend = "{s.backend}", quality = {s.quality}, min_tokens = {s.min_tokens}' if s.enabled else "enabled = false"

    @contextmanager
    def run(self, schedule: list[float]) -> Iterator[SamplingRun]:
        """A sampling run from start to end, normal or not; prints its line."""
        try:
            self.reload()
        except Exception as error:
            log.warning("taylor_patch: the configuration was not looked at again (%s: %s)", type(error).__name__, error)
        outcome = "finished"
        with sampling_run(schedule) as current:
            current.log_calls = self.config.settings.log == "call"
            try:
                yield current
            except BaseException as error:
                outcome = f"ended by {type(error).__name__}"
                raise
            finally:
                self._finish(current, outcome)

    def _finish(self, run: SamplingRun, outcome: str) -> None:
        try:
            self.last_run = run.summary(outcome)
            if self.config.settings.log != "off":
                log.info("taylor_patch: %s", self.last_run.line())
            self.registry.notify("taylor_patch_run_finished", summary=self.last_run)
        except Exception as error:
            log.warning("taylor_patch: the run's summary failed (%s: %s)", type(error).__name__, error)

    def choose(self, call: AttentionCall, run: SamplingRun) -> Choice:
        """The router's choice, less the backends that failed on such a call in this run."""
        choice = self.router.choose(call)
        if choice.backend is not None and (choice.backend.name, call.signature) in run.broken:
            return Choice(None, (f"{choice.backend.name}: failed earlier in this run",))
        return choice

    def attempt(self, backend: Backend, call: AttentionCall, run: SamplingRun, evaluation: Evaluation | None = None) -> Tensor | None:
        """[B, H, N_q, D] from `backend`, or None where exact attention has to answer; counted either way.

        On a GPU the check for values that are not finite is left on the device, in evaluation.finite.
        """
        try:
            out = backend.run(call)
            problem = check_form(out, call)
            if problem is None:
                finite = torch.isfinite(out.sum(dtype=torch.float32))
                if evaluation is not None and checks_later(out.device):
                    evaluation.finite.append(((backend.name, call.signature), finite))
                elif not bool(finite):
                    problem = NOT_FINITE
        except Fallback as reason:
            run.exact(f"{backend.name}: {reason}")
            return None
        except Exception as error:
            if type(error).__name__ == "InterruptProcessingException":  # ComfyUI's cancel button
                raise
            problem = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}"
        if problem is None:
            run.handled(backend.name, call)
            return out
        run.broken.add((backend.name, call.signature))
        run.exact(f"{backend.name}: {problem}")
        log.warning('taylor_patch: backend "%s" failed on q %s %s (%s); exact attention takes its place for such calls in this run.',
                    backend.name, list(call.q.shape), str(call.q.dtype).removeprefix("torch."), problem)
        return None


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


def not_finite(evaluation: Evaluation) -> tuple[str, ...]:
    """Names of the backends that returned values that are not finite in this evaluation; they are not asked again in this run.

    One read from the device.
    """
    if not evaluation.finite:
        return ()
    flags = torch.stack([flag for _, flag in evaluation.finite]).tolist()
    bad = [key for (key, _), finite in zip(evaluation.finite, flags, strict=True) if not finite]
    evaluation.run.broken.update(bad)
    return tuple(sorted({name for name, _ in bad}))


def is_out_of_memory(error: Exception) -> bool:
    """True for torch's out-of-memory errors, also where they arrive as AcceleratorError code 2."""
    return isinstance(error, torch.OutOfMemoryError) or (type(error).__name__ == "AcceleratorError" and getattr(error, "error_code", 0) == 2)


def _comfyui_user() -> Path | None:
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
