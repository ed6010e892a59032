"""What taylor_patch costs where it does nothing: start-up while off, and calls that go to the original function.

    python -m benchmarks.overhead
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks import record
from taylor_patch import engine as engines
from taylor_patch.hooks.attention import replace
from taylor_patch.run import describe, evaluation

CALLS, REPEATS = 20_000, 15


class Model:
    """Stands where ComfyUI's model stands."""

    diffusion_model = None


def original(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, **kwargs: Any) -> None:
    """An attention function that costs nothing."""


def nanoseconds(function: Callable[[], object]) -> float:
    """Nanoseconds of one call: the least of REPEATS means over CALLS calls."""
    return min(timeit.repeat(function, number=CALLS, repeat=REPEATS)) / CALLS * 1e9


def call_rows() -> list[dict[str, Any]]:
    """Added time of a call that goes to the original, by the way it takes."""
    x = torch.zeros(1, 512, 256)
    patched, sampling = replace(original), {"sigmas": torch.ones(1), "block_index": 3, "block_type": "double"}
    ways: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "outside sampling": ({}, {}),
        "no transformer_options": ({}, {}),
        "nested": ({}, {"_inside_attn_wrapper": True, "transformer_options": sampling}),
        "disabled": ({"enabled": False}, {"transformer_options": sampling}),
        "under min_tokens": ({"backend": "near_far", "min_tokens": 1024}, {"transformer_options": sampling}),
        "override": ({"backend": "near_far"}, {"transformer_options": {**sampling, "optimized_attention_override": original}}),
        "refused by the backend": ({"backend": "near_far"}, {"transformer_options": sampling}),
        "automatic, not faster here": ({}, {"transformer_options": sampling}),
    }
    rows = []
    for name, (settings, kwargs) in ways.items():
        engine = engines.Engine({"taylor_patch": {**settings, "log": "off"}}, environ={})
        engines.use(engine)
        # ComfyUI samples in inference mode.
        with torch.inference_mode(), engine.run([1.0, 0.0]) as run, evaluation(describe(run, Model(), (1, 4, 64, 64), 1.0)):
            base = nanoseconds(partial(original, x, x, x, 4, **kwargs))
            ours = nanoseconds(partial(patched, x, x, x, 4, **kwargs))
        rows.append({"what": f"call: {name}", "added_us": (ours - base) / 1000})
    engines.use(None)
    return rows


def startup_row() -> dict[str, Any]:
    """Milliseconds that importing the guard adds to every start of this interpreter while TAYLOR_PATCH is unset."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TAYLOR_PATCH")}
    times = []
    for _ in range(30):
        text = subprocess.run([sys.executable, "-X", "importtime", "-c", "pass"], env=environ, capture_output=True, text=True).stderr
        found = re.search(r"\|\s+(\d+) \|\s+taylor_patch$", text, re.MULTILINE)
        if found is None:
            raise SystemExit("the start-up files are not installed in this interpreter: pip install taylor-patch")
        times.append(int(found[1]) / 1000)
    return {"what": "start-up while off", "added_ms": min(times), "median_ms": sorted(times)[len(times) // 2]}


def main() -> None:
    """Measure, print and record."""
    rows = [startup_row(), *call_rows()]
    for row in rows:
        print("  ".join(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    print(record.append("overhead", rows))


if __name__ == "__main__":
    main()
