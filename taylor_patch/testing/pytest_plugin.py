"""pytest loads this where taylor-patch is installed: at the end of a run it prints what the conformance suite measured."""

from __future__ import annotations

from typing import Any

measured: dict[str, dict[str, str]] = {}
"""Backend -> what was measured -> value with its unit; the suite fills it."""


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """See pytest."""
    if measured:
        terminalreporter.section("taylor_patch conformance: measured")
    for backend, values in measured.items():
        terminalreporter.write_line(f"{backend}: " + ", ".join(f"{what} {value}" for what, value in values.items()))
