"""Fresh interpreters: what start-up imports."""

import subprocess
import sys

import pytest

HEAVY = "[name for name in ('torch', 'wrapt', 'pluggy', 'taylor_patch.startup') if name in sys.modules]"


@pytest.mark.parametrize("value", [None, "", "0"], ids=["unset", "empty", "zero"])
def test_off_imports_nothing(value, monkeypatch):
    if value is not None:
        monkeypatch.setenv("TAYLOR_PATCH", value)
    code = f"import sys, taylor_patch; taylor_patch._startup(); print({HEAVY})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_on_registers_hooks_and_imports_no_torch(monkeypatch):
    monkeypatch.setenv("TAYLOR_PATCH", "1")
    code = f"import sys; print({HEAVY}, sys.modules['taylor_patch.startup'].registered)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['wrapt', 'taylor_patch.startup'] True", out.stderr
