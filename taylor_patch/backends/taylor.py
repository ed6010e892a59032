"""What the global Taylor backends share: options, gates, refusals, and the rules for denominators."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from taylor_patch.backends import taylor_auto_tune as auto_tune
from taylor_patch.backends.base import Backend, Fallback
from taylor_patch.call import AttentionCall
from taylor_patch.features import coefficients as series
from taylor_patch.features.symmetric import feature_count, tables
from taylor_patch.features.tiles import pair_table
from taylor_patch.options import option

log = logging.getLogger("taylor_patch")


@dataclass(frozen=True)
class TaylorOptions:
    """Options of the global Taylor backends, under [backends.taylor_torch], [backends.triton_full], [backends.triton_fused]."""

    P: int = option(4, "Taylor terms: features have degree 0 to P - 1", at_least=1)
    min_tokens: int = option(100, "calls with fewer queries or keys are exact", at_least=1)
    max_feature_dim_R: int = option(
        370_000, "calls with more features are exact: R = C(d + P - 1, P - 1), d = head_dim / sub_head_blocks", at_least=1)
    max_head_dim: int = option(128, "calls with a larger head_dim are exact", at_least=1)
    preset: Literal["none", "seed"] = option(
        "none", '`"seed"`: P 4, sub_head_blocks 4, block_size_q 32, block_size_k 16, min_tokens 100 in place of options left at their defaults')
    sub_head_blocks: int = option(
        1, "parts of a head that attend each on its own; above 1 that is another model than the one that was trained. Must divide head_dim",
        at_least=1)
    center_keys: bool = option(True, "subtract the mean key: the softmax stays as it is, the logits get smaller")
    coefficients: Literal["taylor", "hermite"] = option(
        "taylor", 'of the series: Taylor\'s, or those that are best for normally distributed logits (`"hermite"` needs center_keys)')
    block_size_q: Literal["auto", 16, 32, 64, 128, 256] = option(
        "auto", 'queries worked on at a time; `"auto"`: tuned for each kernel, 256 in `taylor_torch`')
    block_size_k: Literal["auto", 16, 32, 64, 128, 256] = option(
        "auto", 'keys worked on at a time; `"auto"`: tuned for each kernel, 256 in `taylor_torch`')
    qk_normalize: bool = option(False, "give every row of q and k the L2 norm 1; norms are those of whole heads")
    qk_norm_clip: float = option(0.0, "clip the norms of q and k to this; `0`: off", at_least=0)
    qk_norm_power: float = option(0.0, "divide rows of q and k by their norm to this power, after clipping; `0`: off", at_least=0)
    qk_norm_sigma_max: float = option(0.0, "change norms (and let auto_tune do so) at sigmas up to this only; `0`: at all", at_least=0)
    scale_mul: float = option(1.0, "factor on the scale of q.k", above=0)
    force_fp32: bool = option(False, "make and multiply features in float32; `false`: in q's dtype")
    denom_fp32: bool = option(True, "keep the sums of denominators in float32 where q's dtype is shorter")
    eps: float = option(1e-6, "denominators not above this are bad", at_least=0)
    fallback_on_negative: bool = option(True, "exact attention for calls with too many bad denominators; `false`: their results are used")
    denom_fallback_frac_limit: float = option(0.0, "largest share of a call's denominators that may be bad", at_least=0, at_most=1)
    early_probe: bool = option(True, "look at the denominators of some queries first, and spare the full work where too many are bad")
    probe_samples: int = option(16, "queries a head that early_probe looks at", at_least=1)
    fused_feature_chunk_size: int = option(8192, "features made at a time; `triton_full` makes all of a degree at once", at_least=1)
    fused_value_chunk_size: int = option(0, "columns of v worked on at a time; `0`: all", at_least=0)
    s_store_bf16: bool = option(False, "store the sums of features times values in bfloat16")
    taylor_sigma_max: float = option(0.0, "exact at sigmas above this; `0`: at none", at_least=0)
    taylor_layer_start: int = option(-1, "exact in blocks before this one, counted over the whole model from 0; `-1`: in none", at_least=-1)
    taylor_layer_end: int = option(-1, "exact in blocks after this one; `-1`: in none", at_least=-1)
    allow_cross_attention: bool = option(True, "`false`: calls with other numbers of keys than of queries are exact")
    auto_tune: bool = option(
        False, "look for the best qk_norm_power, qk_norm_clip and scale_mul in a run's first steps, which are exact, and keep them for the run")
    auto_tune_steps: int = option(1, "steps that the search lasts", at_least=1)
    auto_tune_candidates: int = option(8, "settings drawn from the ranges below; those configured are one more", at_least=1)
    auto_tune_quality_samples: int = option(4, "query rows on which a call scores the candidates", at_least=1)
    auto_tune_seed: int = option(0, "seed of the drawing")
    auto_tune_max_tokens: int = option(512, "most keys against which a call scores the candidates", at_least=1)
    auto_tune_qk_norm_power_min: float = option(0.2, "least qk_norm_power drawn", at_least=0)
    auto_tune_qk_norm_power_max: float = option(0.7, "largest qk_norm_power drawn; not below the least", at_least=0)
    auto_tune_qk_norm_clip_min: float = option(8.0, "least qk_norm_clip drawn", at_least=0)
    auto_tune_qk_norm_clip_max: float = option(20.0, "largest qk_norm_clip drawn; not below the least", at_least=0)
    auto_tune_scale_mul_min: float = option(0.8, "least scale_mul drawn", above=0)
    auto_tune_scale_mul_max: float = option(1.0, "largest scale_mul drawn; not below the least", above=0)
    log_shapes: bool = option(True, "a line at DEBUG for every call: its shapes, step, sigma and block")
    log_fallbacks: bool = option(True, "a line at DEBUG for every call that is handed to exact attention, with the reason")

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value besides bounds; empty when all is well."""
        found = {}
        for name in auto_tune.TUNED:
            least, most = f"auto_tune_{name}_min", f"auto_tune_{name}_max"
            if getattr(self, most) < getattr(self, least):
                found[most] = f"{getattr(self, most)} is below {least} = {getattr(self, least)}"
        if self.coefficients == "hermite" and not self.center_keys:
            found["coefficients"] = '"hermite" needs center_keys = true: its logits are taken to have mean 0'
        return found

    def resolved(self) -> TaylorOptions:
        """These options with the preset's values in place of those left at their defaults; preset is then "none"."""
        if self.preset == "none":
            return self
        default = TaylorOptions()
        changed = {name: value for name, value in SEED_PRESET.items() if getattr(self, name) == getattr(default, name)}
        return dataclasses.replace(self, preset="none", **changed)  # type: ignore[arg-type]


SEED_PRESET = {"P": 4, "sub_head_blocks": 4, "block_size_q": 32, "block_size_k": 16, "min_tokens": 100}
"""The defaults of the experiment that this package comes from."""


@dataclass(frozen=True)
class DenominatorStats:
    """Denominators of one call or of its probe: how many, the fraction not above eps, and their range."""

    count: int
    bad_fraction: float
    least: float
    greatest: float
    mean: float

    def __str__(self) -> str:
        return (f"{self.bad_fraction:.4g} of {self.count} denominators not above eps "
                f"(least {self.least:.4g}, greatest {self.greatest:.4g}, mean {self.mean:.4g})")


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
            count = feature_count(block_dim, o.P)
            if count > o.max_feature_dim_R:
                reasons.append(f"R = {count} features above max_feature_dim_R = {o.max_feature_dim_R} "
                               f"(head_dim {head_dim}, block_dim {block_dim}, P {o.P})")
        if not o.allow_cross_attention and not call.self_attention:
            reasons.append("allow_cross_attention = false")
        return tuple(reasons)

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run. Raises Fallback when a gate is shut or too many denominators are not above eps."""
        self.last_R = feature_count(call.q.shape[-1] // self.options.sub_head_blocks, self.options.P)
        self.last_probe = self.last_denominators = None
        if self.options.log_shapes:
            log.debug("taylor_patch: %s: q %s, k %s, %s, step %s, sigma %s, block %s", self.name, list(call.q.shape),
                      list(call.k.shape), call.q.dtype, call.step, call.sigma, call.block)
        try:
            self._check_gates(call)
            if not self.options.auto_tune:
                return self.attend(call)
            chosen = auto_tune.settle(self, call)
            chosen.last_probe = chosen.last_denominators = None
            try:
                return chosen.attend(call)
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


def mask_weight(mask: Tensor) -> Tensor:
    """Additive key mask [B, N_kv] -> weights exp(mask - max) [B, N_kv] in 0 to 1; 0 hides a key."""
    top = mask.amax(1, keepdim=True)
    return torch.where(top.isfinite(), torch.exp(mask - top), torch.zeros_like(mask))


def denominators_of(power_sums: Tensor, hermite: bool) -> Tensor:
    """Power sums of logits over the keys [..., P] (weights in power 0) -> denominators [...] divided by the sum of weights."""
    terms = power_sums.shape[-1]
    means = power_sums / power_sums[..., :1]
    coefficient = series.hermite(terms, means[..., 2]) if hermite and terms > 2 else torch.ones_like(means)
    factorials = torch.tensor([math.factorial(p) for p in range(terms)], dtype=means.dtype, device=means.device)
    return (coefficient * means / factorials).sum(-1)


def stats_of(summary: Sequence[float], count: int) -> DenominatorStats:
    """(bad ones, least, greatest, sum) of `count` denominators, as statistics."""
    bad, least, greatest, total = summary
    return DenominatorStats(count, bad / count, least, greatest, total / count)
