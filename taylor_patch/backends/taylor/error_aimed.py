"""error_aimed: the cheapest series of a global Taylor backend that meets the error asked for, block by block.

Candidates are the P from 2 up to the configured one, each with Taylor and, from 3 on and where keys are centred, with Hermite
coefficients (with two terms these are the same). They are compared with exact attention on ROWS query rows of every head, against all
keys, once for each block of the model and sigma bin of a run. What meets MARGIN times the error with the fewest
features is used there; where nothing does, the call is exact.
The comparison is read from the device at once: these backends read their denominators in every call anyway (ADR 15).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from taylor_patch.backends.base import Fallback
from taylor_patch.backends.targets import MARGIN, sigma_bin
from taylor_patch.backends.taylor.polynomial import polynomial
from taylor_patch.call import AttentionCall
from taylor_patch.features.symmetric import feature_count
from taylor_patch.guard import spread

if TYPE_CHECKING:
    from taylor_patch.backends.taylor.base import TaylorBackend

    AnyTaylor = TypeVar("AnyTaylor", bound=TaylorBackend)

log = logging.getLogger("taylor_patch")

KIND = "error_aimed"
ROWS = 64
"""Query rows of each head that the candidates are compared on."""
WORKSPACE = 128 << 20
"""Bytes that the heads compared at once may take, unless a single one takes more."""


def candidates(backend: AnyTaylor, call: AttentionCall) -> list[AnyTaylor]:
    """The backend with every series that may serve `call`, those with the fewest features first; at least that with P 2.

    With as many features as keys or more, exact attention does no more work.
    """
    o = backend.options
    width, keys = call.q.shape[-1] // o.sub_head_blocks, call.k.shape[2]
    found = [[backend.with_options(error_aimed=False, P=p, coefficients=kind)
              for kind in (("taylor", "hermite") if o.center_keys and p > 2 else ("taylor",))]
             for p in range(2, o.P + 1) if p == 2 or feature_count(width, p) < keys]
    known = set(found[0][0].reasons_against(call))  # a device that is not theirs, say
    return found[0] + [candidate for some in found[1:] for candidate in some if known.issuperset(candidate.reasons_against(call))]


def settle(backend: AnyTaylor, call: AttentionCall) -> AnyTaylor:
    """The backend with the series that is in force for `call`. Raises Fallback where none meets call.target_error."""
    if torch.compiler.is_compiling():
        raise Fallback("error_aimed reads what it compares, which torch.compile cannot trace")
    place = _place(backend, call)
    if call.memo is None or place is None:
        chosen = _choose(backend, call)
    else:
        if place not in call.memo:
            call.memo[place] = _choose(backend, call)
        chosen = call.memo[place]
    if isinstance(chosen, str):
        raise Fallback(chosen)
    return chosen


def reject(backend: TaylorBackend, call: AttentionCall, reason: Fallback) -> None:
    """Have exact attention where the series that settle() gave has failed on rows that were not compared: for as long as it would have held."""
    place = _place(backend, call)
    if call.memo is not None and place is not None:
        call.memo[place] = f"error_aimed: {reason}"


def _place(backend: TaylorBackend, call: AttentionCall) -> tuple[Any, ...] | None:
    """What a choice holds for; None where the call's place in a run is not known."""
    if call.sigma is None or call.block is None:
        return None
    return (KIND, backend.name, backend.options, call.signature, call.fingerprint, call.cond_or_uncond, call.target_error, call.scale,
            call.block, sigma_bin(call.sigma))


def _choose(backend: AnyTaylor, call: AttentionCall) -> AnyTaylor | str:
    """The backend with the series to use, or why none is: no candidate meets the error. Reads the device once."""
    tried = candidates(backend, call)
    found = errors(tried, call).tolist()
    best = min(zip(found, tried, strict=True), key=lambda pair: pair[0])
    log.debug("taylor_patch: %s: error_aimed: block %s, sigma %s: least error %.3g with P %d, %s; %.3g asked for", backend.name, call.block,
              call.sigma, best[0], best[1].options.P, best[1].options.coefficients, call.target_error)
    for p in sorted({candidate.options.P for candidate in tried}):
        error, chosen = min((pair for pair in zip(found, tried, strict=True) if p == pair[1].options.P), key=lambda pair: pair[0])
        if error <= MARGIN * call.target_error:
            return chosen
    most = tried[-1].options.P
    more = f" (P {most + 1} has no fewer features than the {call.k.shape[2]} keys)" if most < backend.options.P else ""
    return f"error_aimed: no P up to {most} meets the error asked for{more}"


@torch.no_grad()
def errors(tried: list[Any], call: AttentionCall) -> Tensor:
    """[candidates] float32 on the device: relative L2 error over the rows of all heads against attention on the unmodified q and k;
    infinite where more denominators than the options allow are not above eps, or something is not finite.

    Of the series alone, in float32: what features and sums in 16 bits add (some .004 in bfloat16) is not in it; MARGIN covers it for
    errors from .005 up."""
    o = tried[0].options
    rows = spread(call.q.shape[2], ROWS, 0)
    apart = torch.zeros(len(tried), device=call.q.device)
    bad, size, count = torch.zeros_like(apart), torch.zeros((), device=call.q.device), 0
    for part in _head_groups(call, rows, o.sub_head_blocks):
        logits = part.scale * part.q @ part.k.transpose(-1, -2)
        mask = 0.0 if part.key_mask is None else part.key_mask[:, None, None]
        exact = torch.softmax(logits + mask, -1) @ part.v
        size += exact.square().sum()
        for number, candidate in enumerate(tried):
            out, denominators = polynomial(candidate, part)
            apart[number] += (out - exact).square().sum()
            bad[number] += (~(denominators > o.eps)).sum()
        count += denominators.numel()
    allowed = bad <= o.denom_fallback_frac_limit * count if o.fallback_on_negative else torch.ones_like(bad, dtype=torch.bool)
    found = (apart / size.clamp_min(torch.finfo(torch.float32).tiny)).sqrt()
    return torch.where(allowed & found.isfinite(), found, torch.inf)


def _head_groups(call: AttentionCall, rows: slice, blocks: int) -> Iterator[AttentionCall]:
    """The rows of a few query heads at a time with all their keys, float32, a key head for every query head. blocks: sub_head_blocks."""
    heads = call.q.shape[1]
    most = max(1, WORKSPACE // _head_nbytes(call, blocks))
    group = heads // call.k.shape[1]
    for first in range(0, heads, most):
        wanted = slice(first, min(first + most, heads))
        shared = torch.arange(wanted.start, wanted.stop, device=call.k.device) // group
        k, v = (x.index_select(1, shared).float() for x in (call.k, call.v))
        yield dataclasses.replace(call, q=call.q[:, wanted, rows].float(), k=k, v=v)


def _head_nbytes(call: AttentionCall, blocks: int) -> int:
    """Bytes that the comparison of one head takes: k and v, k as the options change it and centred; the logits and their softmax, and of
    each sub-head five arrays of the polynomial."""
    return 4 * call.q.shape[0] * call.k.shape[2] * (4 * call.q.shape[-1] + ROWS * (1 + 5 * blocks))


def workspace_nbytes(call: AttentionCall, blocks: int) -> int:
    """Bytes that the comparison takes, at most. blocks: sub_head_blocks."""
    one = _head_nbytes(call, blocks)
    return one * min(call.q.shape[1], max(1, WORKSPACE // one))
