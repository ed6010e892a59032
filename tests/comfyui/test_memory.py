"""What a prediction reads from ComfyUI's real models, and, with its real model management, why nothing is unloaded in a forward pass."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from .conftest import NODES

HEADS, FREE_MEMORY = (Path(__file__).with_name(name) for name in ("heads.py", "free_memory.py"))


def run(python, checkout, *command, **settings):
    """The last line that a script prints in the checkout, from JSON."""
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **settings}
    done = subprocess.run([python, *command], cwd=checkout, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


# Of the tiny models in nodes/families.py: heads, head_dim, down-sampling. The others have 2 heads of 128.
TINY = {"sd15": [2, 32, 1], "sdxl": [2, 64, 2], "sd3": [2, 64, 1], "lumina2": [2, 96, 1], "ltxv": [2, 64, 1], "auraflow": [1, 256, 1],
        "kandinsky5": [2, 64, 1]}


def test_heads_are_found_in_every_family(patched_python, checkout):
    found = run(patched_python, checkout, HEADS, NODES)
    assert len(found) >= 16 and found == {name: TINY.get(name, [2, 128, 1]) for name in found}


ON = {"TAYLOR_PATCH": "near_far", "TAYLOR_PATCH_MIN_TOKENS": "64", "TAYLOR_PATCH_QUALITY_LIMIT": "0"}


def test_free_memory_in_a_forward_pass_moves_the_weights_in_use(patched_python, checkout):
    """What this package must never do: all weights are gone, the model is no longer loaded, the next layer fails."""
    found = run(patched_python, checkout, FREE_MEMORY, "in-forward", **ON)
    assert found["moved"] == 16 and found["loaded"] == 0 and found["error"] and not found["finite"]


@pytest.mark.parametrize("how", ["true", "false", "free_memory"])
def test_every_memory_reserve_leaves_them_alone(patched_python, checkout, how):
    found = run(patched_python, checkout, FREE_MEMORY, "plain", **ON, TAYLOR_PATCH_MEMORY_RESERVE=how)
    assert found["moved"] == 0 and found["error"] is None and found["finite"] and found["loaded"] == 1
    assert found["calls"] == {"near_far": 8}
    required, minimum = found["reserved"]
    assert required == minimum and (required > 1 << 20) == (how == "true") and required >= 0
