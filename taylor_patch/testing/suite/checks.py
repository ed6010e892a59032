"""What the tests of all subjects share: the backend, calls for it, and findings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NoReturn

import pytest
from torch import Tensor

from taylor_patch.backends.base import Backend
from taylor_patch.call import AttentionCall
from taylor_patch.testing.suite import attempt, subject
from taylor_patch.testing.suite.attempt import Broken
from taylor_patch.testing.suite.subject import Subject

broke: dict[str, str] = {}
"""Device -> the test after which it could be used no more in this process."""


class Checks:
    """Fixtures and checks. Findings begin with the backend's name."""

    subject: ClassVar[Subject]

    def finding(self, text: str) -> NoReturn:
        """Fail with one line, without the exception that it may come from."""
        raise pytest.fail.Exception(f'backend "{self.subject.name}": {text}', pytrace=False) from None

    @pytest.fixture(autouse=True)
    def device_survives(self, request: pytest.FixtureRequest) -> Iterator[None]:
        """A test that leaves the device unusable gets the finding; the tests after it, of other backends too, say nothing of theirs."""
        if self.subject.device in broke:
            pytest.skip(f"not run: {broke[self.subject.device]} left device {self.subject.device} unusable")
        yield
        if error := attempt.device_error(self.subject.device):
            broke[self.subject.device] = request.node.nodeid
            self.finding(f"{request.node.name} left device {self.subject.device} unusable for the rest of the process ({error})")

    @pytest.fixture
    def loaded(self) -> Backend:
        """The backend; skips where test_loads fails."""
        backend = subject.load(self.subject)
        if isinstance(backend, str):
            pytest.skip("see test_loads")
        return backend

    @pytest.fixture
    def backend(self, loaded: Backend) -> Backend:
        """A backend that no other test has called; skips where test_declaration or test_plainest_call fails, or it cannot run here."""
        if subject.declaration_problem(self.subject):
            pytest.skip("see test_declaration")
        if subject.plainest_problem(self.subject) or subject.cannot_run(self.subject, loaded):
            pytest.skip("see test_plainest_call")
        return type(loaded)(loaded.options)

    def call(self, backend: Backend, **changes: Any) -> AttentionCall:
        """The plain call of this backend, changed."""
        return subject.plain_call(self.subject, backend, **changes)

    def run(self, backend: Backend, call: AttentionCall, what: str) -> Tensor:
        """The result for a call that the backend accepted: of the right form, finite, and the inputs as they were."""
        try:
            return attempt.finite(backend, call, self.subject.device)
        except Broken as problem:
            self.finding(f"{what}: {problem}")

    def check(self, backend: Backend, call: AttentionCall, what: str) -> float:
        """Run an accepted call and compare with exact attention; the relative error."""
        out = self.run(backend, call, what)
        try:
            return attempt.error_against_exact(out, call, self.subject.max_error)
        except Broken as problem:
            self.finding(f"{what}: {problem}")

    def refusal(self, backend: Backend, call: AttentionCall, what: str) -> tuple[str, ...]:
        """reasons_against, checked for its form."""
        try:
            return attempt.reasons_of(backend.reasons_against, call)
        except Broken as problem:
            self.finding(f"{what}: {problem}")

    def right_or_refused(self, backend: Backend, call: AttentionCall, what: str) -> None:
        """What the backend accepts it does right."""
        if not self.refusal(backend, call, what):
            self.check(backend, call, what)

    def both_ways(self, backend: Backend, call: AttentionCall, does: bool, what: str) -> None:
        """What is declared is done right, what is not is refused."""
        reasons = self.refusal(backend, call, what)
        if does and reasons:
            self.finding(f"{what}: declared, but refused ({'; '.join(reasons)})")
        if not does and not reasons:
            self.finding(f"{what}: not declared, but accepted; reasons_against must give a reason")
        if does:
            self.check(backend, call, what)
