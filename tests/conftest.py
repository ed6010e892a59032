"""Fixtures: isolated configuration, and the stand-in for ComfyUI with taylor_patch installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
if not torch.cuda.is_available():
    # Read when triton is imported, which torch._dynamo does: kernels then run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"

import taylor_patch
from taylor_patch import engine as engines

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT], check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """No configuration but what the test writes; fixed seed; no engine left over."""
    for name in list(os.environ):
        if name.startswith("TAYLOR_PATCH"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    engines.reset()
    yield tmp_path
    engines.reset()


@pytest.fixture
def configure(tmp_path):
    """Write ./taylor_patch.toml and forget the engine."""
    def write(text: str) -> Path:
        path = tmp_path / "taylor_patch.toml"
        path.write_text(text, encoding="utf-8")
        engines.reset()
        return path

    return write


@pytest.fixture
def comfy():
    """The stand-in for ComfyUI, patched."""
    import fake_comfy

    host = fake_comfy.Host()
    try:
        taylor_patch.install()
        yield host
    finally:
        taylor_patch.uninstall()
        host.remove()
