"""What quality checks and records cost in a sampling run: `python -m benchmarks.guard_cost [--out FILE]`. Needs a GPU.

A run of 20 steps with 57 attention calls each, as Flux makes them (24 heads of 128, bf16), goes through the hooks of ComfyUI's attention
and model evaluation with near_far. It is timed with the default settings and with quality_check = false, several times in turn; the rows
say how many milliseconds each took and what the checks add, in percent of the attention's time. One more evaluation runs with torch's
synchronization debug mode on: waits counts how often a call made the host wait (the one read at the evaluation's end is outside it).
"""

from __future__ import annotations

import argparse
import json
import statistics
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
from taylor_patch.hooks.attention import replace
from taylor_patch.hooks.evaluation import apply_model

STEPS, CALLS, REPEATS = 20, 57, 3
LATENTS = {16_896: (1, 16, 264, 256), 33_280: (1, 16, 416, 320)}


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int, **kwargs: Any) -> Tensor:
    """Stands where ComfyUI's function stands."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def a_run(settings: dict[str, Any], n: int, qkv: list[Tensor], steps: int = STEPS, debug: bool = False) -> tuple[float, float, int]:
    """(ms of the whole run, ms in the backend, waits of the host within calls)."""
    engines.use(engines.Engine({"taylor_patch": {"backend": "near_far", "log": "off", **settings},
                                "backends": {"near_far": {"density": 0.05}}}, environ={}))
    attention = replace(exact)
    model = types.SimpleNamespace(diffusion_model=types.SimpleNamespace(patch_size=2))
    sigmas = torch.linspace(1, 0, steps + 1)
    caught: list[Any] = []

    def evaluate(x: Tensor, t: Tensor) -> Tensor:
        options = {"sigmas": t, "block_type": "double"}
        torch.cuda.set_sync_debug_mode("warn" if debug else "default")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for block in range(CALLS):
                attention(*qkv, 24, transformer_options={**options, "block_index": block})
        torch.cuda.set_sync_debug_mode("default")
        caught.extend(w for w in seen if "synchroniz" in str(w.message))
        return x

    x = torch.zeros(LATENTS[n], device="cuda")
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode(), engines.engine().run(sigmas.tolist()) as run:
        for sigma in sigmas[:-1]:
            apply_model(evaluate, model, (x, sigma.reshape(1)), {})
        torch.cuda.synchronize()
        spent = (time.perf_counter() - start) * 1000
        assert not run.tally.fallbacks, run.tally.fallbacks
    last = engines.engine().last_run
    assert last is not None
    return spent, last.milliseconds["near_far"], len(caught)


def main() -> None:
    """Measure, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=record.RESULTS / "guard_cost-h200.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    for n in LATENTS:
        qkv = [torch.randn(1, n, 24 * 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        kinds: dict[str, dict[str, Any]] = {"default": {"quality_limit": 0}, "off": {"quality_limit": 0, "quality_check": False}}
        for settings in kinds.values():
            a_run(settings, n, qkv, steps=2)
        _, _, waits = a_run(kinds["default"], n, qkv, steps=1, debug=True)
        spent = {kind: [a_run(settings, n, qkv)[:2] for settings in [settings] * REPEATS] for kind, settings in kinds.items()}
        total = {kind: statistics.median(run for run, _ in runs) for kind, runs in spent.items()}
        attention = statistics.median(backend for _, backend in spent["off"])
        row = {"n": n, "h": 24, "d": 128, "steps": STEPS, "calls_a_step": CALLS, "default_ms": round(total["default"], 2),
               "without_checks_ms": round(total["off"], 2), "attention_ms": round(attention, 2),
               "checks_percent": round(100 * (total["default"] - total["off"]) / attention, 2),
               "records_percent": round(100 * (total["off"] - attention) / attention, 2), "waits": waits, **environment}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
