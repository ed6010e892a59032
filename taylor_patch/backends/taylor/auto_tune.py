"""auto_tune: a seeded random search for qk_norm_power, qk_norm_clip and scale_mul in the first steps of a run.

Candidates are scored on a few query rows against a part of the keys, by the polynomial of the logits itself: no features are made, and
nothing is read from the device before the search ends. While it lasts attention is exact. What it finds holds for the run, and is kept
on disk for the next run of such a model at such a size.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import random
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from taylor_patch import cache
from taylor_patch.backends.base import Fallback, expand_kv
from taylor_patch.backends.taylor.options import TUNED
from taylor_patch.backends.taylor.polynomial import polynomial
from taylor_patch.call import AttentionCall
from taylor_patch.options import problems_of

if TYPE_CHECKING:
    from taylor_patch.backends.taylor.base import TaylorBackend

    AnyTaylor = TypeVar("AnyTaylor", bound=TaylorBackend)

log = logging.getLogger("taylor_patch")

KIND = "auto_tune"
DENOMINATOR_PENALTY = 10.0
"""Added to a candidate's error for every denominator not above eps, as a fraction of all."""
WORST = 1e4
"""The error of a candidate whose result is not finite, and the largest that counts."""


def settle(backend: AnyTaylor, call: AttentionCall) -> AnyTaylor:
    """The backend with the options that are in force for `call`. Raises Fallback while they are looked for."""
    o = backend.options
    unknown = call.memo is None or call.step is None
    gated = bool(o.qk_norm_sigma_max) and call.sigma is not None and call.sigma > o.qk_norm_sigma_max
    if unknown or gated:
        return backend
    return _search(backend, call).settle(call)


def settled(backend: AnyTaylor, call: AttentionCall) -> AnyTaylor:
    """The backend with the options that are in force for `call`, as far as they are known."""
    search = None if call.memo is None else call.memo.get(_name(backend, call))
    return backend if search is None or search.chosen is None else search.chosen


def _name(backend: TaylorBackend, call: AttentionCall) -> tuple[Any, ...]:
    return KIND, backend.name, call.q.shape, call.k.shape, call.q.dtype, call.q.device


def _search(backend: AnyTaylor, call: AttentionCall) -> Search:
    assert call.memo is not None
    name = _name(backend, call)
    if name not in call.memo:
        call.memo.setdefault(name, Search(backend, call))
    return call.memo[name]


class Search:
    """The search for one shape of call in one run. chosen: the backend with the best options, once they are known."""

    def __init__(self, backend: TaylorBackend, call: AttentionCall) -> None:
        o = backend.options
        chance = random.Random(o.auto_tune_seed)
        ranges = [(getattr(o, f"auto_tune_{name}_min"), getattr(o, f"auto_tune_{name}_max")) for name in TUNED]
        drawn = [{name: round(chance.uniform(*bounds), 4) for name, bounds in zip(TUNED, ranges, strict=True)}
                 for _ in range(o.auto_tune_candidates)]
        self._configured = {name: getattr(o, name) for name in TUNED}
        self._backend, self._values = backend, [self._configured, *drawn]
        self._candidates = [backend.with_options(auto_tune=False, **values) for values in self._values]
        self._first_step: int | None = None
        self._scores: Tensor | None = None
        self._calls = 0
        self._key = self._place(call)
        self.chosen: Any = self._kept()

    def settle(self, call: AttentionCall) -> Any:
        """The chosen backend; in the first steps every call scores the candidates instead, and Fallback is raised."""
        if self.chosen is not None:
            return self.chosen
        assert call.step is not None
        if self._first_step is None:
            self._first_step = call.step
        if self._scores is not None and call.step >= self._first_step + self._backend.options.auto_tune_steps:
            self._choose(call)
            return self.chosen
        self._add(call)
        raise Fallback("auto_tune: exact while it searches")

    def _add(self, call: AttentionCall) -> None:
        found = scores(self._candidates, call)
        self._scores = found if self._scores is None else self._scores + found
        self._calls += 1

    def _choose(self, call: AttentionCall) -> None:
        """The one read from the device."""
        assert self._scores is not None
        means = [score / self._calls for score in self._scores.tolist()]
        best = min(range(len(means)), key=means.__getitem__)
        values = self._values[best]
        log.info("taylor_patch: %s: auto_tune: %s for q %s: score %.3g, as configured %.3g (%d calls)", self._backend.name,
                 ", ".join(f"{name} {value:g}" for name, value in values.items()), list(call.q.shape), means[best], means[0], self._calls)
        self.chosen = self._candidates[best]
        if self._key is not None:
            cache.store(KIND, self._key, {**values, "score": means[best]})

    def _place(self, call: AttentionCall) -> dict[str, cache.Scalar] | None:
        """What the choice is filed under on disk: such calls, this backend and all its options."""
        place = cache.place(call)
        if place is None:
            return None
        options = hashlib.sha256(repr(self._backend.options).encode()).hexdigest()[:16]
        return {**place, "backend": self._backend.name, "options": options}

    def _kept(self) -> TaylorBackend | None:
        """The backend with the values that an earlier run has settled; None where there are none, or none that can be used."""
        found = None if self._key is None else cache.load(KIND, self._key)
        if found is None or not all(isinstance(found.get(name), int | float) and math.isfinite(found[name]) for name in TUNED):
            return None
        kept = self._backend.with_options(auto_tune=False, **{name: float(found[name]) for name in TUNED})
        return None if problems_of(kept.options) else kept


@torch.no_grad()
def scores(candidates: list[Any], call: AttentionCall) -> Tensor:
    """[candidates] float32 on the device: relative L2 error against attention on the unmodified q, k, and the denominators' penalty.

    On auto_tune_quality_samples query rows and at most auto_tune_max_tokens keys, evenly spread.
    """
    o = candidates[0].options
    part = _part(call, o.auto_tune_quality_samples, o.auto_tune_max_tokens)
    logits = call.scale * part.q @ part.k.transpose(-1, -2)
    mask = 0.0 if part.key_mask is None else part.key_mask[:, None, None]
    exact = torch.softmax(logits + mask, -1) @ part.v
    size = torch.linalg.vector_norm(exact).clamp_min(torch.finfo(torch.float32).tiny)
    found = []
    for candidate in candidates:
        out, denominators = polynomial(candidate, part)
        error = torch.linalg.vector_norm(out - exact) / size
        bad = (~(denominators > o.eps)).float().mean()
        found.append(error.nan_to_num(WORST, WORST).clamp_max(WORST) + DENOMINATOR_PENALTY * bad)
    return torch.stack(found)


def _part(call: AttentionCall, rows: int, keys: int) -> AttentionCall:
    """Some rows and keys of a call in float32, a key head for every query head."""
    def some(total: int, count: int) -> Tensor:
        count = min(count, total)
        return torch.arange(count, device=call.q.device) * total // count

    heads, kept = call.q.shape[1], some(call.k.shape[2], keys)
    k, v = (expand_kv(x[:, :, kept], heads).float() for x in (call.k, call.v))
    return dataclasses.replace(call, q=call.q[:, :, some(call.q.shape[2], rows)].float(), k=k, v=v,
                               key_mask=None if call.key_mask is None else call.key_mask[:, kept])
