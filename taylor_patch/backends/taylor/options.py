"""Options of the global Taylor backends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from taylor_patch.options import option

TUNED = ("qk_norm_power", "qk_norm_clip", "scale_mul")
"""The options that auto_tune looks for."""


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
    error_aimed: bool = option(
        False, "P is the most that is tried: each block takes the least P, and the better coefficients, that meet `quality` on 64 rows a head, "
        "for a sixteenth of the noise scale at a time, and is exact where none do")
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
        for name in TUNED:
            least, most = f"auto_tune_{name}_min", f"auto_tune_{name}_max"
            if getattr(self, most) < getattr(self, least):
                found[most] = f"{getattr(self, most)} is below {least} = {getattr(self, least)}"
        if self.coefficients == "hermite" and not self.center_keys:
            found["coefficients"] = '"hermite" needs center_keys = true: its logits are taken to have mean 0'
        if self.error_aimed and self.P < 2:
            found["P"] = f"{self.P} leaves error_aimed nothing to try; it begins at 2"
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
