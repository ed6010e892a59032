"""The tests of taylor_patch.testing.conformance, by subject."""

from __future__ import annotations

from taylor_patch.testing.suite.declaration import Declaration
from taylor_patch.testing.suite.forms import Forms
from taylor_patch.testing.suite.masks import Masks
from taylor_patch.testing.suite.state import State
from taylor_patch.testing.suite.subject import Subject
from taylor_patch.testing.suite.values import Values

__all__ = ["Conformance", "Subject"]


class Conformance(State, Values, Masks, Forms, Declaration):  # pytest runs the tests of the last base first
    """What docs/writing-a-backend.md asks of a backend. Findings begin with the backend's name."""
