"""What quality checks and records cost in a sampling run: `python -m benchmarks.guard_cost [--out FILE]`. Needs a GPU.

A run of 20 steps with 57 attention calls each, as Flux makes them (24 heads of 128, bf16), goes through the hooks of ComfyUI's attention
and model evaluation with near_far. Before each call the device makes one matrix product of a Flux block, so that, as in a model, the
device is what a run waits for. It is timed with the default settings, with quality_check = false, and without any hook (near_far called
by itself), several times in turn. checks_percent and records_percent say what the guard and what all else adds, in percent of the
attention's time. That the first run of a model at a size times two calls of exact attention is not in it: the warm-up has done that. One
more evaluation runs with torch's synchronization debug mode on: waits counts how often a call made the host wait (the one read at the
evaluation's end is outside it).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from taylor_patch import engine as engines
from taylor_patch.backends.near_far import NearFar, NearFarOptions
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.hooks.attention import replace
from taylor_patch.hooks.evaluation import apply_model

STEPS, CALLS, REPEATS = 20, 57, 3
LATENTS = {16_896: (1, 16, 264, 256), 33_280: (1, 16, 416, 320)}
DENSITY = 0.05
ROWS, WIDTH = 16_896, 3072
"""The product before each call: [ROWS, WIDTH] with [WIDTH, 4 WIDTH]."""


class Device:
    """Inputs of one size, and what the device does between two calls."""

    def __init__(self, n: int) -> None:
        self.qkv = [torch.randn(1, n, 24 * 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        self.latent = torch.zeros(LATENTS[n], device="cuda")
        self._left = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)
        self._right = torch.randn(WIDTH, 4 * WIDTH, device="cuda", dtype=torch.bfloat16)

    def work(self) -> None:
        """The matrix product."""
        self._left @ self._right


class Model(torch.nn.Linear):
    """Has parameters, as the fingerprint wants, and Flux's patch size."""

    patch_size = 2


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """Stands where ComfyUI's function stands."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def hooked(settings: dict[str, Any], device: Device, steps: int = STEPS, debug: bool = False) -> tuple[float, float, int]:
    """(ms of the whole run, ms in the backend, waits of the host within calls)."""
    engines.use(engines.Engine({"taylor_patch": {"backend": "near_far", "log": "off", "quality_limit": 0, **settings},
                                "backends": {"near_far": {"density": DENSITY}}}, environ={}))
    attention = replace(exact)
    model = types.SimpleNamespace(diffusion_model=Model(1, 1))
    sigmas = torch.linspace(1, 0, steps + 1)
    caught: list[Any] = []

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        options = {"sigmas": t, "block_type": "double"}
        torch.cuda.set_sync_debug_mode("warn" if debug else "default")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for block in range(CALLS):
                device.work()
                attention(*device.qkv, 24, transformer_options={**options, "block_index": block})
        torch.cuda.set_sync_debug_mode("default")
        caught.extend(w for w in seen if "synchroniz" in str(w.message))
        return x

    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode(), engines.engine().run(sigmas.tolist()) as run:
        for sigma in sigmas[:-1]:
            apply_model(evaluate, model, (device.latent, sigma.reshape(1)), {})
        torch.cuda.synchronize()
        spent = (time.perf_counter() - start) * 1000
        assert not run.tally.fallbacks, run.tally.fallbacks
    last = engines.engine().last_run
    assert last is not None
    return spent, last.milliseconds["near_far"], len(caught)


def bare(device: Device) -> float:
    """ms of as many calls of near_far without anything around them."""
    backend = NearFar(NearFarOptions(density=DENSITY))
    latent = device.latent.shape
    grid = TokenGrid(1, latent[2] // 2, latent[3] // 2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        for _ in range(STEPS * CALLS):
            device.work()
            q, k, v = (x.unflatten(-1, (24, -1)).transpose(1, 2) for x in device.qkv)
            backend.run(AttentionCall(q, k, v, 128**-0.5, grid=grid)).transpose(1, 2).flatten(2)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1000


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "guard_cost-h200.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["XDG_CACHE_HOME"] = folder
        for n in LATENTS:
            device = Device(n)
            off = {"quality_check": False}
            for settings in ({}, off):
                hooked(settings, device, steps=2)
            _, _, waits = hooked({}, device, steps=1, debug=True)
            runs = [(hooked({}, device)[0], *hooked(off, device)[:2], bare(device)) for _ in range(REPEATS)]
            default, without, attention, alone = (statistics.median(column) for column in zip(*runs, strict=True))
            row = {"n": n, "h": 24, "d": 128, "steps": STEPS, "calls_a_step": CALLS, "default_ms": round(default, 2),
                   "without_checks_ms": round(without, 2), "bare_ms": round(alone, 2), "attention_ms": round(attention, 2),
                   "checks_percent": round(100 * (default - without) / attention, 2),
                   "records_percent": round(100 * (without - alone) / attention, 2), "waits": waits, **environment}
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
