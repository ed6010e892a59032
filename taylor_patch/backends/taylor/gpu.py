"""`triton_full` and `triton_fused`: global Taylor attention in Triton, linear in the number of tokens.

Both run the same kernels (kernels/). triton_full keeps S and Z of a whole degree, which is fastest while they are
small; triton_fused streams over chunks of features, so that its memory does not depend on how many there are.
"""

from __future__ import annotations

import importlib.util
import os
from typing import ClassVar

import torch
from torch import Tensor

from taylor_patch.backends.compiling import announce
from taylor_patch.backends.taylor.base import TaylorBackend
from taylor_patch.backends.taylor.denominators import mask_weight, stats_of
from taylor_patch.backends.taylor.plan import Plan, make_plan
from taylor_patch.call import AttentionCall
from taylor_patch.features.tiles import BLOCK

MIB = 1 << 20


class TritonTaylor(TaylorBackend):
    """What the two Triton forms share."""

    devices = frozenset({"cuda"})
    head_dims = range(16, 257)
    workspace_limit: ClassVar[int]
    """Bytes that the heads worked on at once may take, unless a single one takes more."""

    def unavailable(self) -> tuple[str, ...]:
        """See Backend.unavailable."""
        reasons = []
        if importlib.util.find_spec("triton") is None:
            reasons.append("Triton is not installed")
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append("no CUDA device")
        return tuple(reasons)

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        reasons = list(super().reasons_against(call))
        block_dim = call.q.shape[-1] // self.options.sub_head_blocks
        if call.q.dtype not in self.dtypes or call.q.shape[-1] % self.options.sub_head_blocks:
            return tuple(reasons)
        if block_dim < 8:
            reasons.append(f"block_dim {block_dim} below 8 (head_dim {call.q.shape[-1]}, sub_head_blocks {self.options.sub_head_blocks})")
        return tuple(reasons)

    @property
    def feature_chunk(self) -> int:
        """Features of a chunk; 0: a whole degree."""
        raise NotImplementedError

    def plan(self, call: AttentionCall) -> Plan:
        """Sizes of the call's work, from shapes alone."""
        o = self.options
        return make_plan(call.q.shape, call.k.shape, call.q.dtype, o.P, o.coefficients == "hermite", o.sub_head_blocks, self.feature_chunk,
                         o.fused_value_chunk_size, o.s_store_bf16, o.force_fp32, self.workspace_limit)

    def series_nbytes(self, call: AttentionCall) -> int:
        """See TaylorBackend.series_nbytes."""
        o = self.options
        return self.plan(call).nbytes(bool(o.auto_tune or o.qk_normalize or o.qk_norm_clip or o.qk_norm_power), call.key_mask is not None)

    def attend(self, call: AttentionCall) -> Tensor:
        """See TaylorBackend.attend. The device is read once, at the end: a probe that fails stops the work on the device itself."""
        from taylor_patch.backends.taylor import launch

        o = self.options
        kind = (call.q.device, call.q.dtype, call.q.shape[1], call.k.shape[1], call.q.shape[3], call.key_mask is None, o)
        announce(self.name, f"head_dim {call.q.shape[3]}, P {o.P}, {str(call.q.dtype).removeprefix('torch.')}", kind)
        rows = (self.norm_factor(call.q, call.sigma), self.norm_factor(call.k, call.sigma),
                None if call.key_mask is None else mask_weight(call.key_mask))
        batch, heads, n_queries, _ = call.q.shape
        states = batch * heads * o.sub_head_blocks
        decides = o.fallback_on_negative and not torch.compiler.is_compiling()
        samples = min(o.probe_samples, n_queries) if o.early_probe and decides else 0
        run = launch.taylor_attention if torch.compiler.is_compiling() else launch.attend
        out, summary = run(
            call.q, call.k, call.v, *rows, self.scale(call), o.P, o.coefficients == "hermite", o.center_keys, o.sub_head_blocks,
            self.feature_chunk, o.fused_value_chunk_size, o.s_store_bf16, o.force_fp32, o.denom_fp32, _size(o.block_size_q),
            _size(o.block_size_k), samples, self.most_bad(states * samples) if samples else 0, o.eps, self.workspace_limit)
        if decides:
            probed, full = summary.tolist()
            if samples:
                self.check_denominators(stats_of(probed, states * samples), probe=True)
            self.check_denominators(stats_of(full, states * n_queries), probe=False)
        return out


def _size(option: int | str) -> int:
    return option if isinstance(option, int) else 0


class TritonFull(TritonTaylor):
    """S and Z of a whole degree at a time."""

    name = "triton_full"
    summary = "global Taylor attention in Triton, all features at once: fastest at modest R, for diffuse attention"
    priority = 30
    workspace_limit = 384 * MIB
    feature_chunk = 0

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against; also refuses where S and Z of one head exceed the workspace bound."""
        reasons = super().reasons_against(call)
        if reasons:
            return reasons
        plan = self.variants(call)[0].plan(call)
        largest = max(plan.state_nbytes(chunk, 1) for chunk in plan.chunks)
        if largest > self.workspace_limit:
            features = max(chunk.blocks for chunk in plan.chunks) * BLOCK
            return (f"S of one head takes {largest // MIB} MiB ({features} features with tile padding), above the bound of "
                    f"{self.workspace_limit // MIB} MiB; triton_fused streams it",)
        return ()


class TritonFused(TritonTaylor):
    """Chunks of fused_feature_chunk_size features, one after the other."""

    name = "triton_fused"
    summary = "global Taylor attention in Triton, features streamed in chunks: any R, for diffuse attention"
    priority = 20
    workspace_limit = 384 * MIB

    @property
    def feature_chunk(self) -> int:
        """See TritonTaylor.feature_chunk."""
        return self.options.fused_feature_chunk_size
