"""Error of near_far on trained attention, and of the pictures made with it: `python -m benchmarks.near_far_accuracy`.

heads: relative L2 error against float64 exact attention, over all layers and heads of the demo's model at steps 2, 8, 14 and 20
of 24 (picture 17, 256 px, 16,400 tokens); with a target instead of a density also the densities that the probe settled on.
hostile: error-aimed attention of inputs made to mislead it (target 0.05). kernel: error of the kernels against their own formula in
float64 with the same near blocks, beside the error of SDPA in the same dtype. sharp: error of the formula with logits many times as
large, and where its expansion goes on as a straight line (blocks.tilt). pictures: PSNR against exact attention in every step, 24
steps, and the time that near_far and SDPA took for the same calls (2 heads of 16,400 tokens, far fewer than a GPU needs to be filled).
One JSON line per measurement is appended to FILE.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import record
from benchmarks.attention import relative
from benchmarks.trained import Attend, captured, psnr, sample
from taylor_patch.backends.near_far import NearFar, NearFarOptions, blocks, op, plan, reference
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.quality import QUALITIES

SIZE, STEPS, AT, PICTURES = 256, 24, (2, 8, 14, 20), (17, 18, 0)
GRID = TokenGrid(1, SIZE // 2, SIZE // 2, 16)
DENSITIES = (0.05, 0.1, 0.2)
TARGETS = (0.02, 0.03, 0.05, 0.1)
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
        op.score(sizes, space, sizes.lanes, q.shape[-1] ** -0.5)
        op.select(sizes, space, sizes.lanes, 0.1)
        op.attend_round(sizes, space, q, out, torch.zeros(1, device=q.device), 0, sizes.lanes, q.shape[-1] ** -0.5, "cumulant")
        near = space["far"][:, 0, :, : sizes.keys.image_blocks].isneginf()
        own = reference.Head(q[0, 0].double() * q.shape[-1] ** -0.5, k[0, 0].double(), v[0, 0].double(), GRID).attend(near[0])
        rounding = float(relative(F.scaled_dot_product_attention(q, k, v)[:, :1], ref[:, :1]))
        worst.append(float(relative(out[:, :1], own[None, None])) / rounding)
        shares.append(float(near.float().mean()))
    yield {"what": "kernel", "provider": "near_far", "density": 0.1, "times_rounding_max": round(max(worst), 4),
           "exact_share_mean": round(sum(shares) / len(shares), 5)}


def aimed() -> Iterator[dict[str, Any]]:
    """Errors and densities where an error is asked for."""
    calls = captured(17, SIZE, STEPS, AT)
    exact = [exact64(*call) for call in calls]
    for target in TARGETS:
        errors, densities = [], []
        for (q, k, v), ref in zip(calls, exact, strict=True):
            out, settled = op.attend_aimed(AttentionCall(q, k, v, q.shape[-1] ** -0.5, grid=GRID, target_error=target), None)
            errors += relative(out, ref).tolist()
            assert settled is not None
            densities += settled.setting[:, 0].tolist()
        yield {"what": "heads", "provider": "near_far", "tail": "cumulant", "target": target, **quantiles(errors),
               "density_mean": round(sum(densities) / len(densities), 4), "exact_heads": sum(density == 1 for density in densities)}


HOSTILE_GRID = TokenGrid(1, 64, 64, 16)


def hostile_inputs() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """(name, q, k, v) [1, 4, N, 128] bf16: a smooth field plus noise, spoiled."""
    gen = torch.Generator("cuda").manual_seed(3)

    def random(smooth: float = 1.4) -> Tensor:
        field = torch.randn(4, 128, 8, 8, generator=gen, device="cuda")
        field = F.interpolate(field, (HOSTILE_GRID.h, HOSTILE_GRID.w), mode="bilinear").flatten(2).transpose(1, 2)[None]
        x = 0.7 * torch.randn(1, 4, HOSTILE_GRID.start + HOSTILE_GRID.tokens, 128, generator=gen, device="cuda")
        x[:, :, HOSTILE_GRID.start :] += smooth * field
        return x

    q, k, v = random(), random(), random()
    yield "none", q, k, v
    sink = k.clone()
    towards = q.mean((0, 2), keepdim=True)
    q_sink = q + 2 * towards / towards.norm(dim=-1, keepdim=True) * 128**0.5 / 4
    mean = q_sink.mean(2)
    # The logit that gives one key about 77% of the softmax: above the log of the sum of the others by log(.77 / .23).
    others = torch.logsumexp(q_sink @ k.transpose(2, 3) * 128**-0.5, -1).mean(2)
    sink[:, :, 1000] = mean * ((others + 1.2) * 128**0.5 / mean.square().sum(-1))[..., None]
    yield "a sink with 77% of the mass", q_sink, sink, v
    order = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(4)).cuda()
    yield "tokens in no order", q[:, :, order], k[:, :, order], v[:, :, order]
    yield "white noise", random(0.0), random(0.0), random(0.0)
    yield "identical keys", q, k[:, :, :1].expand_as(k).contiguous(), v
    yield "huge norms", q * 30, k * 30, v
    hot = torch.zeros_like(v)
    hot[:, :, 100, 3] = 1
    yield "one-hot values", q, k, hot
    yield "keys far from the origin", q, k + 50, v


def hostile() -> Iterator[dict[str, Any]]:
    """The largest error over heads where the input misleads."""
    target = 0.05
    for name, *tensors in hostile_inputs():
        q, k, v = (x.bfloat16() for x in tensors)
        call = AttentionCall(q, k, v, 128**-0.5, grid=HOSTILE_GRID, target_error=target)
        out, settled = op.attend_aimed(call, None)
        assert settled is not None
        ref = exact64(q, k, v)
        rounding = relative(F.scaled_dot_product_attention(q, k, v), ref)
        top = torch.softmax(q[0, :, ::61].double() @ k[0].double().transpose(1, 2) * 128**-0.5, -1).amax(-1).mean()
        yield {"what": "hostile", "provider": "near_far", "input": name, "target": target,
               "rel_l2_max": round(float(relative(out, ref).max()), 6), "sdpa_rel_l2_max": round(float(rounding.max()), 6),
               "densities": [round(x, 3) for x in settled.setting[:, 0].tolist()],
               "always_exact_blocks": settled.always.sum(1).tolist(), "mean_largest_share": round(float(top), 4)}


def sharp() -> Iterator[dict[str, Any]]:
    """Errors of the plain version with sharper logits, for places from which the expansion goes on as a straight line."""
    usual = blocks.TILT_LIMIT
    try:
        yield from _sharp()
    finally:
        blocks.TILT_LIMIT = usual


def _sharp() -> Iterator[dict[str, Any]]:
    for size, times in itertools.product((SIZE // 2, SIZE), (1, 3, 10)):
        grid = TokenGrid(1, size // 2, size // 2, 16)
        inputs = [(times * q, k, v) for q, k, v in captured(17, size, STEPS, AT)[:: 5 if size == SIZE else 1]]
        exact = [exact64(*call) for call in inputs]
        for limit in (1e9, math.sqrt(2 * math.log(64)), 2.0, 1.5):
            blocks.TILT_LIMIT = limit
            errors = [error for (q, k, v), ref in zip(inputs, exact, strict=True) for error in relative(
                reference.attend(AttentionCall(q.float(), k.float(), v.float(), q.shape[-1] ** -0.5, grid=grid), 0.1), ref).tolist()]
            yield {"what": "sharp", "provider": "near_far, plain", "tokens": grid.start + grid.tokens, "density": 0.1, "logits_times": times,
                   "limit": None if limit == 1e9 else round(limit, 2), **quantiles(errors)}


def pictures() -> Iterator[dict[str, Any]]:
    """PSNR of pictures, and the time that near_far and SDPA took for the same calls (2 heads, 16,400 tokens)."""
    exact = {picture: sample(picture, SIZE, STEPS, lambda step: F.scaled_dot_product_attention) for picture in PICTURES}
    for label, options, error in [*((density, NearFarOptions(density=density), 0.05) for density in DENSITIES),
                                  *((name, NearFarOptions(), target) for name, target in QUALITIES.items())]:
        values, spent = [], {"near_far": 0.0, "sdpa": 0.0}
        for picture in PICTURES:
            backend, marks, memo = NearFar(options), list[tuple[str, torch.cuda.Event, torch.cuda.Event]](), dict[Any, Any]()

            def attend(step: int, backend: NearFar = backend, error: float = error, marks: Any = marks, memo: Any = memo) -> Attend:
                blocks = itertools.count()

                def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                    call = AttentionCall(q, k, v, q.shape[-1] ** -0.5, grid=GRID, target_error=error, sigma=1 - step / STEPS,
                                         block=next(blocks), memo=memo)
                    timed(marks, "sdpa", lambda: F.scaled_dot_product_attention(q, k, v))
                    return timed(marks, "near_far", lambda: backend.run(call))

                return run

            values.append(round(psnr(sample(picture, SIZE, STEPS, attend), exact[picture]), 2))
            torch.cuda.synchronize()
            for name, start, end in marks[len(marks) // STEPS :]:  # not the first step, in which kernels are compiled
                spent[name] += start.elapsed_time(end)
        yield {"what": "pictures", "provider": "near_far", "density": label, "psnr_db": values,
               "psnr_db_mean": round(sum(values) / len(values), 2), "near_far_ms": round(spent["near_far"], 2),
               "sdpa_ms": round(spent["sdpa"], 2)}


def timed(marks: list[tuple[str, torch.cuda.Event, torch.cuda.Event]], name: str, run: Callable[[], Tensor]) -> Tensor:
    """run(), with its events in `marks`."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    out = run()
    end.record()
    marks.append((name, start, end))
    return out


PARTS = {"heads": heads, "aimed": aimed, "hostile": hostile, "sharp": sharp, "pictures": pictures}


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", dest="parts", type=PARTS.__getitem__, nargs="+", default=list(PARTS.values()), help=", ".join(PARTS))
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "near_far_accuracy.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        for part in arguments.parts:
            for row in part():
                file.write(json.dumps({**row, **environment}) + "\n")
                file.flush()
                print(row, flush=True)


if __name__ == "__main__":
    main()
