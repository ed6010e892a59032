"""`near_far`: exact near field, second-order Taylor (cumulant) far field per key block.

reference.py has the formula in plain PyTorch, for any device; on NVIDIA GPUs with Triton the kernels of prepare.py, routing.py
and kernel.py compute the same.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend
from taylor_patch.backends.near_far import plan, reference
from taylor_patch.backends.near_far.reference import attend_head, gather_blocks, route
from taylor_patch.call import AttentionCall

__all__ = ["NearFar", "NearFarOptions", "attend_head", "gather_blocks", "route"]


@dataclass(frozen=True)
class NearFarOptions:
    """Options of [backends.near_far]."""

    min_tokens: int = 100
    density: float | Literal["auto"] = "auto"
    tail: Literal["cumulant", "zeroth", "none"] = "cumulant"

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value; empty when all is well."""
        found = {}
        if self.min_tokens < 1:
            found["min_tokens"] = f"{self.min_tokens} is below 1"
        if self.density != "auto" and not 0 < self.density <= 1:
            found["density"] = f'{self.density} is not "auto" or above 0 and at most 1'
        return found

    def exact_share(self, target_error: float) -> float:
        """Share of exact blocks for a relative L2 error aimed at; a fixed table where density is "auto"."""
        if self.density != "auto":
            return self.density
        return 0.40 if target_error <= 0.02 else 0.15 if target_error <= 0.05 else 0.06


@cache
def has_triton() -> bool:
    """True where Triton is installed; it is imported at the first call that runs a kernel."""
    return importlib.util.find_spec("triton") is not None


class NearFar(Backend):
    """Exact near field and cumulant far field; the tokens' grid must be known."""

    name = "near_far"
    summary = "exact for important neighbours, second-order Taylor for the rest; accurate on trained models"
    priority = 100
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    head_dims = range(16, 257)
    cross_attention = False
    needs_grid = True
    options_type = NearFarOptions
    options: NearFarOptions

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        reasons = list(super().reasons_against(call))
        if call.q.shape[2] < self.options.min_tokens:
            reasons.append(f"fewer tokens than min_tokens = {self.options.min_tokens}")
        if call.scale <= 0:
            reasons.append(f"scale {call.scale} is not positive")
        if call.q.device.type == "cuda" and has_triton() and call.q.dtype == torch.float32 and call.q.shape[3] > 128:
            reasons.append("float32 with head_dim above 128 does not fit in shared memory")
        return tuple(reasons)

    def crossover_tokens(self, device: torch.device) -> int | None:
        """See Backend.crossover_tokens."""
        return plan.CROSSOVER_TOKENS.get(plan.capability_of(device)) if has_triton() else None

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """See Backend.workspace_nbytes."""
        if call.q.device.type == "cuda" and has_triton():
            return plan.of_call(call).workspace_nbytes
        return reference.workspace_nbytes(call, self.options.exact_share(call.target_error))

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run."""
        density = self.options.exact_share(call.target_error)
        if call.q.device.type != "cuda" or not has_triton():
            return reference.attend(call, density, self.options.tail)
        from taylor_patch.backends.near_far import op

        return op.attend(call, density, self.options.tail)
