"""Sampled quality of a call: a backend's result against exact attention, on a few query rows that all figures share."""

from __future__ import annotations

import math
from contextlib import suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from taylor_patch.backends.base import Backend, aligned, expand_kv
from taylor_patch.call import AttentionCall

FIGURES = ("quality_raw", "quality_eff", "q_norm", "k_norm", "logit_p01", "logit_p50", "logit_p99", "logit_max")
"""quality_raw: relative L2 error against attention on the q, k that the model gave; quality_eff: against attention on the q, k that the
backend worked with (after normalisation, say). q_norm, k_norm: mean L2 norms. logit_*: percentiles and largest magnitude of sampled
scale * q.k."""

PERCENTILES = (0.01, 0.5, 0.99)
SAMPLED_KEYS = 64
SORTED_LOGITS = 4096
"""Most values of which percentiles are taken: as many as a GPU sorts in one kernel."""
EVERY_CALLS = 32
"""One in so many calls of an evaluation is sampled, another one each step, so that the cost stays small against attention; in the first
evaluation of a kind (prompts, latent shape) in a run all are."""
ON_BY_STEP = 13
"""By how many calls that moves on from step to step: a model of few calls a step is sampled in every so many steps, too."""
FULL_HEADS = 24
"""With fewer heads (times batch) more rows of each are sampled, so that a figure rests on as many rows: the error of two heads on 16 rows
was half to twice that on all rows (H200, the demo's model at 256 px)."""


def is_sampled(call_number: int, step: int | None, every_steps: int, first: bool) -> bool:
    """Whether the call with this number in its evaluation is looked at. first: no evaluation of its kind has been looked at in this run;
    then every call is."""
    step = step or 0
    return first or (step % every_steps == 0 and (call_number + ON_BY_STEP * (step // every_steps)) % EVERY_CALLS == 0)


def seed_of(call_number: int, step: int | None) -> int:
    """Where the rows and keys of a call begin: another place for every call of an evaluation and in every step."""
    return 1009 * call_number + 31 * (step or 0)


@lru_cache(maxsize=256)
def _largest_prime(most: int) -> int:
    """The largest prime up to `most`; 1 where there is none."""
    return next((n for n in range(most, 1, -1) if all(n % factor for factor in range(2, math.isqrt(n) + 1))), 1)


def spread(total: int, count: int, seed: int) -> slice:
    """`count` (at most `total`) indices of range(total) at even distances, moved along by `seed`.

    A slice, so that taking them costs no kernel. The distance is prime: rows of an image are then not all of a few columns.
    """
    count = min(count, total)
    step = _largest_prime(total // count)
    span = step * (count - 1) + 1
    start = seed % (total - span + 1)
    return slice(start, start + span, step)


def rows_of(call: AttentionCall, samples: int, seed: int) -> slice:
    """The query rows of a call that are sampled: `samples` of them with FULL_HEADS heads or more."""
    heads = call.q.shape[0] * call.q.shape[1]
    return spread(call.q.shape[2], max(samples, -(-samples * FULL_HEADS // heads)), seed)


SPLIT_KEYS = 8192
"""Keys from which exact_rows splits them on a GPU: a few rows a head leave most of it idle otherwise."""
PARTS = 16


def exact_rows(call: AttentionCall, rows: slice) -> Tensor:
    """Exact attention of the S query rows `rows`: float32 [B, H, S, D]."""
    # Query heads that share a key head stand as rows of one head: k and v need no copies for each.
    q = aligned(call.q[:, :, rows].unflatten(1, (call.k.shape[1], -1)).flatten(2, 3))
    k, v = aligned(call.k), aligned(call.v)
    out = _attention(q, k, v, call)
    return out.unflatten(2, (call.q.shape[1] // call.k.shape[1], -1)).flatten(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Exact attention of a few rows, with the call's scale and mask: float32."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.is_cuda and torch.version.hip is None and half and call.key_mask is None and k.shape[2] >= SPLIT_KEYS:
        with suppress(AttributeError, TypeError, RuntimeError):
            return _split_rows(q, k, v, call.scale)
    mask = None if call.key_mask is None else call.key_mask[:, None, None, :].to(call.q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale).float()


def _split_rows(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same with PARTS shares of the keys side by side, merged by their log-sum-exp. Uses an operator behind SDPA, whose form other
    versions of PyTorch may change: then it raises AttributeError, TypeError or RuntimeError."""
    flash = torch.ops.aten._scaled_dot_product_flash_attention
    even = k.shape[2] // PARTS * PARTS
    merged = []
    for one_q, one_k, one_v in zip(q, k, v, strict=True):
        # [H, N, D] -> [parts, H, N / parts, D], without a copy
        parts = [x[:, :even].unflatten(1, (PARTS, -1)).transpose(0, 1) for x in (one_k, one_v)]
        out, top, *_ = flash(one_q.expand(PARTS, -1, -1, -1), *parts, scale=scale)
        if even < k.shape[2]:
            rest, rest_top, *_ = flash(one_q[None], *(x[None, :, even:] for x in (one_k, one_v)), scale=scale)
            out, top = torch.cat((out, rest)), torch.cat((top, rest_top))
        merged.append((torch.softmax(top, 0)[..., None] * out.float()).sum(0))
    return torch.stack(merged)


def relative_error(out: Tensor, reference: Tensor) -> Tensor:
    """|out - reference| / |reference| over all elements, a scalar on the device."""
    return torch.linalg.vector_norm(out - reference) / torch.linalg.vector_norm(reference).clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def distance(out: Tensor, exact: Tensor) -> Tensor:
    """relative_error of [B, H, N, D] tensors over all rows, head by head: in float32 they are large. A scalar on the device."""
    tiny = torch.finfo(torch.float32).tiny
    apart = torch.stack([torch.linalg.vector_norm(a.float() - b.float()) for a, b in zip(out.unbind(1), exact.unbind(1), strict=True)])
    size = torch.stack([torch.linalg.vector_norm(b, dtype=torch.float32) for b in exact.unbind(1)])
    return torch.linalg.vector_norm(apart) / torch.linalg.vector_norm(size).clamp_min(tiny)


@torch.no_grad()
def figures(backend: Backend, call: AttentionCall, out: Tensor, samples: int, seed: int) -> Tensor:
    """FIGURES of one call as float32 [8] on the device; nothing is read back. out: the backend's [B, H, N_q, D].

    What this costs on a GPU is the number of its small kernels, so there are few.
    """
    heads, n_kv = call.q.shape[1], call.k.shape[2]
    rows = rows_of(call, samples, seed)
    ours = out[:, :, rows].float()
    raw = relative_error(ours, exact_rows(call, rows))
    effective = backend.effective(call)
    eff = raw if effective is call else relative_error(ours, exact_rows(effective, rows))
    q, k = call.q[:, :, rows], expand_kv(call.k[:, :, spread(n_kv, SAMPLED_KEYS, seed)], heads)
    vectors = torch.cat((q, k), 2).float()
    norms = torch.linalg.vector_norm(vectors, dim=-1)
    logits = (vectors[:, :, : q.shape[2]] * call.scale @ vectors[:, :, q.shape[2] :].transpose(-1, -2)).flatten()
    step = -(-logits.numel() // SORTED_LOGITS) | 1
    ordered = logits[::step].sort().values
    percentiles = [ordered[round(share * (ordered.numel() - 1))] for share in PERCENTILES]
    return torch.stack([raw, eff, norms[:, :, : q.shape[2]].mean(), norms[:, :, q.shape[2] :].mean(), *percentiles,
                        torch.linalg.vector_norm(logits, math.inf)])
