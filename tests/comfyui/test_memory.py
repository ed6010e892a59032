"""Why nothing is unloaded in a forward pass, with ComfyUI's real model management."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("free_memory.py")


def run(python, checkout, way, **settings):
    env = {**os.environ, "TAYLOR_PATCH": "near_far", "TAYLOR_PATCH_MIN_TOKENS": "64", "TAYLOR_PATCH_QUALITY_LIMIT": "0",
           "PYTHONDONTWRITEBYTECODE": "1", **settings}
    done = subprocess.run([python, SCRIPT, way], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_free_memory_in_a_forward_pass_moves_the_weights_in_use(patched_python, checkout):
    """What this package must never do: all weights are gone, the model is no longer loaded, the next layer fails."""
    found = run(patched_python, checkout, "in-forward")
    assert found["moved"] == 16 and found["loaded"] == 0 and found["error"] and not found["finite"]


@pytest.mark.parametrize("how", ["true", "false", "free_memory"])
def test_every_memory_reserve_leaves_them_alone(patched_python, checkout, how):
    found = run(patched_python, checkout, "plain", TAYLOR_PATCH_MEMORY_RESERVE=how)
    assert found["moved"] == 0 and found["error"] is None and found["finite"] and found["loaded"] == 1
    assert found["calls"] == {"near_far": 8}
    required, minimum = found["reserved"]
    assert required == minimum and (required > 1 << 20) == (how == "true") and required >= 0
