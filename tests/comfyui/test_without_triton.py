"""The Triton backends of global Taylor in a real, headless ComfyUI on the CPU without Triton: the run goes on, and the log says why."""

from __future__ import annotations

import re

import torch

from .conftest import latent, our_lines, workflow

NO_TRITON = 'import sys\nsys.modules["triton"] = None\n'
"""sitecustomize.py: to Python, Triton is then not installed."""
REASONS = ("Triton is not installed", "no CUDA device", "device cpu")


def test_the_run_goes_on_and_the_log_says_why(start, patched_python, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NO_TRITON)
    config, made = tmp_path / "mine.toml", {}
    config.touch()
    env = {"PYTHONPATH": str(tmp_path), "TAYLOR_PATCH": "1", "TAYLOR_PATCH_CONFIG": str(config), "TRITON_INTERPRET": "0"}
    with start(patched_python, env) as server:
        for backend in ("sdpa", "triton_full", "triton_fused"):
            config.write_text(f'[taylor_patch]\nbackend = "{backend}"\nmin_tokens = 64\n')
            made[backend] = latent(server, workflow("flux"))
    exact, *others = made.values()
    assert bool(exact.isfinite().all()) and all(torch.equal(other, exact) for other in others)
    first, *lines = [line for line in our_lines(server) if line.startswith("taylor_patch: Flux: 3 model evaluations")]
    calls = re.search(r"attention calls: exact (\d+)", first)[1]
    for backend, line in zip(("triton_full", "triton_fused"), lines, strict=True):
        because = "; ".join(f"{backend}: {reason}" for reason in REASONS)
        assert f"attention calls: exact {calls} (exact because: {because}: {calls})" in line, line
