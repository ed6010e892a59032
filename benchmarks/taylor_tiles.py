"""Time the Taylor kernels with different tiles: `python -m benchmarks.taylor_tiles [--only d32] [--out FILE]`.

taylor_patch/backends/taylor/tuned.py holds what wins here. A row says how long all launches of one kernel took in one call (torch's
profiler, median of the calls) with that kernel's tile changed and the other's as it is in the table. A tile whose result differs
from the table's by more than rounding, or that does not compile, is reported in its row and not timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import record
from taylor_patch.backends.taylor import tuned
from taylor_patch.backends.taylor.gpu import TritonFull
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.call import AttentionCall

SHAPES: dict[str, dict[str, Any]] = {"d32": {"P": 4, "sub_head_blocks": 4}, "d128": {"P": 3}}
"""Name -> options of triton_full; 24 heads of 128, N 16,896, bf16."""
HEADS, TOKENS, HEAD_DIM, CALLS = 24, 16_896, 128, 5


def tiles(kernel: str) -> Iterator[tuned.Tile]:
    """What is tried."""
    if kernel == "evaluate":
        for rows, warps in ((64, 4), (128, 4), (128, 8), (256, 8)):
            for stages in (2, 3, 4):
                for blocks in (1, 2):
                    yield tuned.Tile(rows, warps, stages, blocks)
    else:
        for rows, warps in ((32, 4), (64, 4), (128, 4), (64, 8), (128, 8)):
            for stages in (2, 3, 4):
                for blocks in (1, 2):
                    yield tuned.Tile(rows, warps, stages, blocks)


def main() -> None:
    """Try every tile of every shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SHAPES, help="one shape")
    parser.add_argument("--part", default="0/1", help="i/n: every n-th tile from i on, to compile in several processes at once")
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/taylor-tiles.jsonl"))
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    environment, table = record.environment(arguments.commit), tuned.choose
    gen = torch.Generator("cuda").manual_seed(0)
    q, k, v = (torch.randn(1, TOKENS, HEADS, HEAD_DIM, generator=gen, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    call = AttentionCall(q, k, v, 0.8 * HEAD_DIM**-0.5)
    for shape in (arguments.only,) if arguments.only else SHAPES:
        backend = TritonFull(TaylorOptions(early_probe=False, fallback_on_negative=False, **SHAPES[shape]))
        expected = backend.run(call).float()
        for kernel in ("evaluate", "accumulate"):
            for tile in list(tiles(kernel))[part::parts]:
                tuned.choose = lambda name, *about, kernel=kernel, tile=tile: tile if name == kernel else table(name, *about)
                row = {"kernel": kernel, "d": HEAD_DIM, "n": TOKENS, "h": HEADS, "dtype": "bfloat16", "options": SHAPES[shape],
                       "rows": tile.rows, "warps": tile.warps, "stages": tile.stages, "blocks_a_program": tile.blocks, **environment}
                try:
                    row |= measured(lambda backend=backend: backend.run(call), f"{kernel}_kernel", expected)
                except Exception as error:  # a tile that does not fit the GPU is a finding, not the end
                    row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
                tuned.choose = table
                with arguments.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
                print(shape, kernel, tile, row.get("kernel_ms"), row.get("call_ms"), row.get("failed", ""), flush=True)


def measured(run: Any, name: str, expected: torch.Tensor) -> dict[str, Any]:
    """Times of the kernel and of the call, ms, or what is wrong with its result."""
    difference = float((run().float() - expected).norm() / expected.norm())
    if not difference < 5e-3:
        return {"failed": f"differs by {difference:.1e}"}
    kernel_ms, call_ms = [], []
    for _ in range(CALLS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        call_ms.append(start.elapsed_time(end))
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            run()
            torch.cuda.synchronize()
        kernel_ms.append(sum(event.device_time_total for event in seen.key_averages() if name in event.key) / 1000)
    return {"kernel_ms": round(statistics.median(kernel_ms), 4), "call_ms": round(statistics.median(call_ms), 4)}


if __name__ == "__main__":
    main()
