"""What the global Taylor backends share: gates, refusals, normalisation of rows, and what too many bad denominators lead to."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, TypeVar

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.backends.taylor import auto_tune, error_aimed
from taylor_patch.backends.taylor.denominators import DenominatorStats
from taylor_patch.backends.taylor.options import TaylorOptions
from taylor_patch.call import AttentionCall
from taylor_patch.features.symmetric import feature_count, tables
from taylor_patch.features.tiles import pair_table

AnyTaylor = TypeVar("AnyTaylor", bound="TaylorBackend")

log = logging.getLogger("taylor_patch")


class TaylorBackend(Backend):
    """Base of the global Taylor backends: everything about a call except the arithmetic."""

    options_type = TaylorOptions
    options: TaylorOptions

    def __init__(self, options: TaylorOptions | None = None) -> None:
        super().__init__((options or TaylorOptions()).resolved())
        self.last_R = 0
        self.last_probe: DenominatorStats | None = None
        self.last_denominators: DenominatorStats | None = None

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against. Gates on sigma and block are looked at in run(): a choice is kept for many steps."""
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
            terms = 2 if o.error_aimed else o.P
            count = feature_count(block_dim, terms)
            if count > o.max_feature_dim_R:
                reasons.append(f"R = {count} features above max_feature_dim_R = {o.max_feature_dim_R} "
                               f"(head_dim {head_dim}, block_dim {block_dim}, P {terms})")
            if o.error_aimed and count >= call.k.shape[2]:
                reasons.append(f"error_aimed: P 2 has R = {count} features, not fewer than {call.k.shape[2]} keys")
        if not o.allow_cross_attention and not call.self_attention:
            reasons.append("allow_cross_attention = false")
        return tuple(reasons)

    def variants(self: AnyTaylor, call: AttentionCall) -> list[AnyTaylor]:
        """Who may answer `call`, those with the fewest features first: itself, or with error_aimed itself with every series tried."""
        return error_aimed.candidates(self, call) if self.options.error_aimed else [self]

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """See Backend.workspace_nbytes."""
        compared = error_aimed.workspace_nbytes(call, self.options.sub_head_blocks) if self.options.error_aimed else 0
        return max(compared, *(variant.series_nbytes(call) for variant in self.variants(call)))

    def series_nbytes(self, call: AttentionCall) -> int:
        """Bytes of temporary memory of attend(), from shapes only."""
        raise NotImplementedError

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run. Raises Fallback when a gate is shut or too many denominators are not above eps."""
        self.last_R = 0
        self.last_probe = self.last_denominators = None
        if self.options.log_shapes:
            log.debug("taylor_patch: %s: q %s, k %s, %s, step %s, sigma %s, block %s", self.name, list(call.q.shape),
                      list(call.k.shape), call.q.dtype, call.step, call.sigma, call.block)
        try:
            self._check_gates(call)
            tuned = auto_tune.settle(self, call) if self.options.auto_tune else self
            chosen = error_aimed.settle(tuned, call) if self.options.error_aimed else tuned
            self.last_R = feature_count(call.q.shape[-1] // self.options.sub_head_blocks, chosen.options.P)
            chosen.last_probe = chosen.last_denominators = None
            try:
                return chosen.attend(call)
            except Fallback as reason:
                if self.options.error_aimed:
                    error_aimed.reject(tuned, call, reason)
                raise
            finally:
                self.last_probe, self.last_denominators = chosen.last_probe, chosen.last_denominators
        except Fallback as reason:
            if self.options.log_fallbacks:
                log.debug("taylor_patch: %s: exact attention instead: %s", self.name, reason)
            raise

    def release(self) -> None:
        """See Backend.release: the feature tables, which all global Taylor backends share."""
        tables.clear()
        pair_table.cache_clear()

    def effective(self, call: AttentionCall) -> AttentionCall:
        """See Backend.effective: q and k after the normalisation options, the scale with scale_mul."""
        if self.options.auto_tune and (chosen := auto_tune.settled(self, call)) is not self:
            return chosen.effective(call)
        factors = self.norm_factor(call.q, call.sigma), self.norm_factor(call.k, call.sigma)
        if factors == (None, None) and self.options.scale_mul == 1:
            return call
        q, k = (x if factor is None else (x * factor[..., None]).to(x.dtype) for x, factor in zip((call.q, call.k), factors, strict=True))
        return dataclasses.replace(call, q=q, k=k, scale=self.scale(call))

    def denominators(self) -> dict[str, float] | None:
        """See Backend.denominators; R alone where they were not looked at (fallback_on_negative = false)."""
        return {"R": self.last_R, **({} if self.last_denominators is None else dataclasses.asdict(self.last_denominators))}

    def with_options(self: AnyTaylor, **values: Any) -> AnyTaylor:
        """The same backend with these options in the place of its own."""
        return type(self)(dataclasses.replace(self.options, **values))

    def attend(self, call: AttentionCall) -> Tensor:
        """The arithmetic of run(); calls check_denominators."""
        raise NotImplementedError

    def _check_gates(self, call: AttentionCall) -> None:
        """Raise Fallback where sigma or block lies outside the options' ranges; what is not known shuts no gate."""
        o = self.options
        if o.taylor_sigma_max and call.sigma is not None and call.sigma > o.taylor_sigma_max:
            raise Fallback(f"sigma above taylor_sigma_max = {o.taylor_sigma_max}")
        if call.block is not None:
            if o.taylor_layer_start >= 0 and call.block < o.taylor_layer_start:
                raise Fallback(f"block below taylor_layer_start = {o.taylor_layer_start}")
            if o.taylor_layer_end >= 0 and call.block > o.taylor_layer_end:
                raise Fallback(f"block above taylor_layer_end = {o.taylor_layer_end}")

    def scale(self, call: AttentionCall) -> float:
        """Factor of q.k, scale_mul included."""
        return call.scale * self.options.scale_mul

    def norm_factor(self, x: Tensor, sigma: float | None) -> Tensor | None:
        """Factor of every row of x [B, H, N, D] as float32 [B, H, N], or None where rows stay as they are.

        In this order: L2 normalisation, clipping of the norm, division by norm ** qk_norm_power. Zero rows stay zero.
        """
        o = self.options
        if not (o.qk_normalize or o.qk_norm_clip or o.qk_norm_power):
            return None
        if o.qk_norm_sigma_max and sigma is not None and sigma > o.qk_norm_sigma_max:
            return None
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        norm = torch.linalg.vector_norm(x, dim=-1, dtype=dtype).clamp_min(torch.finfo(torch.float32).tiny ** 0.5)
        factor = torch.ones_like(norm)
        if o.qk_normalize:
            factor, norm = 1 / norm, torch.ones_like(norm)
        if o.qk_norm_clip:
            factor = factor * (o.qk_norm_clip / norm).clamp_max(1)
            norm = norm.clamp_max(o.qk_norm_clip)
        if o.qk_norm_power:
            factor = factor * norm**-o.qk_norm_power
        return factor

    def most_bad(self, count: int) -> int:
        """The most of `count` denominators that may be not above eps: the largest n with n / count within the limit, as check_denominators
        rounds it."""
        limit = self.options.denom_fallback_frac_limit
        most = int(limit * count) + 1
        while most and most / count > limit:
            most -= 1
        return most

    def check_denominators(self, stats: DenominatorStats, probe: bool) -> None:
        """Keep and log the statistics; raise Fallback when fallback_on_negative is set and the fraction exceeds the limit."""
        o = self.options
        what = "probe" if probe else "denominators"
        if probe:
            self.last_probe = stats
        else:
            self.last_denominators = stats
        log.debug("taylor_patch: %s: %s: %s", self.name, what, stats)
        if o.fallback_on_negative and stats.bad_fraction > o.denom_fallback_frac_limit:
            raise Fallback(f"{'probe: ' if probe else ''}fraction {stats.bad_fraction:.1g} of denominators not above eps, "
                           f"limit {o.denom_fallback_frac_limit:g}")
