"""The plugins of plugins/ as wheels in a fresh virtual environment, which holds no torch and no kernel library."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.test_packaging import make, pip

pytestmark = pytest.mark.packaging
BACKENDS = {"example": ["chunked"], "sage": ["sage"], "kitchen": ["kitchen_int8", "kitchen_sol"]}


def build(project, folder):
    words = ["-m", "build", "--wheel", "--no-isolation", "--outdir", folder, project]
    subprocess.run([sys.executable, *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def python(tmp_path_factory, wheel):
    """An interpreter with taylor-patch, what its commands import, and the three plugins."""
    folder = tmp_path_factory.mktemp("plugins")
    built = folder / "dist"
    for name in BACKENDS:
        build(ROOT / "plugins" / f"taylor-patch-{name}", built)
    return make(folder / "venv", ["wrapt", "pluggy", "click", "platformdirs"], [wheel], sorted(built.glob("*.whl")))


def command(python, *words):
    return subprocess.run([python, "-m", "taylor_patch", *words], check=True, capture_output=True, text=True, timeout=60).stdout


def test_plugins_are_listed(python):
    rows = {row["name"]: row for row in json.loads(command(python, "plugins", "--json"))}
    assert {name: rows[name]["backends"] for name in BACKENDS} == BACKENDS
    assert all(row["error"] is None and row["notes"] == [] for row in rows.values())


def test_backends_are_listed_with_what_they_lack(python):
    rows = {row["name"]: row["reasons_against"] for row in json.loads(command(python, "backends", "--json"))}
    assert {"near_far", "taylor_torch", "sdpa", "chunked"} <= {name for name, reasons in rows.items() if not reasons}
    assert rows["sage"] == ["sageattention is not installed", "triton is not installed"]
    assert rows["kitchen_int8"] == rows["kitchen_sol"] == ["comfy_kitchen is not installed"]


def test_a_skeleton_installs(python, tmp_path):
    from taylor_patch.cli.skeleton import write

    write("demo-backend", tmp_path / "demo")
    build(tmp_path / "demo", tmp_path)
    pip(python, "install", "--no-deps", "--no-index", "--target", tmp_path / "elsewhere", *tmp_path.glob("*.whl"))
    found = subprocess.run([python, "-m", "taylor_patch", "plugins", "--json"], check=True, capture_output=True, text=True,
                           env={"PYTHONPATH": str(tmp_path / "elsewhere")}).stdout
    assert {"name": "demo_backend", "origin": "taylor_patch_demo_backend:Plugin", "backends": ["demo_backend"], "error": None,
            "disallowed": False, "notes": []} in json.loads(found)
