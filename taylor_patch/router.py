"""Which backend answers a call: configuration, rules, and what the backends say of themselves."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch

from taylor_patch import calibration
from taylor_patch.backends.base import Backend, as_reasons
from taylor_patch.call import AttentionCall
from taylor_patch.config import Config
from taylor_patch.errors import said
from taylor_patch.plugins import Registry

log = logging.getLogger("taylor_patch")

T = TypeVar("T")
CROSSOVER_HEADS = 24
"""Heads (times batch) with which crossovers are measured. Exact attention has heads x queries x keys to do; fewer heads or keys leave it as
little at more tokens, where a backend's fixed cost weighs as much."""


@dataclass(frozen=True)
class Choice:
    """backend None means exact attention; reasons say why, or which backends were passed over."""

    backend: Backend | None
    reasons: tuple[str, ...] = ()


class Backends(Mapping[str, Backend]):
    """Name -> backend with its options. A backend is imported and made when it is first asked for.

    One that raises while it is made, or where it is asked about calls, is replaced by one that refuses every call and says why.
    """

    def __init__(self, registry: Registry, options: Callable[[str], Any]) -> None:
        self._registry, self._options = registry, options
        self._made: dict[str, Backend] = {}

    def __getitem__(self, name: str) -> Backend:
        if name not in self._made:
            kind = self._registry.kind(name)
            try:
                self._made[name] = kind(self._options(name))
            except (Exception, SystemExit) as error:
                return self.leave_out(name, error)
        return self._made[name]

    def leave_out(self, name: str, error: BaseException) -> Backend:
        """Put one that refuses every call in the place of a backend that raised `error`; a line says so."""
        self._made[name] = self._registry.refusing(name, error)()
        return self._made[name]

    def label(self, name: str) -> str:
        """'backend "x" (plugin y)', for a message."""
        return self._registry.label(name)

    def unknown(self, name: str, names: Iterable[str]) -> str:
        """What to say of a backend `name` that is none of `names`."""
        return self._registry.unknown(name, names)

    @property
    def made(self) -> tuple[Backend, ...]:
        """Those that were asked for."""
        return tuple(self._made.values())

    def __iter__(self) -> Iterator[str]:
        return iter(self._registry.backends)

    def __len__(self) -> int:
        return len(self._registry.backends)

    def __contains__(self, name: object) -> bool:
        return name in self._registry.backends


class Router:
    """Choices for one configuration, cached by what they depend on."""

    CACHE_LIMIT = 4096

    def __init__(self, config: Config, registry: Registry, off: str | None = None) -> None:
        """off: why every call is exact, where the configuration does not say it."""
        self.config = config
        self.backends = Backends(registry, self._options)
        self._cache: dict[Any, Choice] = {}
        settings = config.settings
        self.has_rules = bool(config.rules)
        self.may_overrule = any(rule.respect == "rule" for rule in config.rules)
        self.off = off if off else "enabled = false" if not settings.enabled else \
            'backend = "sdpa"' if settings.backend == "sdpa" and not config.rules else None
        """Why every call is exact, or None."""
        self._least: dict[torch.device, tuple[float, str]] = {}

    @cached_property
    def by_priority(self) -> list[Backend]:
        """All backends, those that `auto` tries first at the head."""
        return sorted(self.backends.values(), key=lambda backend: -backend.priority)

    def ask(self, backend: Backend, question: Callable[[Backend], T]) -> T:
        """`question(backend)`. A backend that raises is left out, and the one that takes its place is asked instead."""
        try:
            return question(backend)
        except (Exception, SystemExit) as error:
            refusing = self.backends.leave_out(backend.name, error)
            vars(self).pop("by_priority", None)
            self._cache.clear()
            return question(refusing)

    def unavailable(self, name: str) -> tuple[str, ...]:
        """Why the backend `name` can run no call here; empty when it can."""
        return self.ask(self.backends[name], lambda asked: as_reasons(asked.unavailable(), "unavailable()"))

    def reasons_against(self, backend: Backend, call: AttentionCall) -> tuple[str, ...]:
        """Every reason why the backend cannot run `call`; empty when it can."""
        return self.ask(backend, lambda asked: as_reasons(asked.reasons_against(call), "reasons_against()"))

    def least_tokens(self, device: torch.device) -> tuple[float, str]:
        """(n, reason): calls with fewer than n query tokens on `device` are exact for that reason, whatever else they are."""
        found = self._least.get(device)
        if found is None:
            found = self._least[device] = self._find_least(device)
        return found

    def crossover(self, backend: Backend, device: torch.device) -> int | None:
        """Tokens from which `auto` may use `backend`: as measured on this machine, else as the backend was measured; None for never."""
        here = calibration.measured(device)
        return here[backend.name] if backend.name in here else self.ask(backend, lambda asked: _crossover(asked, device))

    def without_crossover(self, device: torch.device) -> str:
        """Why `auto` is exact on a device of which no crossover is known, with what to do."""
        if calibration.measured(device):
            return f"no backend was measured to be faster on {calibration.device_name(device)}"
        return f"no backend is known to be faster on {calibration.device_name(device)}: run `taylor-patch bench --calibrate`, or name near_far"

    def _find_least(self, device: torch.device) -> tuple[float, str]:
        settings = self.config.settings
        if settings.min_tokens != "auto":
            wanted = (settings.min_tokens, f"fewer tokens than min_tokens = {settings.min_tokens}")
        else:
            wanted = (1, "no tokens")
        if settings.backend != "auto" or self.config.rules:
            return wanted
        measured = [tokens for backend in self.by_priority if (tokens := self.crossover(backend, device)) is not None]
        if not measured:
            return math.inf, self.without_crossover(device)
        if settings.min_tokens == "auto":
            return min(measured), f"fewer tokens than {min(measured)}, the measured crossover"
        return wanted

    def keep(self, failed: Container[str], memo: dict[Any, Any]) -> None:
        """Let the backends keep what a run has settled in its memo. failed: names of those that failed in it."""
        for backend in self.backends.made:
            try:
                if backend.name not in failed:
                    backend.keep(memo)
            except (Exception, SystemExit) as error:
                log.warning("taylor_patch: %s could not keep what the run has settled (%s)", backend.name, said(error))

    def _options(self, name: str) -> Any:
        """Options of a backend; a number in [taylor_patch] min_tokens holds for backends that set none of their own."""
        options, least = self.config.options.get(name), self.config.settings.min_tokens  # none where the configuration is invalid
        own = any("min_tokens" in layer.data.get("backends", {}).get(name, {}) for layer in self.config.layers)
        if options is None or least == "auto" or own or not hasattr(options, "min_tokens"):
            return options
        return dataclasses.replace(options, min_tokens=least)

    def target_error(self, call: AttentionCall) -> float:
        """Relative L2 error that the configuration allows for this call."""
        return next((rule.quality for rule in self.config.rules if rule.quality is not None and rule.conditions.match(call)),
                    self.config.target_error)

    def overrules(self, call: AttentionCall) -> bool:
        """Whether a rule wins over a node's override and the checkpoint's attention for this call."""
        return next((rule.respect for rule in self.config.rules if rule.respect and rule.conditions.match(call)), "override") == "rule"

    def choose(self, call: AttentionCall, name: str | None = None) -> Choice:
        """The backend for `call`, or exact with every reason. name: a backend that wins over rules and settings."""
        position = (call.sigma, call.block) if self.config.rules else None
        key = (call.signature, call.target_error, call.scale, position, name)
        choice = self._cache.get(key)
        if choice is None:
            if len(self._cache) >= self.CACHE_LIMIT:
                self._cache.clear()
            choice = self._cache[key] = self._choose(call) if name is None else self._named(name, call)
        return choice

    def _choose(self, call: AttentionCall) -> Choice:
        settings = self.config.settings
        if not settings.enabled:
            return Choice(None, (self.off or "enabled = false",))
        name = next((rule.backend for rule in self.config.rules if rule.conditions.match(call) and rule.backend), settings.backend)
        least, reason = self.least_tokens(call.q.device)
        if call.q.shape[2] < least:
            return Choice(None, (reason,))
        if name == "sdpa":
            return Choice(None, ('backend = "sdpa"',))
        return self.automatic(call) if name == "auto" else self._named(name, call)

    def _named(self, name: str, call: AttentionCall) -> Choice:
        backend = self.backends[name]
        reasons = tuple(f"{name}: {reason}" for reason in self.reasons_against(backend, call))
        return Choice(None, reasons) if reasons else Choice(backend)

    def automatic(self, call: AttentionCall) -> Choice:
        """The backend of highest priority that is measured to be faster for `call` and can run it."""
        tokens, keys, lanes = call.q.shape[2], call.k.shape[2], call.q.shape[0] * call.q.shape[1]
        few = f"too few heads ({lanes}) for {tokens} tokens" if call.self_attention else \
            f"too few keys ({keys}) or heads ({lanes}) for {tokens} queries"
        passed_over = []
        for backend in self.by_priority:
            if backend.name == "sdpa":
                continue
            crossover = self.crossover(backend, call.q.device)
            if crossover is None:
                reasons = self.unavailable(backend.name) or (f"not measured to be faster on {call.q.device.type}",)
                passed_over += [f"{backend.name}: {reason}" for reason in reasons]
            elif self.config.settings.min_tokens == "auto" and tokens < crossover:
                passed_over.append(f"{backend.name}: fewer tokens than the measured crossover {crossover}")
            elif self.config.settings.min_tokens == "auto" and lanes * tokens * keys < CROSSOVER_HEADS * crossover**2:
                passed_over.append(f"{backend.name}: {few}: crossovers are measured with {CROSSOVER_HEADS}"
                                   f"{'' if call.self_attention else ' heads and as many keys as queries'}")
            elif reasons := self.reasons_against(backend, call):
                passed_over += [f"{backend.name}: {reason}" for reason in reasons]
            else:
                return Choice(backend, tuple(passed_over))
        return Choice(None, tuple(passed_over) or ("no backend",))


def _crossover(backend: Backend, device: torch.device) -> int | None:
    found = backend.crossover_tokens(device)
    if found is not None and (not isinstance(found, int) or isinstance(found, bool)):
        raise TypeError(f"crossover_tokens() returned {found!r}, neither a number of tokens nor None")
    return found
