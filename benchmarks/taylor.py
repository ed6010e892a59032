"""Time and check the global Taylor backends beside exact attention: `python -m benchmarks.taylor [--quick] [--out FILE]`.

Every provider of a case is checked against a float64 oracle on sampled query rows before it is timed; one that fails is
reported and not timed. rel_l2_* are |out - oracle| / |oracle| per head on those rows, the oracle being the same polynomial of
the logits for a Taylor provider and the softmax for an exact one. Inputs are normal, so that the logits have standard
deviation `spread`; the time depends on shapes alone. One JSONL row per provider and case is appended to FILE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import record
from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.backends.taylor.gpu import TritonFull, TritonFused
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.call import AttentionCall

ROWS = 64
"""Query rows a head that are compared with the oracle."""
GATE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4}
"""Largest median error that passes."""
BACKENDS: dict[str, type[Backend]] = {"triton_full": TritonFull, "triton_fused": TritonFused}


@dataclass(frozen=True)
class Case:
    """Shapes and the options of the Taylor providers."""

    n: int
    options: dict[str, Any]
    providers: tuple[str, ...]
    b: int = 1
    h: int = 24
    d: int = 128
    dtype: torch.dtype = torch.bfloat16
    spread: float = 0.8
    reps: int = 20


@dataclass
class Provider:
    """A callable and what its result is to be compared with."""

    name: str
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def cases(quick: bool) -> Iterator[Case]:
    """The cases of issue 3; --quick leaves out the long sequences."""
    both, full = ("triton_full", "triton_fused"), ("triton_full",)
    for n in (16_896, 4_608) if quick else (16_896, 66_048, 33_280, 4_608):
        yield Case(n, {"P": 3}, full)
        yield Case(n, {"P": 3, "coefficients": "hermite"}, full)
        if n <= 16_896:
            yield Case(n, {"P": 4, "sub_head_blocks": 4}, both)
            yield Case(n, {"P": 4}, ("triton_fused",), reps=3)
    if not quick:
        yield Case(16_896, {"P": 3}, full, d=64, h=48)
        yield Case(16_896, {"P": 4}, both, d=64, h=48, reps=5)


def exact_providers() -> list[Provider]:
    """SDPA with cuDNN's kernel and with torch's flash kernel."""
    def sdpa(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(kind):
                return F.scaled_dot_product_attention(q, k, v)
        return run

    return [Provider("sdpa_cudnn", sdpa(SDPBackend.CUDNN_ATTENTION)), Provider("sdpa_flash", sdpa(SDPBackend.FLASH_ATTENTION))]


def taylor_provider(name: str, options: dict[str, Any], spread: float) -> Provider:
    """A backend as the dispatcher runs it, probe and denominator checks included."""
    backend = BACKENDS[name](TaylorOptions(**options))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        call = AttentionCall(q, k, v, spread / math.sqrt(q.shape[-1]))
        reasons = backend.reasons_against(call)
        if reasons:
            raise RuntimeError("; ".join(reasons))
        return backend.run(call)

    return Provider(name, run, options)


def oracle_rows(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, options: dict[str, Any]) -> Tensor:
    """[B, H, ROWS, D] float64: the polynomial of the options, or the softmax where there are none."""
    o, out = TaylorOptions(**options), []
    for h in range(q.shape[1]):
        blocks = []
        for part in torch.arange(q.shape[3]).chunk(o.sub_head_blocks if options else 1):
            x, y, z = (t[:, h][..., part.to(t.device)].double() for t in (q[:, :, rows], k, v))
            y = y - y.mean(1, keepdim=True)
            s = scale * x @ y.transpose(1, 2)
            if not options:
                weight = torch.softmax(s, -1)
            else:
                variance = s.square().mean(-1, keepdim=True) if o.coefficients == "hermite" else torch.zeros_like(s[..., :1])
                weight = sum((s**p / math.factorial(p) * sum((-variance / 2) ** m / math.factorial(m) for m in range((o.P - 1 - p) // 2 + 1))
                              for p in range(o.P)), torch.zeros_like(s))
                weight = weight / weight.sum(-1, keepdim=True)
            blocks.append(weight @ z)
        out.append(torch.cat(blocks, -1))
    return torch.stack(out, 1)


def quantile(values: Tensor, fraction: float) -> float:
    """Quantile of a 1-D tensor."""
    return float(values.double().quantile(fraction))


def measure(provider: Provider, case: Case, environment: dict[str, str]) -> dict[str, Any]:
    """One row: check, then time, then peak memory beside inputs and output. Raises RuntimeError where the check fails."""
    gen = torch.Generator("cuda").manual_seed(0)
    # [B, N, H, D] in memory, as a model's projections leave it
    q, k, v = (torch.randn(case.b, case.n, case.h, case.d, generator=gen, device="cuda", dtype=case.dtype).transpose(1, 2) for _ in range(3))
    scale = case.spread / math.sqrt(case.d) if provider.options else 1 / math.sqrt(case.d)
    out = provider.run(q, k, v)
    rows = torch.arange(ROWS, device="cuda") * case.n // ROWS
    expected = oracle_rows(q, k, v, rows, scale, provider.options)
    errors = ((out[:, :, rows].double() - expected).norm(dim=(2, 3)) / expected.norm(dim=(2, 3))).flatten()
    median = quantile(errors, 0.5)
    if not median <= GATE[case.dtype]:
        raise RuntimeError(f"median error {median:.2e} above {GATE[case.dtype]:.0e}")
    del expected
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    again = provider.run(q, k, v)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before - again.numel() * again.element_size()
    times = []
    for _ in range(case.reps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        provider.run(q, k, v)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    spent = torch.tensor(times)
    return {"provider": provider.name, "b": case.b, "h": case.h, "n": case.n, "d": case.d, "dtype": str(case.dtype).removeprefix("torch."),
            "options": provider.options, "median_ms": round(quantile(spent, 0.5), 3), "p20_ms": round(quantile(spent, 0.2), 3),
            "p80_ms": round(quantile(spent, 0.8), 3), "peak_mib": round(peak / 2**20, 1), "rel_l2_median": float(f"{median:.3g}"),
            "rel_l2_p90": float(f"{quantile(errors, 0.9):.3g}"), **environment}


def main() -> int:
    """Run the cases; 1 where a provider failed its check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/taylor.jsonl"))
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--commit", help="recorded where the tree is no git checkout")
    arguments = parser.parse_args()
    about, failed, timed = record.environment(arguments.commit), False, set[tuple[int, int, int]]()
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases(arguments.quick):
        providers = [taylor_provider(name, case.options, case.spread) for name in case.providers]
        if (case.n, case.h, case.d) not in timed:
            timed.add((case.n, case.h, case.d))
            providers = exact_providers() + providers
        for provider in providers:
            try:
                row = measure(provider, case, about)
            except (RuntimeError, Fallback) as error:
                failed = True
                print(f"{provider.name} n {case.n} {provider.options}: {str(error)[:300]}", file=sys.stderr)
                continue
            with arguments.out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{row['provider']:13s} h {row['h']} n {row['n']:6d} d {row['d']:3d} {json.dumps(row['options']):45s}"
                  f"{row['median_ms']:9.3f} ms {row['peak_mib']:7.1f} MiB  error {row['rel_l2_median']:.2e}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
