"""Plugins in a real, headless ComfyUI on the CPU: chosen by a rule, switched off without a restart, and broken in six ways."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.broken_skeleton import BREAKS, UNSEEN, write_broken

from .conftest import ROOT, latent, our_lines, workflow


@pytest.fixture(scope="module")
def plain(tmp_path_factory, checkout, plain_python):
    """The latent of a server that has no taylor_patch."""
    from taylor_patch.demo.comfyui.server import Server

    from .conftest import NODES

    with Server(checkout, tmp_path_factory.mktemp("plain"), plain_python, nodes=[NODES],
                env={"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}) as server:
        return latent(server, workflow("flux"))


def installed(project, folder):
    """Build the wheel of `project` and unpack it into `folder`, for PYTHONPATH."""
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", project], check=True,
                   capture_output=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *(folder / "dist").glob("*.whl")],
                   check=True, capture_output=True)
    return str(folder)


def summaries(server):
    return [line for line in our_lines(server) if line.startswith("taylor_patch: Flux:")]


def test_example_is_chosen_by_a_rule_and_switched_off_without_a_restart(start, patched_python, plain, tmp_path):
    config = tmp_path / "rules.toml"
    rule = '[taylor_patch]\nmin_tokens = 64\n\n[[rules]]\nwhen = {{ model = "flux*", kind = "self" }}\nbackend = "{}"\n'
    config.write_text(rule.format("chunked"))
    env = {"PYTHONPATH": installed(ROOT / "plugins" / "taylor-patch-example", tmp_path / "site"), "TAYLOR_PATCH": "1",
           "TAYLOR_PATCH_CONFIG": str(config)}
    with start(patched_python, env) as server:
        first = latent(server, workflow("flux"))
        config.write_text(rule.format("sdpa") + "\n")
        second = latent(server, workflow("flux", seed=6))
        config.write_text(rule.format("chunked"))
        third = latent(server, workflow("flux"))
    torch.testing.assert_close(first, plain, atol=1e-3, rtol=1e-3)
    assert bool(second.isfinite().all()) and torch.equal(first, third)
    one, two, three = summaries(server)
    assert re.search(r"chunked [1-9]", one) and "chunked" not in two and 'backend = "sdpa"' in two and re.search(r"chunked [1-9]", three)
    assert len([line for line in our_lines(server) if "configuration reloaded" in line]) == 2


@pytest.mark.parametrize("kind", BREAKS)
def test_a_broken_skeleton_costs_a_line(start, patched_python, plain, tmp_path, kind):
    how = BREAKS[kind]
    env = {"PYTHONPATH": installed(write_broken(kind, tmp_path / "demo"), tmp_path / "site"), "TAYLOR_PATCH_PLUGIN_SECONDS": "3",
           "TAYLOR_PATCH_MIN_TOKENS": "64", "TAYLOR_PATCH": "1" if how.test == "test_loads" else "demo_backend"}
    with start(patched_python, env) as server:
        made = latent(server, workflow("flux"))
    if kind in UNSEEN:
        torch.testing.assert_close(made, plain, atol=1e-3, rtol=1e-3)
    else:
        assert torch.equal(made, plain)
    assert len(summaries(server)) == 1 and len([line for line in our_lines(server) if how.log in line]) == 1, our_lines(server)
