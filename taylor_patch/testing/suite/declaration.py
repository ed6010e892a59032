"""What a backend says of itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from taylor_patch.backends.base import Backend
from taylor_patch.testing.cases import changed
from taylor_patch.testing.suite import subject
from taylor_patch.testing.suite.attempt import RAISED
from taylor_patch.testing.suite.checks import Checks

POSITIONS = {"block": (0, 1, 2), "step": (0, 1), "sigma": (0.0, 0.5, 14.6)}
"""Field of a call -> values that it has in a sampling run."""


class Declaration(Checks):
    """The import, the attributes, the plainest call, and refusals."""

    def test_loads(self) -> None:
        """The plugin is imported in time, and registers the backend, which is what its declaration says."""
        if isinstance(problem := subject.load(self.subject), str):
            self.finding(f"the plugin cannot be loaded: {problem}")

    def test_declaration(self, loaded: Backend) -> None:
        """Attributes are of the right types, and unavailable() gives texts."""
        if problem := subject.declaration_problem(self.subject):
            self.finding(problem)

    def test_plainest_call(self, loaded: Backend) -> None:
        """Two batch entries, two heads, about 150 tokens, contiguous: accepted, and right; refused where it cannot run here."""
        if subject.declaration_problem(self.subject):
            pytest.skip("see test_declaration")
        if problem := subject.plainest_problem(self.subject):
            self.finding(problem)
        if impossible := subject.cannot_run(self.subject, loaded):
            pytest.skip(f"cannot run here: {'; '.join(impossible)}")

    def test_mixed_dtypes_are_refused(self, backend: Backend) -> None:
        """k of another dtype than q."""
        call = self.call(backend)
        other = torch.float16 if call.q.dtype == torch.float32 else torch.float32
        self.both_ways(backend, dataclasses.replace(call, k=call.k.to(other)), False, "k of another dtype than q")

    def test_empty_input_is_refused(self, backend: Backend) -> None:
        """No tokens at all."""
        call = self.call(backend)
        empty = dataclasses.replace(changed(call, lambda x: x[:, :, :0]), grid=None)
        self.both_ways(backend, empty, False, "empty input")

    def test_other_devices_are_refused(self, backend: Backend) -> None:
        """A device that is not declared ("meta")."""
        if not self.refusal(backend, changed(self.call(backend), lambda x: x.to("meta")), "tensors on another device"):
            self.finding("accepts tensors on a device that it does not declare")

    def test_reasons_are_the_same_for_every_block(self, backend: Backend) -> None:
        """reasons_against is asked once for calls of one shape, so block, step and sigma must not matter."""
        call = self.call(backend)
        plain = self.refusal(backend, call, subject.PLAINEST)
        for name, values in POSITIONS.items():
            for value in values:
                position: dict[str, Any] = {name: value}
                reasons = self.refusal(backend, dataclasses.replace(call, **position), f"call.{name} = {value}")
                if reasons != plain:
                    self.finding(f"reasons_against depends on call.{name}: {reasons} at {value}, {plain} without. It is asked once for calls "
                                 "of one shape; raise Fallback in run")

    def test_reasons_and_workspace_read_shapes_only(self, backend: Backend) -> None:
        """Neither reads values: both work on tensors that have none."""
        call, mode = self.call(backend), FakeTensorMode()
        try:
            backend.workspace_nbytes(call)
        except RAISED:
            pytest.skip("see test_workspace")
        fake = changed(call, mode.from_tensor)
        with mode:
            try:
                backend.reasons_against(fake)
                backend.workspace_nbytes(fake)
            except RAISED as error:
                self.finding(f"reasons_against or workspace_nbytes reads the values of tensors ({type(error).__name__})")
