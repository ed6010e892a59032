"""`taylor_torch`: global Taylor attention in plain PyTorch, on any device. The oracle of the Triton forms.

exp(s) ~ sum_{p<P} c_p s^p/p! with s = scale * q.k. In the symmetric basis that is psi(q).psi(k), so
out = psi(q) S / psi(q) Z with S = sum_j psi(k_j) v_j^T and Z = sum_j psi(k_j): linear in the number of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.call import AttentionCall
from taylor_patch.features import coefficients as series
from taylor_patch.features.symmetric import feature_count, index_chunks, monomials


@dataclass(frozen=True)
class TaylorOptions:
    """Options of the global Taylor backends, under [backends.taylor_torch]."""

    P: int = 4
    min_tokens: int = 100
    max_feature_dim_R: int = 370_000
    max_head_dim: int = 128
    sub_head_blocks: int = 1
    center_keys: bool = True
    coefficients: Literal["taylor", "hermite"] = "taylor"
    block_size_q: int = 256
    block_size_k: int = 256
    fused_feature_chunk_size: int = 8192
    force_fp32: bool = False
    denom_fp32: bool = True
    eps: float = 1e-6
    fallback_on_negative: bool = True
    denom_fallback_frac_limit: float = 0.0
    allow_cross_attention: bool = True

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value; empty when all is well."""
        found = {}
        for name in ("P", "min_tokens", "max_feature_dim_R", "max_head_dim", "sub_head_blocks", "block_size_q",
                     "block_size_k", "fused_feature_chunk_size"):
            if getattr(self, name) < 1:
                found[name] = f"{getattr(self, name)} is below 1"
        if self.eps < 0:
            found["eps"] = f"{self.eps} is below 0"
        if not 0 <= self.denom_fallback_frac_limit <= 1:
            found["denom_fallback_frac_limit"] = f"{self.denom_fallback_frac_limit} is outside 0 to 1"
        if self.coefficients == "hermite" and not self.center_keys:
            found["coefficients"] = '"hermite" needs center_keys = true: its logits are taken to have mean 0'
        return found


class TaylorTorch(Backend):
    """Global Taylor attention in plain PyTorch; accurate only where the logits of a row spread by less than about 1."""

    name = "taylor_torch"
    summary = "global Taylor attention in plain PyTorch: an oracle and a teaching form, for diffuse attention"
    priority = 10
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    options_type = TaylorOptions
    options: TaylorOptions

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        o, head_dim = self.options, call.q.shape[-1]
        reasons = list(super().reasons_against(call))
        if min(call.q.shape[2], call.k.shape[2]) < o.min_tokens:
            reasons.append(f"fewer tokens than min_tokens = {o.min_tokens}")
        if head_dim > o.max_head_dim:
            reasons.append(f"head_dim {head_dim} above max_head_dim = {o.max_head_dim}")
        if head_dim % o.sub_head_blocks:
            reasons.append(f"head_dim {head_dim} is not a multiple of sub_head_blocks = {o.sub_head_blocks}")
        else:
            block_dim = head_dim // o.sub_head_blocks
            count = feature_count(block_dim, o.P)
            if count > o.max_feature_dim_R:
                reasons.append(f"R = {count} features above max_feature_dim_R = {o.max_feature_dim_R} "
                               f"(head_dim {head_dim}, block_dim {block_dim}, P {o.P})")
        if not o.allow_cross_attention and not call.self_attention:
            reasons.append("allow_cross_attention = false")
        return tuple(reasons)

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """Accumulators of one batch entry plus the largest feature tiles."""
        o = self.options
        _, heads, n_q, head_dim = call.q.shape
        features = min(o.fused_feature_chunk_size, feature_count(head_dim // o.sub_head_blocks, o.P))
        rows = max(min(o.block_size_q, n_q), min(o.block_size_k, call.k.shape[2]))
        accumulators = heads * n_q * (head_dim + o.sub_head_blocks)
        return 4 * (accumulators + 2 * rows * features + features * (head_dim + 1) + heads * 2 * call.k.shape[2] * head_dim)

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run. Raises Fallback when too many denominators are not above eps."""
        o = self.options
        heads, blocks = call.q.shape[1], o.sub_head_blocks
        weight = None if call.key_mask is None else mask_weight(call.key_mask)
        out = torch.empty(call.q.shape, dtype=call.q.dtype, device=call.q.device)
        for b in range(call.q.shape[0]):
            w = None if weight is None else weight[b % weight.shape[0]]
            for h in range(heads):
                kv_head = h * call.k.shape[1] // heads
                for part in torch.arange(call.q.shape[-1]).chunk(blocks):
                    cols = slice(int(part[0]), int(part[-1]) + 1)
                    numerator, denominator = self._series(call.q[b, h][:, cols], call.k[b, kv_head][:, cols],
                                                          call.v[b, kv_head][:, cols], call.scale, w)
                    self._check(denominator)
                    out[b, h][:, cols] = (numerator / denominator[:, None]).to(out.dtype)
        return out

    def _check(self, denominator: Tensor) -> None:
        o = self.options
        bad = float((~(denominator > o.eps)).double().mean())
        if o.fallback_on_negative and bad > o.denom_fallback_frac_limit:
            raise Fallback("denominators not above eps")

    def _series(self, q: Tensor, k: Tensor, v: Tensor, scale: float, w: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [N_q, D], k, v [N_kv, D], w [N_kv] -> numerator [N_q, D], denominator [N_q], divided by the sum of w."""
        o = self.options
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        dtype = exact if o.force_fp32 or q.dtype == torch.float64 else q.dtype
        k, v = k.to(exact), v.to(exact)
        share = torch.full_like(k[:, 0], 1 / k.shape[0]) if w is None else (w / w.sum()).to(exact)
        if o.center_keys:
            k = k - share @ k
        # sqrt(scale) on each side keeps the monomials of both near 1.
        root = math.sqrt(abs(scale))
        qs, ks = q.to(exact) * math.copysign(root, scale), k * root
        coefficient = series.taylor(o.P, qs[:, 0])
        if o.coefficients == "hermite":
            covariance = (ks * share[:, None]).T @ ks
            coefficient = series.hermite(o.P, ((qs @ covariance) * qs).sum(1).clamp_min(0))
        numerator = torch.zeros(q.shape[0], v.shape[1], dtype=exact, device=q.device)
        denominator = torch.zeros(q.shape[0], dtype=exact if o.denom_fp32 else dtype, device=q.device)
        for degree in range(o.P):
            for indices, weights in index_chunks(q.shape[1], degree, o.fused_feature_chunk_size, q.device):
                s, z = self._state(ks, v, share, indices, dtype)
                factor = (weights / math.factorial(degree)).to(exact)
                s, z = s * factor[:, None], z * factor
                for rows in torch.arange(q.shape[0], device=q.device).split(o.block_size_q):
                    psi = monomials(qs[rows], indices).to(dtype)
                    c = coefficient[rows, degree]
                    numerator[rows] += c[:, None] * (psi @ s.to(dtype)).to(exact)
                    denominator[rows] += (c * (psi.to(denominator.dtype) @ z.to(denominator.dtype))).to(denominator.dtype)
        return numerator, denominator.to(exact)

    def _state(self, ks: Tensor, v: Tensor, share: Tensor, indices: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """S [F, D] = sum_j share_j psi(k_j) v_j^T and Z [F] = sum_j share_j psi(k_j), accumulated over key blocks."""
        s = torch.zeros(indices.shape[0], v.shape[1], dtype=v.dtype, device=v.device)
        z = torch.zeros(indices.shape[0], dtype=v.dtype, device=v.device)
        for rows in torch.arange(ks.shape[0], device=ks.device).split(self.options.block_size_k):
            psi = monomials(ks[rows], indices)
            s += (psi.to(dtype).T @ (share[rows, None] * v[rows]).to(dtype)).to(s.dtype)
            z += psi.T @ share[rows]
        return s, z


def mask_weight(mask: Tensor) -> Tensor:
    """Additive key mask [B, N_kv] -> weights exp(mask - max) [B, N_kv] in 0 to 1; 0 hides a key."""
    top = mask.amax(1, keepdim=True)
    return torch.where(top.isfinite(), torch.exp(mask - top), torch.zeros_like(mask))
