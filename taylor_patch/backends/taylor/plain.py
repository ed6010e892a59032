"""`taylor_torch`: global Taylor attention in plain PyTorch, on any device. The oracle of the Triton forms.

exp(s) ~ sum_{p<P} c_p s^p/p! with s = scale * q.k. In the symmetric basis that is psi(q).psi(k), so
out = psi(q) S / psi(q) Z with S = sum_j psi(k_j) v_j^T and Z = sum_j psi(k_j): linear in the number of tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from taylor_patch.backends.taylor.base import TaylorBackend
from taylor_patch.backends.taylor.denominators import DenominatorStats, denominators_of, mask_weight
from taylor_patch.call import AttentionCall
from taylor_patch.features import coefficients as series
from taylor_patch.features.symmetric import feature_count, index_chunks, monomials

ROWS = 256
"""Queries and keys a step where the options say "auto"."""


class TaylorTorch(TaylorBackend):
    """Global Taylor attention in plain PyTorch; accurate only where the logits of a row spread by less than about 1."""

    name = "taylor_torch"
    summary = "global Taylor attention in plain PyTorch: an oracle and a teaching form, for diffuse attention"
    priority = 10
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})

    @property
    def _rows_q(self) -> int:
        return ROWS if self.options.block_size_q == "auto" else self.options.block_size_q

    @property
    def _rows_k(self) -> int:
        return ROWS if self.options.block_size_k == "auto" else self.options.block_size_k

    def series_nbytes(self, call: AttentionCall) -> int:
        """Upper estimate for one head: float32 copies of its q, k and v, the sums of its queries, and the largest feature tiles."""
        o = self.options
        _, heads, n_q, head_dim = call.q.shape
        features = min(o.fused_feature_chunk_size, feature_count(head_dim // o.sub_head_blocks, o.P))
        rows = max(min(self._rows_q, n_q), min(self._rows_k, call.k.shape[2]))
        per_head = 2 * n_q * (head_dim + 1) + 3 * call.k.shape[2] * head_dim
        return 4 * (per_head + heads * n_q * o.sub_head_blocks + 2 * rows * features + 2 * features * (head_dim + 1))

    def attend(self, call: AttentionCall) -> Tensor:
        """See TaylorBackend.attend."""
        o = self.options
        heads, width = call.q.shape[1], call.q.shape[-1] // o.sub_head_blocks
        weight = None if call.key_mask is None else mask_weight(call.key_mask)
        q_factor, k_factor = self.norm_factor(call.q, call.sigma), self.norm_factor(call.k, call.sigma)
        exact = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        parts = []
        for b in range(call.q.shape[0]):
            w = None if weight is None else weight[b % weight.shape[0]]
            share = torch.full((call.k.shape[2],), 1 / call.k.shape[2], dtype=exact, device=call.k.device)
            if w is not None:
                share = (w / w.sum()).to(exact)
            for h in range(heads):
                kv_head = h * call.k.shape[1] // heads
                for first in range(0, call.q.shape[-1], width):
                    cols = slice(first, first + width)
                    parts.append((b, h, kv_head, cols, share))
        if o.early_probe and o.fallback_on_negative:
            self.check_denominators(_stats([self._probe(*self._inputs(call, q_factor, k_factor, *part)[:2], part[-1])
                                            for part in parts], o.eps), probe=True)
        out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        found = []
        for part in parts:
            qs, ks, v = self._inputs(call, q_factor, k_factor, *part)
            numerator, denominator = self._series(qs, ks, v, part[-1], call.q.dtype)
            out[part[0], part[1]][:, part[3]] = (numerator / denominator[:, None]).to(out.dtype)
            found.append(denominator)
        self.check_denominators(_stats(found, o.eps), probe=False)
        return out

    def _inputs(self, call: AttentionCall, q_factor: Tensor | None, k_factor: Tensor | None, b: int, h: int, kv_head: int, cols: slice,
                share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k of one sub-head block, each times sqrt(scale) so that monomials stay near 1, keys centred; v. All [N, D]."""
        root, scale = math.sqrt(abs(self.scale(call))), self.scale(call)
        q, k, v = call.q[b, h][:, cols].to(share.dtype), call.k[b, kv_head][:, cols].to(share.dtype), call.v[b, kv_head][:, cols]
        if q_factor is not None:
            q = q * q_factor[b, h][:, None]
        if k_factor is not None:
            k = k * k_factor[b, kv_head][:, None]
        if self.options.center_keys:
            k = k - share @ k
        return q * math.copysign(root, scale), k * root, v.to(share.dtype)

    def _probe(self, qs: Tensor, ks: Tensor, share: Tensor) -> Tensor:
        """Denominators of evenly spaced queries from their logits."""
        o = self.options
        samples = min(o.probe_samples, qs.shape[0])
        rows = (2 * torch.arange(samples, device=qs.device) + 1) * qs.shape[0] // (2 * samples)
        x = qs[rows] @ ks.T
        sums = torch.stack([(share * x**p).sum(1) for p in range(o.P)], -1)
        return denominators_of(sums, o.coefficients == "hermite")

    def _series(self, qs: Tensor, ks: Tensor, v: Tensor, share: Tensor, feature_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """qs [N_q, D], ks, v [N_kv, D], share [N_kv] -> numerator [N_q, D], denominator [N_q], divided by the sum of weights."""
        o = self.options
        exact = qs.dtype
        dtype = exact if o.force_fp32 else feature_dtype
        coefficient = series.taylor(o.P, qs[:, 0])
        if o.coefficients == "hermite":
            covariance = (ks * share[:, None]).T @ ks
            coefficient = series.hermite(o.P, ((qs @ covariance) * qs).sum(1).clamp_min(0))
        numerator = torch.zeros(qs.shape[0], v.shape[1], dtype=exact, device=qs.device)
        denominator = torch.zeros(qs.shape[0], dtype=exact if o.denom_fp32 else dtype, device=qs.device)
        columns = torch.arange(v.shape[1]).split(o.fused_value_chunk_size or v.shape[1])
        for degree in range(o.P):
            for indices, weights in index_chunks(qs.shape[1], degree, o.fused_feature_chunk_size, qs.device):
                factor = (weights / math.factorial(degree)).to(exact)
                for part in columns:
                    cols = slice(int(part[0]), int(part[-1]) + 1)
                    s, z = self._state(ks, v[:, cols], share, indices, dtype)
                    s, z = s * factor[:, None], z * factor
                    if o.s_store_bf16:
                        s = s.bfloat16()
                    for rows in torch.arange(qs.shape[0], device=qs.device).split(self._rows_q):
                        psi = monomials(qs[rows], indices).to(dtype)
                        c = coefficient[rows, degree]
                        numerator[rows, cols] += c[:, None] * (psi @ s.to(dtype)).to(exact)
                        if cols.start == 0:
                            denominator[rows] += (c * (psi.to(denominator.dtype) @ z.to(denominator.dtype))).to(denominator.dtype)
        return numerator, denominator.to(exact)

    def _state(self, ks: Tensor, v: Tensor, share: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """S [F, D] = sum_j share_j psi(k_j) v_j^T and Z [F] = sum_j share_j psi(k_j), accumulated over key blocks."""
        s = torch.zeros(indices.shape[0], v.shape[1], dtype=v.dtype, device=v.device)
        z = torch.zeros(indices.shape[0], dtype=v.dtype, device=v.device)
        for rows in torch.arange(ks.shape[0], device=ks.device).split(self._rows_k):
            psi = monomials(ks[rows], indices)
            s += (psi.to(dtype).T @ (share[rows, None] * v[rows]).to(dtype)).to(s.dtype)
            z += psi.T @ share[rows]
        return s, z


def _stats(denominators: list[Tensor], eps: float) -> DenominatorStats:
    """Statistics of the denominators of all heads; one read from the device."""
    every = torch.cat(denominators).double()
    bad, least, greatest, mean = torch.stack([(~(every > eps)).double().mean(), every.min(), every.max(), every.mean()]).tolist()
    return DenominatorStats(every.numel(), bad, least, greatest, mean)
