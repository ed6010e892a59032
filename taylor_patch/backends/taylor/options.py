"""Options of the global Taylor backends."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

TUNED = ("qk_norm_power", "qk_norm_clip", "scale_mul")
"""The options that auto_tune looks for."""


@dataclass(frozen=True)
class TaylorOptions:
    """Options of the global Taylor backends, under [backends.taylor_torch], [backends.triton_full], [backends.triton_fused].

    Zero switches off qk_norm_clip, qk_norm_power, qk_norm_sigma_max, taylor_sigma_max, and stands for all values in
    fused_value_chunk_size; -1 switches off taylor_layer_start and taylor_layer_end. Norms are those of whole heads, before
    sub_head_blocks splits them. auto_tune draws auto_tune_candidates settings of qk_norm_power, qk_norm_clip and scale_mul from
    their ranges; those configured are one candidate more.
    """

    P: int = 4
    min_tokens: int = 100
    max_feature_dim_R: int = 370_000
    max_head_dim: int = 128
    preset: Literal["none", "seed"] = "none"
    sub_head_blocks: int = 1
    center_keys: bool = True
    coefficients: Literal["taylor", "hermite"] = "taylor"
    block_size_q: int | Literal["auto"] = "auto"
    block_size_k: int | Literal["auto"] = "auto"
    qk_normalize: bool = False
    qk_norm_clip: float = 0.0
    qk_norm_power: float = 0.0
    qk_norm_sigma_max: float = 0.0
    scale_mul: float = 1.0
    force_fp32: bool = False
    denom_fp32: bool = True
    eps: float = 1e-6
    fallback_on_negative: bool = True
    denom_fallback_frac_limit: float = 0.0
    early_probe: bool = True
    probe_samples: int = 16
    fused_feature_chunk_size: int = 8192
    fused_value_chunk_size: int = 0
    s_store_bf16: bool = False
    taylor_sigma_max: float = 0.0
    taylor_layer_start: int = -1
    taylor_layer_end: int = -1
    allow_cross_attention: bool = True
    auto_tune: bool = False
    auto_tune_steps: int = 1
    auto_tune_candidates: int = 8
    auto_tune_quality_samples: int = 4
    auto_tune_seed: int = 0
    auto_tune_max_tokens: int = 512
    auto_tune_qk_norm_power_min: float = 0.2
    auto_tune_qk_norm_power_max: float = 0.7
    auto_tune_qk_norm_clip_min: float = 8.0
    auto_tune_qk_norm_clip_max: float = 20.0
    auto_tune_scale_mul_min: float = 0.8
    auto_tune_scale_mul_max: float = 1.0
    log_shapes: bool = True
    log_fallbacks: bool = True

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value; empty when all is well."""
        found = {}
        for name in ("P", "min_tokens", "max_feature_dim_R", "max_head_dim", "sub_head_blocks", "probe_samples", "fused_feature_chunk_size",
                     "auto_tune_steps", "auto_tune_candidates", "auto_tune_quality_samples", "auto_tune_max_tokens"):
            if getattr(self, name) < 1:
                found[name] = f"{getattr(self, name)} is below 1"
        for name in ("qk_norm_clip", "qk_norm_power", "qk_norm_sigma_max", "fused_value_chunk_size", "taylor_sigma_max", "eps"):
            if getattr(self, name) < 0:
                found[name] = f"{getattr(self, name)} is below 0"
        for name in ("block_size_q", "block_size_k"):
            size = getattr(self, name)
            if size != "auto" and size not in (16, 32, 64, 128, 256):
                found[name] = f'{size} is not "auto" or one of 16, 32, 64, 128, 256'
        for name in ("taylor_layer_start", "taylor_layer_end"):
            if getattr(self, name) < -1:
                found[name] = f"{getattr(self, name)} is below -1"
        for name in TUNED:
            least, most = f"auto_tune_{name}_min", f"auto_tune_{name}_max"
            if getattr(self, least) < 0:
                found[least] = f"{getattr(self, least)} is below 0"
            elif getattr(self, most) < getattr(self, least):
                found[most] = f"{getattr(self, most)} is below {least} = {getattr(self, least)}"
        for name in ("scale_mul", "auto_tune_scale_mul_min"):
            if getattr(self, name) <= 0:
                found[name] = f"{getattr(self, name)} is not above 0"
        if not 0 <= self.denom_fallback_frac_limit <= 1:
            found["denom_fallback_frac_limit"] = f"{self.denom_fallback_frac_limit} is outside 0 to 1"
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
