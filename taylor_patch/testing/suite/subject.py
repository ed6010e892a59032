"""What is tested, and what keeps it from being tested: an import, a declaration, or the plainest call."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from taylor_patch import config
from taylor_patch.backends.base import FLOATS, Backend
from taylor_patch.call import AttentionCall
from taylor_patch.declaration import imported
from taylor_patch.plugins import declared
from taylor_patch.testing.cases import GRID, TEXT, make_call
from taylor_patch.testing.suite.attempt import RAISED, ROUNDING, Broken, error_against_exact, finite, reasons_of, told
from taylor_patch.time_limit import within

HEAD_DIMS = (16, 32, 40, 48, 64, 80, 96, 112, 120, 128, 160, 192, 256)
PLAINEST = "the plainest call"


@dataclass(frozen=True)
class Subject:
    """What is tested; see taylor_patch.testing.conformance."""

    plugin: Any
    name: str
    options: dict[str, Any]
    device: str
    max_error: float
    load_seconds: float
    keys_multiple_of: int

    def __hash__(self) -> int:
        return id(self)

    def text(self, grid: tuple[int, int, int] = GRID) -> int:
        """Tokens beside a grid: TEXT, and as many more as keys_multiple_of asks for."""
        return self.keys(math.prod(grid) + TEXT) - math.prod(grid)

    def keys(self, n_kv: int) -> int:
        """n_kv, and as many more as keys_multiple_of asks for."""
        return n_kv + -n_kv % self.keys_multiple_of


def named(dtype: torch.dtype) -> str:
    """ "float16" for torch.float16."""
    return str(dtype).removeprefix("torch.")


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_frozen_dataclass(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and bool(getattr(value, "__dataclass_params__").frozen)  # noqa: B009


DECLARED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a text", lambda value: isinstance(value, str)),
    "summary": ("a text for `taylor-patch backends`", lambda value: isinstance(value, str) and bool(value)),
    "priority": ("a whole number", lambda value: isinstance(value, int) and not _is_bool(value)),
    "devices": ("a frozenset of texts", lambda value: isinstance(value, Set) and all(isinstance(device, str) for device in value)),
    "dtypes": (f"a frozenset of some of {', '.join(sorted(map(str, FLOATS)))}",
               lambda value: isinstance(value, Set) and bool(value) and value <= FLOATS),
    "head_dims": ("a range with something in it, such as range(64, 65)", lambda value: isinstance(value, range) and bool(value)),
    **dict.fromkeys(("key_masks", "gqa", "cross_attention", "needs_grid", "deterministic"), ("True or False", _is_bool)),
    "options_type": ("a frozen dataclass", _is_frozen_dataclass),
}
"""Attribute of a backend's class -> what it has to be."""


@cache
def load(subject: Subject) -> Backend | str:
    """The backend with its options, or what keeps it from being loaded."""
    def work() -> Backend:
        declarations = {d.name: d for d in declared(imported(subject.plugin))}
        if subject.name not in declarations:
            raise LookupError(f"it registers {', '.join(declarations) or 'no backend'}, not {subject.name}")
        kind = declarations[subject.name].load()
        layer = config.Layer("options", {"backends": {subject.name: subject.options}})
        return kind(config.merge([layer], {subject.name: kind.options_type}).options[subject.name])

    try:
        return within(subject.load_seconds, work, set_by="load_seconds=")
    except RAISED as error:
        return told(error)


@cache
def declaration_problem(subject: Subject) -> str | None:
    """What is wrong with the attributes of the class, or with what `unavailable` says."""
    backend = load(subject)
    assert isinstance(backend, Backend)
    for name, (what, fits) in DECLARED.items():
        if not fits(value := getattr(backend, name)):
            return f"{name} = {value!r} is not {what}"
    try:
        reasons_of(backend.unavailable)
    except Broken as problem:
        return str(problem)
    return None


def cannot_run(subject: Subject, backend: Backend) -> tuple[str, ...]:
    """Why the backend can run nothing here; empty where it can."""
    return backend.unavailable() + (() if subject.device in backend.devices else (f"it is not for {subject.device}",))


@cache
def plainest_problem(subject: Subject) -> str | None:
    """What is wrong with the plainest call, so that the tests of finer points need not say it again."""
    backend = load(subject)
    assert isinstance(backend, Backend)
    call = plain_call(subject, backend)
    try:
        reasons = reasons_of(backend.reasons_against, call)
        if impossible := cannot_run(subject, backend):
            unsaid = not reasons or not set(backend.unavailable()) <= set(reasons)
            return f"cannot run here ({'; '.join(impossible)}), but reasons_against says {reasons}" if unsaid else None
        if reasons:
            return f"refuses {PLAINEST} ({'; '.join(reasons)}); set options under which it runs"
        error_against_exact(finite(backend, call, subject.device), call, subject.max_error)
    except Broken as problem:
        return f"{PLAINEST}: {problem}"
    return None


def plain_dtype(backend: Backend) -> torch.dtype:
    """float32 where the backend has it."""
    return next(dtype for dtype in ROUNDING if dtype in backend.dtypes)


def plain_head_dim(backend: Backend) -> int:
    """64 where the backend has it."""
    return next((d for d in (64, 128, *HEAD_DIMS) if d in backend.head_dims), backend.head_dims[0])


def plain_call(subject: Subject, backend: Backend, **changes: Any) -> AttentionCall:
    """Two batch entries, two heads, about 150 tokens, contiguous, changed as make_call can."""
    dtype, head_dim = changes.pop("dtype", plain_dtype(backend)), changes.pop("head_dim", plain_head_dim(backend))
    changes.setdefault("text", subject.text(changes.get("grid", GRID)))
    return make_call(head_dim, dtype, subject.device, **changes)
