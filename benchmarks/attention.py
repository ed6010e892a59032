"""Time of attention against the number of tokens, near_far beside exact attention: `python -m benchmarks.attention [--quick]`.

Times are those of a whole call, preparation, routing and permutation included; for sol_attn (comfy-kitchen) without the permutation to
tiles, which its callers would have to do, and without the check below, since it has no plain version here. near_far with a `quality`
finds its density by a probe: in every call, or ("settled") as in a sampling run, where one probe serves a block for several steps.
The peers are measured where they are installed, sol_attn and
int8_attention with plugins/taylor-patch-kitchen on the path. Before a provider is timed, it is checked at a
small size of the same kind (exact providers against float64; near_far against its plain version in float64, with the near
blocks that its kernels chose); one that fails is reported and not timed. rel_l2_* are |out - exact| / |exact| per head on 64
sampled query rows of the timed input, so that for near_far they depend on the input:

    normal   white noise: blocks have nothing in common, near blocks lie anywhere
    smooth   a smooth field plus noise: near blocks are neighbours
    trained  q, k and v of the demo's model, picture 17 at 256 px, 12 calls side by side as 24 heads

One JSON line per provider and case is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from benchmarks.trained import captured
from taylor_patch.backends.near_far import NearFar, NearFarOptions, op, plan, reference
from taylor_patch.call import AttentionCall, TokenGrid

GRIDS = {4_608: TokenGrid(1, 72, 64), 8_192: TokenGrid(1, 128, 64), 16_896: TokenGrid(1, 132, 128), 33_280: TokenGrid(1, 208, 160),
         66_048: TokenGrid(1, 344, 192), 118_784: TokenGrid(1, 464, 256), 119_056: TokenGrid(33, 45, 80, 256),
         16_400: TokenGrid(1, 128, 128, 16)}
"""Tokens -> where they lie. 119,056: HunyuanVideo, 129 frames at 720p with 256 text tokens; 16,400: the demo's model at 256 px."""
ROWS = 64
"""Query rows of each head that are compared with exact attention."""


@dataclass(frozen=True)
class Case:
    """Shapes, kind of input and provider."""

    provider: str
    n: int
    data: str = "normal"
    density: float | None = None
    quality: float | None = None
    settled: bool = False
    n_kv: int | None = None
    """Keys of cross-attention."""
    keys: str = "line"
    """Whether its keys lie in a "grid" that is known, or in a "line"."""
    b: int = 1
    h: int = 24
    d: int = 128
    dtype: torch.dtype = torch.bfloat16

    @property
    def options(self) -> dict[str, Any]:
        aimed = {} if self.quality is None else {"quality": self.quality, "settled": self.settled}
        cross = {} if self.n_kv is None else {"n_kv": self.n_kv, "keys": self.keys}
        return {"data": self.data} | ({} if self.density is None else {"density": self.density}) | aimed | cross


def cases(quick: bool) -> Iterator[Case]:
    """The cases of docs/performance.md."""
    sizes = (4_608, 16_896) if quick else (4_608, 8_192, 16_896, 33_280, 66_048, 118_784)
    for n in sizes:
        for density in (0.05, 0.1, 0.2):
            yield Case("near_far", n, density=density)
        yield Case("near_far", n, "smooth", 0.05)
        yield Case("near_far", n, density=0.05, d=64)
        yield Case("cudnn", n)
        if n < 100_000:
            yield Case("flash", n)
        yield Case("cudnn", n, d=64)
        yield Case("sage", n)
        yield Case("int8_attention", n)
        for density in (0.05, 0.1, 0.2, 0.35):
            yield Case("sol_attn", n, density=density)
    if not quick:
        yield Case("near_far", 119_056, density=0.05)
    for n_kv in (33_280,) if quick else (33_280, 66_048):
        for keys in ("line", "grid"):
            yield Case("near_far", 16_896, density=0.05, n_kv=n_kv, keys=keys)
        yield Case("cudnn", 16_896, n_kv=n_kv)
    for density in (0.05, 0.1, 0.2):
        yield Case("near_far", 16_400, "trained", density)
    for quality in (0.02, 0.03, 0.05, 0.1):
        for settled in (False, True):
            yield Case("near_far", 16_400, "trained", quality=quality, settled=settled)
    for density in (0.05, 0.1, 0.2, 0.35, 0.5):
        yield Case("sol_attn", 16_400, "trained", density)
    for provider in ("int8_attention", "sage", "cudnn"):
        yield Case(provider, 16_400, "trained")
    if not quick:
        for settled in (False, True):
            yield Case("near_far", 66_048, "smooth", quality=0.1, settled=settled)


@lru_cache(maxsize=1)
def inputs(n: int, n_kv: int, data: str, b: int, h: int, d: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """q [b, h, n, d], k, v [b, h, n_kv, d] on the GPU."""
    if data == "trained":
        calls = captured(picture=17, size=256, steps=24, at=tuple(range(2, 5)))[:12]
        return tuple(torch.cat([call[i] for call in calls], 1)[:, :h].contiguous() for i in range(3))  # type: ignore[return-value]
    gen = torch.Generator("cuda").manual_seed(1)
    made = []
    for tokens in (n, n_kv, n_kv):
        x = torch.randn(b, h, tokens, d, generator=gen, device="cuda", dtype=dtype)
        if data == "smooth":
            grid = GRIDS[tokens]
            field = torch.randn(b * h, d, grid.h // 8, grid.w // 8, generator=gen, device="cuda")
            field = F.interpolate(field, (grid.h, grid.w), mode="bilinear").flatten(2).transpose(1, 2).view(b, h, grid.tokens, d)
            x = (0.7 * x.float() + 1.4 * field).to(dtype)
        made.append(x)
    return tuple(made)  # type: ignore[return-value]


def near_far(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The backend, called as the router calls it."""
    backend = NearFar(NearFarOptions(density=case.density or "auto"))
    settled: dict[str, Any] = {"sigma": 0.5, "block": 0, "memo": {}} if case.settled else {}

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = AttentionCall(q, k, v, q.shape[-1] ** -0.5, grid=GRIDS[q.shape[2]], target_error=case.quality or 0.05,
                             key_grid=GRIDS[k.shape[2]] if case.keys == "grid" else None, **settled)
        return backend.run(call)

    return run


def exact(kernel: SDPBackend) -> Callable[[Case], Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """SDPA with one kernel of torch."""
    def provider(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q, k, v)

        return run

    return provider


def sage(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """SageAttention, where it is installed."""
    from sageattention import sageattn

    return sageattn


class SolAttention:
    """comfy_kitchen.sol_attn with case.density for its topk_ratio, on tokens that were put into its order before.

    The result stays in that order; places [N] says where each token is in it.
    """

    def __init__(self, case: Case) -> None:
        from comfy_kitchen import sol_attn
        from taylor_patch_kitchen.order import block_order

        self.attend, self.ratio, self.order_of = sol_attn, case.density, block_order
        self.source: int | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[B, H, places, D]."""
        if self.source != q.data_ptr():
            order = self.order_of(GRIDS[q.shape[2]], q.shape[2], q.device)
            self.source, self.places, self.order = q.data_ptr(), order.places, order
            self.ordered = tuple(x.transpose(1, 2)[:, order.index] for x in (q, k, v))
        outside = [0, self.order.outside]
        out = self.attend(*self.ordered, tau=1.0, scale=q.shape[-1] ** -0.5, sink_blocks=outside, sink_q=outside, topk_ratio=self.ratio,
                          block_len=self.order.length, token_aug=0)
        return out.transpose(1, 2)


def int8_attention(case: Case) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """comfy_kitchen.int8_attention."""
    from comfy_kitchen import int8_attention as attend

    return lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5)


PROVIDERS: dict[str, Callable[[Case], Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "near_far": near_far, "cudnn": exact(SDPBackend.CUDNN_ATTENTION), "flash": exact(SDPBackend.FLASH_ATTENTION), "sage": sage,
    "sol_attn": SolAttention, "int8_attention": int8_attention}
LOOSE = {"sage": 20.0, "int8_attention": 20.0, "sol_attn": math.inf}
"""Provider -> largest error at 2,048 tokens in units of SDPA's: 8-bit ones, and one that is approximate and has no plain version here."""


def relative(out: Tensor, ref: Tensor) -> Tensor:
    """|out - ref| / |ref| per head."""
    return ((out.double() - ref).norm(dim=(-2, -1)) / ref.norm(dim=(-2, -1))).flatten()


def softmax_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Exact attention of some query rows in float64, head by head: [B, H, rows, D]."""
    heads = [torch.softmax(q[:, h, rows].double() @ k[:, h].double().transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ v[:, h].double()
             for h in range(q.shape[1])]
    return torch.stack(heads, 1)


@lru_cache(maxsize=64)
def gate(provider: str, d: int, dtype: torch.dtype) -> float:
    """Error at 2,048 tokens over the error of SDPA in the same dtype; at most 2 passes, LOOSE ones apart."""
    gen = torch.Generator("cuda").manual_seed(2)
    q, k, v = (torch.randn(1, 2, 2_048, d, generator=gen, device="cuda", dtype=dtype) for _ in range(3))
    rows = torch.arange(2_048, device="cuda")
    ref = softmax_rows(q, k, v, rows)
    rounding = float(relative(F.scaled_dot_product_attention(q, k, v), ref).max())
    if provider == "sol_attn":
        return 0.0
    if provider != "near_far":
        return float(relative(PROVIDERS[provider](Case(provider, 2_048))(q, k, v), ref).max()) / rounding
    grid = TokenGrid(1, 32, 64)
    sizes = plan.of_call(AttentionCall(q, k, v, d**-0.5, grid=grid))
    space, out = sizes.allocate(q.device), op.empty_output(q)
    op.prepare(sizes, space, q, k, v, None, 0, 2)
    op.score(sizes, space, 2, d**-0.5)
    op.select(sizes, space, 2, 0.2)
    op.attend_round(sizes, space, q, out, torch.zeros(1, device="cuda"), 0, 2, d**-0.5, "cumulant")
    near = space["far"][:, 0, :, : sizes.keys.image_blocks].isneginf()
    ref = torch.stack([reference.Head(q[0, h].double() * d**-0.5, k[0, h].double(), v[0, h].double(), grid).attend(near[h])
                       for h in range(2)])[None]
    return float(relative(out, ref).max()) / rounding


def version_of(provider: str) -> str | None:
    """What is behind a provider, where that is not this package."""
    package = {"sage": "sageattention", "sol_attn": "comfy-kitchen", "int8_attention": "comfy-kitchen"}.get(provider)
    if provider == "cudnn":
        return f"cuDNN {torch.backends.cudnn.version()}"
    try:
        return None if package is None else metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def measure(run: Callable[[], Tensor], reps: int) -> tuple[list[float], float]:
    """(sorted times in ms, peak temporary MiB) after two warm-up calls."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before - out.numel() * out.element_size()) / 2**20
    del out
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(reps)]
    for start, end in marks:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in marks), peak


def row(case: Case, reps: int, environment: dict[str, Any]) -> dict[str, Any]:
    """The result of one case, or why there is none."""
    what = {"provider": case.provider, "provider_version": version_of(case.provider), "b": case.b,
            "h": case.h, "n": case.n, "d": case.d, "dtype": str(case.dtype).removeprefix("torch."),
            "options": case.options}
    try:
        passed = gate(case.provider, case.d, case.dtype)
    except ImportError as error:
        return {**what, "skipped": str(error), **environment}
    except Exception as error:  # a peer that does not run here is a finding
        return {**what, "failed": f"{type(error).__name__}: {str(error)[:200]}", **environment}
    if passed > LOOSE.get(case.provider, 2.0):
        return {**what, "failed": f"error is {passed:.2f} times that of SDPA", **environment}
    q, k, v = inputs(case.n, case.n_kv or case.n, case.data, case.b, case.h, case.d, case.dtype)
    try:
        run = PROVIDERS[case.provider](case)
    except ImportError as error:
        return {**what, "skipped": str(error), **environment}
    times, peak = measure(lambda: run(q, k, v), reps)
    rows = torch.randperm(case.n, generator=torch.Generator().manual_seed(0))[:ROWS].cuda()
    out = run(q, k, v)
    errors = relative(out[:, :, getattr(run, "places", torch.arange(case.n, device=q.device))[rows]], softmax_rows(q, k, v, rows))
    quantiles = statistics.quantiles(times, n=5)
    return {**what, "median_ms": round(statistics.median(times), 4), "p20_ms": round(quantiles[0], 4), "p80_ms": round(quantiles[3], 4),
            "peak_mib": round(peak, 1), "rel_l2_median": round(float(errors.median()), 6), "rel_l2_p90": round(float(errors.quantile(0.9)), 6),
            "gate": round(passed, 3), **environment}


def main() -> None:
    """Measure every case and append the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes only")
    parser.add_argument("--reps", type=int, default=10)
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results") / "attention.jsonl")
    arguments = parser.parse_args()
    environment = record.environment(arguments.commit)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("a", encoding="utf-8") as file:
        for case in cases(arguments.quick):
            result = row(case, arguments.reps, environment)
            file.write(json.dumps(result) + "\n")
            file.flush()
            print(*(f"{key}={result[key]}" for key in result if key not in environment and key not in ("b", "h", "dtype")), flush=True)


if __name__ == "__main__":
    main()
