"""`near_far`: exact near field, second-order Taylor (cumulant) far field per key block.

blocks.py and reference.py have the formula in plain PyTorch, for any device, and aim.py the probe that finds the density for a wanted
error; on NVIDIA GPUs with Triton the kernels of prepare.py, routing.py, probing.py and kernel.py compute the same. remembered.py keeps
what probes find, with `remember = true` for later runs too.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from taylor_patch.backends.base import Backend
from taylor_patch.backends.compiling import announce
from taylor_patch.backends.near_far import plan, reference
from taylor_patch.backends.near_far.remembered import Memories
from taylor_patch.call import AttentionCall
from taylor_patch.options import option

__all__ = ["NearFar", "NearFarOptions"]


@dataclass(frozen=True)
class NearFarOptions:
    """Options of [backends.near_far]."""

    min_tokens: int = option(100, "calls with fewer query tokens are exact", at_least=1)
    min_keys: int = option(2048, "cross-attention to fewer keys is exact", at_least=1)
    density: float | Literal["auto"] = option(
        "auto", "share of key blocks that is exact, a block's neighbours in large pictures included and kept; "
        '`"auto"`: what the error asked for takes, found head by head', above=0, at_most=1)
    tail: Literal["cumulant", "zeroth", "none"] = option(
        "cumulant", "the far field: second-order Taylor, block means only, or left out; the latter two need a `density`")
    remember: bool = option(False, "keep on disk what probes have found, and spare later runs some of theirs (ADR 12)")

    def problems(self) -> dict[str, str]:
        """Option -> what is wrong with its value besides bounds; empty when all is well."""
        if self.density == "auto" and self.tail != "cumulant":
            return {"tail": f'"{self.tail}" needs a density; density = "auto" is made for tail = "cumulant"'}
        return {}


@cache
def has_triton() -> bool:
    """True where Triton is installed; it is imported at the first call that runs a kernel."""
    return importlib.util.find_spec("triton") is not None


def runs_kernels(device: torch.device) -> bool:
    """Whether calls on `device` are answered by the Triton kernels; the plain version answers the others."""
    return device.type == "cuda" and has_triton()


class NearFar(Backend):
    """Exact near field and cumulant far field; in self-attention the tokens' grid must be known."""

    name = "near_far"
    summary = "exact for important neighbours, second-order Taylor for the rest; accurate on trained models"
    priority = 100
    devices = frozenset({"cpu", "cuda", "mps", "xpu"})
    head_dims = range(16, 257)
    needs_grid = True
    options_type = NearFarOptions
    options: NearFarOptions

    def __init__(self, options: NearFarOptions | None = None) -> None:
        super().__init__(options)
        self._memories = Memories(self.options.remember)

    def reasons_against(self, call: AttentionCall) -> tuple[str, ...]:
        """See Backend.reasons_against."""
        reasons = list(super().reasons_against(call))
        if call.q.shape[2] < self.options.min_tokens:
            reasons.append(f"fewer tokens than min_tokens = {self.options.min_tokens}")
        if not call.self_attention and call.k.shape[2] < self.options.min_keys:
            reasons.append(f"cross-attention with fewer keys than min_keys = {self.options.min_keys}")
        if call.scale <= 0:
            reasons.append(f"scale {call.scale} is not positive")
        if runs_kernels(call.q.device) and call.q.dtype == torch.float32 and call.q.shape[3] > 128:
            reasons.append("float32 with head_dim above 128 does not fit in shared memory")
        return tuple(reasons)

    def crossover_tokens(self, device: torch.device) -> int | None:
        """See Backend.crossover_tokens."""
        return plan.CROSSOVER_TOKENS.get(plan.capability_of(device)) if has_triton() else None

    def workspace_nbytes(self, call: AttentionCall) -> int:
        """See Backend.workspace_nbytes."""
        if runs_kernels(call.q.device):
            return plan.of_call(call, self.options.density == "auto").workspace_nbytes
        return reference.workspace_nbytes(call, 1.0 if self.options.density == "auto" else self.options.density)

    def run(self, call: AttentionCall) -> Tensor:
        """See Backend.run. With density = "auto" a probe settles each block of the model for each sigma bin of a run."""
        attend, attend_aimed = reference.attend, reference.attend_aimed
        if runs_kernels(call.q.device):
            from taylor_patch.backends.near_far import op

            kind = (call.q.device, self.options.tail, plan.of_call(call, self.options.density == "auto").kernels)
            announce(self.name, f"head_dim {call.q.shape[3]}, {str(call.q.dtype).removeprefix('torch.')}", kind)
            attend, attend_aimed = op.attend, op.attend_aimed
        if self.options.density != "auto":
            return attend(call, self.options.density, self.options.tail)
        memory = None if call.memo is None else self._memories.of(call.memo)
        known = None if memory is None else memory.get(call)
        out, settled = attend_aimed(call, known)
        if memory is not None and known is None and settled is not None:
            memory.put(call, settled)
        return out

    def observed(self, call: AttentionCall) -> Mapping[str, Tensor]:
        """See Backend.observed: what the run's memory says of the call; nothing where the density is given."""
        return {} if call.memo is None else self._memories.of(call.memo).observed(call)

    def read_back(self, signature: Any, block: int | None, observed: Mapping[str, float], counts: bool, memo: dict[Any, Any]) -> None:
        """See Backend.read_back."""
        self._memories.of(memo).read_back(signature, block, observed, counts)

    def too_slow(self, observed: Mapping[str, float]) -> str | None:
        """See Backend.too_slow."""
        needed = observed.get("density", 0.0) > plan.LARGEST_DENSITY
        return f"the error asked for needs more than {plan.LARGEST_DENSITY:.0%} of the blocks exact, which is no faster" if needed else None

    def release(self) -> None:
        """See Backend.release."""
        self._memories.clear()

    def keep(self, memo: dict[Any, Any]) -> None:
        """See Backend.keep."""
        self._memories.of(memo).keep()
