"""Error of near_far on trained attention, and of the pictures made with it: `python -m benchmarks.near_far_accuracy`.

heads: relative L2 error against float64 exact attention, over all layers and heads of the demo's model at steps 2, 8, 14 and 20
of 24 (picture 17, 256 px, 16,400 tokens). kernel: error of the kernels against their own formula in float64 with the same near
blocks, beside the error of SDPA in the same dtype. pictures: PSNR against exact attention in every step, 24 steps.
One JSON line per measurement is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.attention import relative
from benchmarks.trained import captured, psnr, sample
from taylor_patch.backends.near_far import NearFar, NearFarOptions, op, plan, reference
from taylor_patch.call import AttentionCall, TokenGrid

SIZE, STEPS, AT, PICTURES = 256, 24, (2, 8, 14, 20), (17, 18, 0)
GRID = TokenGrid(1, SIZE // 2, SIZE // 2, 16)
DENSITIES = (0.05, 0.1, 0.2)
TAILS = ("cumulant", "zeroth", "none")


def call_of(q: Tensor, k: Tensor, v: Tensor) -> AttentionCall:
    """A call of the demo's model."""
    return AttentionCall(q, k, v, q.shape[-1] ** -0.5, grid=GRID)


def exact64(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exact attention in float64, head by head."""
    return torch.stack([torch.softmax(q[0, h].double() @ k[0, h].double().T * q.shape[-1] ** -0.5, -1) @ v[0, h].double()
                        for h in range(q.shape[1])])[None]


def quantiles(errors: list[float]) -> dict[str, Any]:
    """Median, 90th percentile, maximum and count."""
    x = torch.tensor(errors, dtype=torch.float64)
    return {"rel_l2_median": round(float(x.median()), 6), "rel_l2_p90": round(float(x.quantile(0.9)), 6),
            "rel_l2_max": round(float(x.max()), 6), "heads": len(errors)}


def heads() -> Iterator[dict[str, Any]]:
    """Errors over layers, heads and steps."""
    calls = captured(17, SIZE, STEPS, AT)
    exact = [exact64(*call) for call in calls]
    sdpa = [error for call, ref in zip(calls, exact, strict=True) for error in relative(F.scaled_dot_product_attention(*call), ref).tolist()]
    yield {"what": "heads", "provider": "sdpa", **quantiles(sdpa)}
    for tail in TAILS:
        for density in DENSITIES:
            errors = [error for call, ref in zip(calls, exact, strict=True)
                      for error in relative(op.attend(call_of(*call), density, tail), ref).tolist()]
            yield {"what": "heads", "provider": "near_far", "tail": tail, "density": density, **quantiles(errors)}
    worst, shares = [], []
    for call, ref in list(zip(calls, exact, strict=True))[::5]:
        q, k, v = call
        sizes = plan.of_call(call_of(*call))
        space, out = sizes.allocate(q.device), op.empty_output(q)
        op.prepare(sizes, space, q, k, v, None, 0, sizes.lanes)
        op.select(sizes, space, sizes.lanes, q.shape[-1] ** -0.5, 0.1)
        op.attend_round(sizes, space, q, out, 0, sizes.lanes, q.shape[-1] ** -0.5, "cumulant")
        near = space["far"][:, 0, :, : sizes.image_blocks].isneginf()
        own = reference.attend_head(q[0, 0].double() * q.shape[-1] ** -0.5, k[0, 0].double(), v[0, 0].double(), GRID, 0.1, near=near[0])
        rounding = float(relative(F.scaled_dot_product_attention(q, k, v)[:, :1], ref[:, :1]))
        worst.append(float(relative(out[:, :1], own[None, None])) / rounding)
        shares.append(float(near.float().mean()))
    yield {"what": "kernel", "provider": "near_far", "density": 0.1, "times_rounding_max": round(max(worst), 4),
           "exact_share_mean": round(sum(shares) / len(shares), 5)}


def pictures() -> Iterator[dict[str, Any]]:
    """PSNR of pictures."""
    exact = {picture: sample(picture, SIZE, STEPS, lambda step: F.scaled_dot_product_attention) for picture in PICTURES}
    for label, options, error in [*((density, NearFarOptions(density=density), 0.05) for density in DENSITIES),
                                  ("quality 0.05", NearFarOptions(), 0.05)]:
        backend = NearFar(options)

        def attend(q: Tensor, k: Tensor, v: Tensor, backend: NearFar = backend, error: float = error) -> Tensor:
            return backend.run(AttentionCall(q, k, v, q.shape[-1] ** -0.5, grid=GRID, target_error=error))

        values = [round(psnr(sample(picture, SIZE, STEPS, lambda step: attend), exact[picture]), 2) for picture in PICTURES]
        yield {"what": "pictures", "provider": "near_far", "density": label, "psnr_db": values,
               "psnr_db_mean": round(sum(values) / len(values), 2)}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "near_far_accuracy.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        for part in (heads, pictures):
            for row in part():
                file.write(json.dumps({**row, **environment}) + "\n")
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
