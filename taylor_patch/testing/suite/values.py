"""What the numbers are: large logits, values that are not finite, memory that nobody wrote, two runs, torch.compile."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from taylor_patch.backends.base import Backend, Fallback, not_finite
from taylor_patch.testing.cases import exact, large_logits, relative_error
from taylor_patch.testing.suite import attempt
from taylor_patch.testing.suite.attempt import RAISED, ROUNDING, Broken
from taylor_patch.testing.suite.checks import Checks
from taylor_patch.testing.suite.subject import PLAINEST

EXACT = 0.02
"""max_error up to which a backend has to be right on any input; one with more approximates."""


class Values(Checks):
    """Numbers that are not easy, and the same numbers again."""

    def test_large_logits_are_finite(self, backend: Backend) -> None:
        """Peaked rows and logits of some hundreds give finite values, or Fallback."""
        self.large(backend)

    def test_large_logits_are_accurate(self, backend: Backend) -> None:
        """The same call is right where max_error is at most 0.02, or gives Fallback."""
        if self.subject.max_error > EXACT:
            pytest.skip(f"max_error is above {EXACT}: an approximation")
        self.large(backend, max_error=self.subject.max_error)

    def large(self, backend: Backend, max_error: float = torch.inf) -> None:
        """A call with large logits, whose result is finite and within max_error."""
        call = large_logits(self.call(backend))
        try:
            out = attempt.attempt(backend, call, self.subject.device)
            if not bool(torch.isfinite(out).all()):
                raise Broken("returned values that are not finite")
            attempt.error_against_exact(out, call, max_error)
        except Fallback as reason:
            pytest.skip(f"falls back: {reason}")
        except Broken as problem:
            self.finding(f"large logits: {problem}")

    def test_what_is_noted_holds(self, backend: Backend) -> None:
        """A result that is not finite is not noted as finite (note_not_finite)."""
        call = self.call(backend)
        call.v[:, :, 0] = torch.nan
        try:
            out = backend.run(call)
        except RAISED:
            return  # exact attention answers such a call then
        if not bool(torch.isfinite(out).all()) and not bool(not_finite(out)):
            self.finding("notes with 0 that every value is finite (note_not_finite) where values are not")

    def test_every_output_is_written(self, backend: Backend) -> None:
        """Memory from torch.empty holds NaN: none of it may reach the result."""
        call = self.call(backend)
        plain = self.run(backend, call, PLAINEST)
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
        try:
            poisoned = self.run(backend, call, "memory from torch.empty filled with NaN")
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        # Memory from torch.empty may hold what an earlier call left there, NaN among it: then both results are wrong, and alike.
        limit = self.subject.max_error + ROUNDING[call.q.dtype]
        if relative_error(poisoned, plain.double()) > 1e-3 or relative_error(poisoned, exact(call)) > limit:
            self.finding("reads memory that it did not write (torch.empty)")

    def test_deterministic(self, backend: Backend) -> None:
        """The same call twice gives the same bits where deterministic is True."""
        if not backend.deterministic:
            pytest.skip("deterministic is False")
        call = self.call(backend)
        if not torch.equal(self.run(backend, call, PLAINEST), self.run(backend, call, "the same call again")):
            self.finding("declared deterministic, but two runs differ")

    def test_compiles(self, backend: Backend) -> None:
        """Inside torch.compile the result is the same; graph breaks are allowed."""
        call = self.call(backend)
        plain = self.run(backend, call, PLAINEST)
        torch._dynamo.reset()

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return backend.run(dataclasses.replace(call, q=q, k=k, v=v)) + 0

        try:
            compiled = torch.compile(attend, backend="aot_eager")(call.q, call.k, call.v)
        except RAISED as error:
            self.finding(f"cannot run inside torch.compile ({attempt.told(error)})")
        finally:
            torch._dynamo.reset()
        if (difference := relative_error(compiled, plain.double())) > 1e-3 + ROUNDING[call.q.dtype]:
            self.finding(f"gives another result inside torch.compile (relative difference {difference:.3g})")
