"""Times on tensors of a model's shape, errors as they are, both from the q, k, v of the demo's trained model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.backends.base import Backend, Fallback, as_reasons
from taylor_patch.backends.sdpa import Sdpa
from taylor_patch.backends.taylor.base import TaylorBackend
from taylor_patch.call import AttentionCall, TokenGrid
from taylor_patch.demo import model as demo_model
from taylor_patch.engine import check_form
from taylor_patch.errors import said
from taylor_patch.features.symmetric import feature_count
from taylor_patch.guard import exact_rows, relative_error, spread

LADDER = (1024, 2048, 4096, 8192, 12288, 16384, 24576, 32768, 65536)
"""Token counts at which --calibrate times."""
ACCURATE = 2.0
"""Errors up to so many times the one asked for count as accurate: what quality_limit leaves to a backend."""


@dataclass(frozen=True)
class Row:
    """One backend at one shape. ratio: exact attention's time over this one's. Errors: relative L2 on trained q, k, v."""

    backend: str
    milliseconds: float | None = None
    ratio: float | None = None
    peak_mib: float | None = None
    error_median: float | None = None
    error_p90: float | None = None
    note: str = ""


@lru_cache(maxsize=1)
def _trained(device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], ...]:
    """q, k, v of the trained model's calls in float32, [1, heads, 16 + 64 * 64, 128] each."""
    return tuple((call.q.float(), call.k.float(), call.v.float()) for call in trained_calls(device, torch.float32, 0.0))


def shaped_call(heads: int, head_dim: int, grid: TokenGrid, device: torch.device, dtype: torch.dtype, target_error: float) -> AttentionCall:
    """A call of the shape asked for with the trained model's q, k and v: stretched over the grid (each frame the same, a little noise
    apart), its heads and layers in turn, coordinates in turn where head_dim is not 128. It lies in a run, as the second step of a
    block would: a backend that settles something for a block does so in the warm-up."""
    generator = torch.Generator(device).manual_seed(0)
    calls = _trained(device)
    text = min(grid.start, 16)

    def tensor(which: int) -> Tensor:
        made = []
        for head in range(heads):
            source = calls[head % len(calls)][which][0, head // len(calls) % calls[0][which].shape[1]]
            source = source[:, torch.arange(head_dim, device=device) % source.shape[1]]
            image = source[-64 * 64 :].T.reshape(1, head_dim, 64, 64)
            frame = F.interpolate(image, (grid.h, grid.w), mode="bilinear").flatten(2)[0].T
            frames = frame.repeat(grid.t, 1)
            frames = frames + 0.05 * frames.std() * torch.randn(frames.shape, generator=generator, device=device)
            made.append(torch.cat([source[:text].repeat(-(-grid.start // max(text, 1)), 1)[: grid.start], frames]).to(dtype))
        return torch.stack(made)[None]

    return AttentionCall(tensor(0), tensor(1), tensor(2), scale=head_dim**-0.5, grid=grid, sigma=0.5, block=0, target_error=target_error,
                         memo={})  # as in a run: what a first call settles serves the ones that are timed


def milliseconds(work: Callable[[], Any], device: torch.device, seconds: float) -> float:
    """Median time of a call that has been made before, over about `seconds`: at least three calls, of slow ones as many as begin within
    three times that."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or (len(times) < 200 and time.perf_counter() - begin < (seconds if len(times) >= 3 else 3 * seconds)):
        start = time.perf_counter()
        work()
        _wait(device)
        times.append((time.perf_counter() - start) * 1000)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _with_peak(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float | None]:
    """The result of the work, and the memory in MiB that it takes at its peak beside that, on CUDA."""
    if device.type != "cuda":
        return work(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = work()
    _wait(device)
    size = out.numel() * out.element_size() if isinstance(out, Tensor) else 0
    return out, (torch.cuda.max_memory_allocated(device) - before - size) / 2**20


def trained_calls(device: torch.device, dtype: torch.dtype, target_error: float, size: int = 128) -> Iterator[AttentionCall]:
    """The attention calls of the demo's trained model half-way through the schedule, at size x size pixels."""
    network, texts, vectors = demo_model.load(device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, **_: Any) -> Tensor:
        found.append((q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        network(x, torch.full((1,), 0.5, device=device), texts[17:18], vectors[17:18], attention, {})
    side = size // network.patch_size
    for q, k, v in found:
        yield AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), scale=q.shape[-1] ** -0.5, target_error=target_error,
                            grid=TokenGrid(1, side, side, start=texts.shape[1]))


def errors(backend: Backend, calls: list[AttentionCall]) -> tuple[float, float] | None:
    """(median, 90th percentile) over calls and heads of the relative L2 error against float32 attention; None where it refuses, or
    where there is no call."""
    found: list[float] = []
    for call in calls:
        if backend.reasons_against(call):
            return None
        exact = Sdpa().run(dataclasses.replace(call, q=call.q.float(), k=call.k.float(), v=call.v.float()))
        try:
            out = backend.run(call).float()
        except Fallback:
            return None
        found += [float(relative_error(out[0, h], exact[0, h])) for h in range(out.shape[1])]
    if not found:
        return None
    values = torch.tensor(found)
    return float(values.quantile(0.5)), float(values.quantile(0.9))


def errors_of_rows(out: Tensor, call: AttentionCall) -> tuple[float, float]:
    """(median, 90th percentile) over the heads of the relative L2 error of 64 query rows against exact attention in the call's dtype."""
    rows = spread(call.q.shape[2], 64, 0)
    ours, exact = out[:, :, rows].float(), exact_rows(call, rows)
    found = ((ours - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3))).flatten()
    return float(found.quantile(0.5)), float(found.quantile(0.9))


def hopeless(backend: Backend, head_dim: int, keys: int) -> str | None:
    """Why timing the backend is a waste of minutes: a global series with as many features as there are keys does more than exact
    attention. None for any other."""
    if not isinstance(backend, TaylorBackend) or backend.options.error_aimed or head_dim % backend.options.sub_head_blocks:
        return None
    count = feature_count(head_dim // backend.options.sub_head_blocks, backend.options.P)
    return f"P {backend.options.P} has {count:,} features for {keys:,} keys: not timed, since it cannot be faster" if count >= keys else None


def compare(backends: list[Backend], call: AttentionCall, seconds: float, with_errors: bool = True,
            progress: Callable[[str], None] = lambda name: None, all_of_them: bool = True) -> list[Row]:
    """A row for exact attention and one for each backend, in one run on one device. progress: told each name before its work.
    all_of_them: those that are hopeless, too."""
    device = call.q.device
    progress("sdpa")
    exact = next((backend for backend in backends if backend.name == "sdpa"), Sdpa())
    _, peak = _with_peak(lambda: exact.run(call), device)
    reference = milliseconds(lambda: exact.run(call), device, seconds)
    calls = list(trained_calls(device, call.q.dtype, call.target_error)) if with_errors else []
    median, p90 = errors(exact, calls) or (None, None)
    rows = [Row("sdpa", reference, 1.0, peak, median, p90)]
    for backend in backends:
        if backend.name == "sdpa":
            continue
        if not all_of_them and (reason := hopeless(backend, call.q.shape[3], call.k.shape[2])):
            rows.append(Row(backend.name, note=f"{reason} (--backend {backend.name} does)"))
            continue
        progress(backend.name)
        try:
            rows.append(_row(backend, call, reference, calls, seconds))
        except (Exception, SystemExit) as error:  # one backend that fails must not end the table
            rows.append(Row(backend.name, note=said(error)))
    return rows


def _row(backend: Backend, call: AttentionCall, reference: float, calls: list[AttentionCall], seconds: float) -> Row:
    """The row of one backend. reference: milliseconds of exact attention. Raises what the backend raises."""
    device = call.q.device
    if reasons := as_reasons(backend.reasons_against(call), "reasons_against()"):
        return Row(backend.name, note="; ".join(reasons))
    out, peak = _with_peak(lambda: backend.run(call), device)
    if problem := check_form(out, call):
        return Row(backend.name, note=problem)
    spent = milliseconds(lambda: backend.run(call), device, seconds)
    note = ""
    found = errors(backend, calls)
    if calls and found is None:
        found, note = errors_of_rows(out, call), "refuses the trained model's calls; errors on the call that was timed"
    median, p90 = found or (None, None)
    return Row(backend.name, spent, reference / spent, peak, median, p90, note)


def _is_accurate(backend: Backend, calls: list[AttentionCall], target_error: float) -> bool:
    """Whether `auto` may choose it: its error on `calls` is known and small enough."""
    try:
        found = errors(backend, calls)
    except Exception:  # as in compare
        return False
    return found is not None and found[1] <= ACCURATE * target_error


def crossovers(backends: list[Backend], heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, target_error: float,
               seconds: float, progress: Callable[[int], None]) -> dict[str, int | None]:
    """Backend -> least tokens of LADDER from which it is faster than exact attention at every longer one timed, or None.

    None, too, for backends whose error on the trained model's calls is above ACCURATE times target_error: `auto` may not choose what
    the guard would have to undo. Stops where exact attention takes longer than a second a call.
    """
    calls = list(trained_calls(device, dtype, target_error))
    faster: dict[str, int | None] = {backend.name: None for backend in backends if backend.name != "sdpa"}
    backends = [backend for backend in backends if backend.name != "sdpa" and hopeless(backend, head_dim, LADDER[-1]) is None
                and _is_accurate(backend, calls, target_error)]
    for tokens in LADDER:
        side = round(tokens**0.5 / 8) * 8
        call = shaped_call(heads, head_dim, TokenGrid(1, side, tokens // side), device, dtype, target_error)
        rows = compare(backends, call, seconds, with_errors=False)
        for row in rows[1:]:
            wins = row.ratio is not None and row.ratio > 1
            faster[row.backend] = (faster[row.backend] or call.q.shape[2]) if wins else None
        progress(call.q.shape[2])
        if (rows[0].milliseconds or 0) > 1000:
            break
    return faster
