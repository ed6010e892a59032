"""Every test starts without configuration, without TAYLOR_PATCH variables and with a fresh engine."""

import os

import pytest

from taylor_patch import engine


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("TAYLOR_PATCH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    engine.reset()
    yield
    engine.reset()
